"""The LLM: loading it, the attentions it is trained and asked with, trees of pairs, the pointer, what a step costs."""
