"""The text-to-image pipeline, and the checkpoint and run folders that it is stored in."""
