"""Estimates the cost of a training step on chips that are not at hand."""
