"""Self-supervised objectives as pure functions of two views' embeddings, in the manner of optax."""

from music_jax.objectives.barlow_twins import barlow_twins_loss
from music_jax.objectives.music import MusicTerms, music_loss, music_lower_bound, music_terms
from music_jax.objectives.probabilities import (
    joint_probability,
    segment_codes,
    segment_probabilities,
)
from music_jax.objectives.simclr import simclr_loss
from music_jax.objectives.vicreg import vicreg_loss

__all__ = [
    "MusicTerms",
    "barlow_twins_loss",
    "joint_probability",
    "music_loss",
    "music_lower_bound",
    "music_terms",
    "segment_codes",
    "segment_probabilities",
    "simclr_loss",
    "vicreg_loss",
]
