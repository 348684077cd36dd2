"""Models: from a recipe's `[model]` to a transformers model on packed rows. The only place that knows model classes."""
