"""cheaptrain: a small language model's whole life from TOML recipes."""

__version__ = "0.1.0"
