"""What the training scripts share: flags, set-up, trainers, checkpoints that are whole or not there, logs, plans."""
