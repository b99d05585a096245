"""One self-contained HTML file that shows a run: its curves, its figures, and what it learned."""
