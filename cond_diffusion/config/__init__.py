"""Every option of a run and of sampling, as dataclasses."""
