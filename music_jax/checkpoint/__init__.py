"""Saving, checking and restoring checkpoints."""
