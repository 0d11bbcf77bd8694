"""The LLM: loading it, the attentions it is trained and asked with, trees of pairs, what a step of it costs."""
