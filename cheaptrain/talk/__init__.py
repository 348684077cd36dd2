"""Talking to a checkpoint: in the terminal, on a page, through an OpenAI-compatible API."""
