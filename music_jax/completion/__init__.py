"""Completion of the commands in bash, zsh and fish."""
