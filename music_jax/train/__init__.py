"""Pre-training."""

from music_jax.train.loop import train_and_evaluate

__all__ = ["train_and_evaluate"]
