"""Captioned images in a fixed order."""
