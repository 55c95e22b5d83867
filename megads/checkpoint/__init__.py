"""Checkpoints. For scripts: `megads.checkpoint.open(path)[name]` (`logical.py`)."""

from megads.checkpoint.logical import open_checkpoint as open

__all__ = ("open",)
