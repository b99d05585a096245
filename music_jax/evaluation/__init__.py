"""Evaluation of saved runs: protocols that turn a run into results."""
