"""Conversations: read into one form, and rendered to token ids and a mask of what the model must produce."""
