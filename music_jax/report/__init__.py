"""A self-contained HTML report of a run: setup, curves, results, and pictures."""
