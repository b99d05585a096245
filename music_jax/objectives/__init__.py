"""Self-supervised objectives as pure functions of two views' embeddings, like losses of optax."""

from music_jax.objectives.baselines import barlow_twins_loss, simclr_loss, vicreg_loss
from music_jax.objectives.discrete import discrete_loss
from music_jax.objectives.music import MusicTerms, music_loss, music_lower_bound, music_terms
from music_jax.objectives.probabilities import (
    joint_probability,
    segment_codes,
    segment_probabilities,
)
from music_jax.objectives.sigreg import sigreg_loss
from music_jax.objectives.tcr import tcr_loss

__all__ = [
    "MusicTerms",
    "barlow_twins_loss",
    "discrete_loss",
    "joint_probability",
    "music_loss",
    "music_lower_bound",
    "music_terms",
    "segment_codes",
    "segment_probabilities",
    "sigreg_loss",
    "simclr_loss",
    "tcr_loss",
    "vicreg_loss",
]
