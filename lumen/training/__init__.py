"""Data, optimisers, the training step and the loop: functions, no Trainer class."""
