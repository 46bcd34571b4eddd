"""Options of training and sampling, as dataclasses."""
