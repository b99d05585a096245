"""A self-contained HTML report of a run: its setup, curves, results, and what it learned."""
