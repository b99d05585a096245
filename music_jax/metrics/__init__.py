"""Metrics of frozen features, as pure functions of arrays."""
