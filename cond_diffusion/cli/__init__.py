"""Commands: argument parsing and output."""
