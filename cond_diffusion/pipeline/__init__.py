"""Prompt in, images out; and the folders on disk."""
