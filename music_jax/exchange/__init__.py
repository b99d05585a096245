"""Backbones out of here, for use elsewhere, and in, for evaluation side by side."""
