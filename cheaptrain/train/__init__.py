"""One loop for every stage of a model's life."""
