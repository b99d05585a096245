"""Pre-training: the step, its guards, and the loop around it."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "train_and_evaluate":
        from music_jax.train.loop import train_and_evaluate

        return train_and_evaluate
    raise AttributeError(name)
