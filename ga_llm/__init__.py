"""What the three entry scripts share: prompts, training data, attention, loading, checkpoints, ranking, metrics."""
