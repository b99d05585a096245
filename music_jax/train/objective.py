"""The objectives by name, each as a function of a pair of embeddings that reports its terms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from music_jax.objectives import (
    barlow_twins_loss,
    music_lower_bound,
    music_terms,
    simclr_loss,
    vicreg_loss,
)
from music_jax.registry import OBJECTIVES

Metrics = dict[str, jax.Array]
# Embeddings of the two views, [batch, dim] each, to the loss and what else to log.
Objective = Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]]


def _music(config: config_dict.ConfigDict) -> Objective:
    default_weights = (
        config.diagonal_weight == config.cross_segment_weight == config.invariance_weight == 1.0
    )
    bound = music_lower_bound(config.units_per_segment)

    def objective(a: jax.Array, b: jax.Array) -> tuple[jax.Array, Metrics]:
        terms = music_terms(a, b, num_segments=config.num_segments, temperature=config.temperature)
        loss = (
            config.diagonal_weight * terms.diagonal
            + config.cross_segment_weight * terms.cross_segment
            + config.invariance_weight * terms.invariance
        )
        metrics = dict(terms._asdict())
        if default_weights:
            metrics["gap_to_bound"] = loss - jnp.asarray(bound, loss.dtype)
        return loss, metrics

    return objective


def _barlow_twins(config: config_dict.ConfigDict) -> Objective:
    return lambda a, b: (
        barlow_twins_loss(a, b, off_diagonal_weight=config.off_diagonal_weight),
        {},
    )


def _vicreg(config: config_dict.ConfigDict) -> Objective:
    return lambda a, b: (
        vicreg_loss(
            a,
            b,
            similarity_weight=config.similarity_weight,
            variance_weight=config.variance_weight,
            covariance_weight=config.covariance_weight,
        ),
        {},
    )


def _simclr(config: config_dict.ConfigDict) -> Objective:
    return lambda a, b: (simclr_loss(a, b, temperature=config.contrast_temperature), {})


OBJECTIVES.update(music=_music, barlow_twins=_barlow_twins, vicreg=_vicreg, simclr=_simclr)
