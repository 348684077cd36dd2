"""Two or more runs, checkpoints or groups of seeds beside each other, with what chance alone would have done."""
