"""Evaluation of generated images: metrics, likelihood, and the report."""
