"""Question-answer pairs as tokens: read, tokenized once and kept, batched for training, cut into test prompts."""
