"""Pre-training: the step, its guards, and the loop around it."""

from music_jax.train.loop import train_and_evaluate as train_and_evaluate
