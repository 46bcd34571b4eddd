"""Captioned images: sources, datasets, streams, the order of training, and the cache."""
