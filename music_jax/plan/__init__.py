"""Estimates the cost of a training step on chips that you do not have."""
