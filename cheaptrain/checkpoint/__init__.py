"""Runs on the disk: checkpoints that are whole or not there, and the folder they lie in. Knows nothing of models."""
