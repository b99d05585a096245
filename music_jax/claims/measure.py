"""What is measured of a trained cell, all of it from features and embeddings of both splits."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict
from sklearn.metrics import normalized_mutual_info_score

from music_jax.metrics.few_shot import few_shot
from music_jax.metrics.knn import knn_predict
from music_jax.metrics.label_free import rankme
from music_jax.metrics.linear_probe import ProbeRecipe, linear_probe
from music_jax.metrics.segments import (
    agreement_between_segments,
    cluster_scores,
    joint_clusters,
    measure_segments,
)
from music_jax.objectives import segment_probabilities

_SHOTS, _DRAWS = 10, 20
_STARTS = 3  # of k-means


class Outputs(NamedTuple):
    """What a network makes of a split.

    Attributes:
      features: [samples, features].
      embeddings: [samples, dim].
      labels: of each of the dataset's label features, integers [samples]; the first is the
        config's own.
    """

    features: np.ndarray
    embeddings: np.ndarray
    labels: dict[str, np.ndarray]


def linear_top1(
    train: Outputs, test: Outputs, config: config_dict.ConfigDict, label: str | None = None
) -> float:
    """Top-1 accuracy of a linear probe, by the config's own protocol on one view an image."""
    label = label or next(iter(train.labels))
    probe = config.linear_eval
    recipe = ProbeRecipe(
        num_epochs=probe.num_epochs,
        batch_size=probe.batch_size,
        base_learning_rates=tuple(probe.base_learning_rates),
        momentum=probe.momentum,
        weight_decay=probe.weight_decay,
        drop_epochs=tuple(probe.drop_epochs),
    )
    return linear_probe(
        train.features,
        train.labels[label],
        test.features,
        test.labels[label],
        recipe,
        num_classes=int(train.labels[label].max()) + 1,
        feature_scaling=probe.feature_scaling,
        validation_fraction=probe.validation_fraction,
        seed=config.seed,
    ).top1


def measure(train: Outputs, test: Outputs, config: config_dict.ConfigDict) -> dict[str, Any]:
    """Everything but the linear probe: of the features, and of the segments if there are any."""
    labels, test_labels = (next(iter(split.labels.values())) for split in (train, test))
    predicted = knn_predict(
        train.features,
        labels,
        test.features,
        num_classes=int(labels.max()) + 1,
        k=config.knn.k,
        temperature=config.knn.temperature,
    )
    shots = few_shot(train.features, labels, test.features, test_labels, shots=_SHOTS, draws=_DRAWS)
    found: dict[str, Any] = {
        "knn_top1": float(np.mean(predicted == test_labels)),
        "ten_shot_top1": shots.top1.mean,
        "rankme": rankme(test.features),
        "embedding_rankme": rankme(test.embeddings),
    }
    if config.objective.name == "music":
        found |= _measure_segments(train, test, config)
    return found


def measure_factors(
    train: Outputs, test: Outputs, config: config_dict.ConfigDict
) -> dict[str, Any]:
    """A linear probe of each label and, of MUSIC, what each segment shares with each of them."""
    names = list(train.labels)
    found: dict[str, Any] = {
        "factors": names,
        "factor_linear_top1": [linear_top1(train, test, config, name) for name in names],
    }
    if config.objective.name == "music":
        codes = _probabilities(test, config).argmax(axis=2)
        found["factor_nmi"] = [
            [float(normalized_mutual_info_score(test.labels[name], code)) for name in names]
            for code in codes.T
        ]
    return found


def _probabilities(outputs: Outputs, config: config_dict.ConfigDict) -> np.ndarray:
    objective = config.objective
    return np.asarray(
        segment_probabilities(
            jnp.asarray(outputs.embeddings),
            num_segments=objective.num_segments,
            temperature=objective.temperature,
        )
    )


def _measure_segments(
    train: Outputs, test: Outputs, config: config_dict.ConfigDict
) -> dict[str, Any]:
    """Clusters straight from the segments, and how the segments use their units.

    The segment that is reported is the one that agrees best with the others, by the training
    images: no label chooses it.
    """
    labels = next(iter(test.labels.values()))
    num_classes = len(np.unique(next(iter(train.labels.values()))))
    train_p, p = _probabilities(train, config), _probabilities(test, config)
    codes = p.argmax(axis=2)
    best = int(agreement_between_segments(train_p.argmax(axis=2)).argmax())
    clusters = joint_clusters(p, num_clusters=num_classes, num_starts=_STARTS)
    joint = cluster_scores(clusters, labels)
    by_segment = [cluster_scores(code, labels) for code in codes.T]
    measures = measure_segments(p)
    apart = ~np.eye(codes.shape[1], dtype=bool)
    log_units = np.log(config.objective.units_per_segment)
    return {
        "segment_accuracy": by_segment[best].accuracy,
        "segment_purity": by_segment[best].purity,
        "joint_code_accuracy": joint.accuracy,
        "joint_code_nmi": joint.nmi,
        "segments_label_nmi": [scores.nmi for scores in by_segment],
        "segments_label_nmi_mean": float(np.mean([scores.nmi for scores in by_segment])),
        "segment_information": float(measures.mutual_information[apart].mean() / log_units),
        "usage_entropy": float(measures.usage_entropy.mean() / log_units),
        "confidence": float(measures.confidence.mean()),
        "dead_units": float(measures.dead_units.mean() / config.objective.units_per_segment),
    }
