"""The recipe: TOML files to one typed description of a run, and every number that follows from it."""
