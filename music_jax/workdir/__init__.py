"""The files of a run: config.json, logs, lock, and how files are written."""
