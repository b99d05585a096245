"""The protocols that need nothing but features: from a run to figures, as JSON holds them."""

import math
from typing import Any

import numpy as np

from music_jax.distributed import progress
from music_jax.errors import DivergedError, NotMeasurableError
from music_jax.evaluation.image_protocols import random_crop_probe
from music_jax.evaluation.metrics import linear_probe
from music_jax.evaluation.metrics.clustering import (
    agreement_between_segments,
    cluster_scores,
    joint_clusters,
)
from music_jax.evaluation.metrics.few_shot import few_shot
from music_jax.evaluation.metrics.knn import nearest_neighbors, weighted_vote
from music_jax.evaluation.metrics.label_free import alignment, alpha_req, lidar, rankme, uniformity
from music_jax.evaluation.metrics.linear_probe import ProbeRecipe, ProbeResult
from music_jax.evaluation.metrics.retrieval import average_precisions
from music_jax.evaluation.metrics.segments import bound_distances, measure_segments
from music_jax.evaluation.predictions import Predictions, write_predictions
from music_jax.evaluation.run import Run

Figures = dict[str, Any]

_MAX_GALLERY = 200_000  # training images, drawn at random, that are ranked
_MAX_RANKED = 25_600  # samples whose singular values are taken, as in RankMe's paper


def linear_kept(run: Run) -> Figures:
    """As `linear`; what the probe said of each test image is kept in the workdir."""
    trained, test = _linear_probe(run, "trained"), run.test()
    found = Predictions(test.indices, test.labels, trained.predictions, run.step)
    write_predictions(run.workdir, found)
    return _linear(run, trained)


def linear(run: Run) -> Figures:
    """The linear probe, beside those of raw pixels and of the backbone before the training."""
    return _linear(run, _linear_probe(run, "trained"))


def _linear(run: Run, trained: ProbeResult) -> Figures:
    settings = run.config.linear_eval
    others = {
        f"{of}_top1": _linear_probe(run, of).top1 if settings[of] else None
        for of in ("raw_pixels", "random_init")
    }
    return {
        "top1": trained.top1,
        "top5": trained.top5,
        "num_train": trained.num_train,
        "num_test": len(run.test()),
        "num_classes": run.num_classes,
        "learning_rate": trained.base_learning_rate * settings.batch_size / 256,
        **others,
        **run.without_label("train", "test"),
    }


def _linear_probe(run: Run, of: str) -> ProbeResult:
    settings = run.config.linear_eval
    recipe = ProbeRecipe(
        num_epochs=settings.num_epochs,
        batch_size=settings.batch_size,
        base_learning_rates=tuple(settings.base_learning_rates),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        drop_epochs=tuple(settings.drop_epochs),
    )
    description = f"linear probe, {of.replace('_', ' ')}"
    try:
        if settings.random_crops:
            return random_crop_probe(run, of, recipe, description)
        return _fixed_feature_probe(run, of, recipe, description)
    except DivergedError as error:
        raise DivergedError(
            f"{description}: it diverged; lower config.linear_eval.base_learning_rates"
        ) from error


def _fixed_feature_probe(run: Run, of: str, recipe: ProbeRecipe, description: str) -> ProbeResult:
    settings = run.config.linear_eval
    train, test = run.train(of), run.test(of)
    total = linear_probe.num_steps(recipe, len(train), settings.validation_fraction)
    with progress.bar(total, unit="step", description=description) as bar:
        return linear_probe.linear_probe(
            train.features,
            train.labels,
            test.features,
            test.labels,
            recipe,
            num_classes=run.num_classes,
            feature_scaling=settings.feature_scaling,
            validation_fraction=settings.validation_fraction,
            seed=run.config.seed,
            after_step=bar.update,
        )


def knn(run: Run) -> Figures:
    """The weighted vote of the nearest training samples, for several numbers of neighbors."""
    settings = run.config.knn
    ks = sorted({settings.k, *settings.more_k})

    def by_k(of: str) -> dict[int, float]:
        train, test = run.train(of), run.test(of)
        similarities, nearest = nearest_neighbors(train.features, test.features, k=max(ks))
        accuracies = {}
        for k in ks:
            predicted = weighted_vote(
                similarities[:, :k],
                train.labels[nearest[:, :k]],
                num_classes=run.num_classes,
                temperature=settings.temperature,
            )
            accuracies[k] = float(np.mean(predicted == test.labels))
        return accuracies

    trained = by_k("trained")
    linear_eval = run.config.linear_eval
    return {
        "top1": trained[settings.k],
        "top1_by_k": {str(k): top1 for k, top1 in trained.items()},
        "k": settings.k,
        "temperature": settings.temperature,
        "num_train": len(run.train()),
        "num_test": len(run.test()),
        **{
            f"{of}_top1": by_k(of)[settings.k] if linear_eval[of] else None
            for of in ("raw_pixels", "random_init")
        },
        **run.without_label("train", "test"),
    }


def fewshot(run: Run) -> Figures:
    """Logistic regression on a few samples a class: mean and 95 % interval over the draws."""
    settings, train, test = run.config.few_shot, run.train(), run.test()
    found = {}
    total = len(settings.shots) * settings.draws
    with progress.bar(total, unit="draw", description="few-shot") as bar:
        for shots in settings.shots:
            result = few_shot(
                train.features,
                train.labels,
                test.features,
                test.labels,
                shots=shots,
                draws=settings.draws,
                seed=run.config.seed,
                after_draw=bar.update,
            )
            found[str(shots)] = {
                "top1": result.top1.mean,
                "interval": _finite(result.top1.half_width),
                "draws": result.accuracies.tolist(),
            }
    return {
        "top1_by_shots": found,
        "num_test": len(test),
        **run.without_label("train", "test"),
    }


def retrieval(run: Run) -> Figures:
    """Mean average precision of the test images' searches among the training images."""
    train, test = run.train(), run.test()
    if len(train) > _MAX_GALLERY:
        rng = np.random.Generator(np.random.Philox(key=[run.config.seed, 2**34]))
        train = train.rows(np.sort(rng.permutation(len(train))[:_MAX_GALLERY]))
    precisions = average_precisions(train.features, train.labels, test.features, test.labels)
    answered = precisions[np.isfinite(precisions)]  # those with anything to be found
    return {
        "map": float(np.mean(answered)) if len(answered) else None,
        "num_gallery": len(train),
        "num_queries": len(answered),
        **run.without_label("train", "test"),
    }


def clustering(run: Run) -> Figures:
    """Each segment's units as clusters of the test images, and clusters of the joint code."""
    labels = run.unlabeled().labels
    labeled = np.flatnonzero(labels >= 0)
    labels, probabilities = labels[labeled], run.probabilities()[labeled]
    num_clusters = len(np.unique(labels))
    if num_clusters < 2:
        raise NotMeasurableError("clustering needs test images with labels of two classes or more")
    codes = probabilities.argmax(axis=2)  # [images, segments]
    agreement = agreement_between_segments(codes)
    scores = [cluster_scores(codes[:, s], labels) for s in range(codes.shape[1])]
    chosen = int(np.argmax(agreement))
    oracle = int(np.argmax([score.accuracy for score in scores]))
    joint = joint_clusters(probabilities, num_clusters=num_clusters, seed=run.config.seed)
    return {
        "joint_code": {
            **cluster_scores(joint, labels)._asdict(),
            "num_clusters": num_clusters,
        },
        "chosen_segment": {
            "rule": "without labels: the segment whose mean NMI with the others is largest",
            "segment": chosen,
            "agreement": float(agreement[chosen]),
            **scores[chosen]._asdict(),
        },
        "oracle_segment": {
            "rule": "by the test labels: the segment of the highest accuracy",
            "segment": oracle,
            **scores[oracle]._asdict(),
        },
        "segments": [
            {"agreement": float(a), **score._asdict()}
            for a, score in zip(agreement, scores, strict=True)
        ],
        "num_images": len(labels),
        **run.without_label("test"),
    }


def label_free(run: Run) -> Figures:
    """RankMe, α-ReQ and uniformity of one view of each image; LiDAR and alignment of several."""
    _check_two_images(run)
    outputs, views = run.unlabeled().arrays, run.views()
    figures: Figures = {}
    for name in ("features", "embeddings"):
        rows = outputs[name][:_MAX_RANKED]
        several = views[name]
        figures[name] = {
            "rankme": _finite(rankme(rows)),
            "lidar": _finite(lidar(several)),
            "alpha_req": _finite(alpha_req(rows)),
            "uniformity": _finite(uniformity(rows)),
            "alignment": alignment(several[:, 0], several[:, 1]),
            "size": rows.shape[1],
        }
    some = views["features"].shape
    return {
        **figures,
        "num_images": len(outputs["features"][:_MAX_RANKED]),
        "num_viewed_images": some[0],
        "num_views": some[1],
    }


def segments(run: Run) -> Figures:
    """How the segments use their units, what they share, and the objective's distance to bound."""
    _check_two_images(run)
    objective = run.config.objective
    probabilities = run.probabilities()
    found = measure_segments(probabilities)
    several = run.views()["embeddings"]
    distances = bound_distances(
        several[:, 0],
        several[:, 1],
        num_segments=objective.num_segments,
        temperature=objective.temperature,
    )
    samples, count, units = probabilities.shape
    usage = float(np.mean(found.usage_entropy))
    between = found.mutual_information[~np.eye(count, dtype=bool)]
    return {
        "num_images": samples,
        "log_units": math.log(units),
        "usage_entropy": _summary(found.usage_entropy),
        "usage_entropy_share": usage / math.log(units),
        "dead_units": int(np.sum(found.dead_units)),
        "num_units": count * units,
        "confidence": _summary(found.confidence),
        "assignment_entropy": _summary(found.assignment_entropy),
        "mutual_information": {
            **_summary(between),
            "bias": (units - 1) ** 2 / (2 * samples),
            "share_of_usage_entropy": float(np.mean(between) / usage) if usage > 0 else None,
        },
        "gap_to_bound": {**distances._asdict(), "num_images": len(several)},
        "by_segment": {
            "usage_entropy": found.usage_entropy.tolist(),
            "dead_units": found.dead_units.tolist(),
            "confidence": found.confidence.tolist(),
            "assignment_entropy": found.assignment_entropy.tolist(),
            "information": found.information.tolist(),
        },
        "mutual_information_matrix": found.mutual_information.tolist(),
    }


def _check_two_images(run: Run) -> None:
    count = len(run.unlabeled())
    if count < 2:
        raise NotMeasurableError(f"two images or more are needed; {run.images.name} has {count}")


def _summary(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "least": float(np.min(values)),
        "most": float(np.max(values)),
    }


def _finite(value: float) -> float | None:
    """The value as JSON has it: NaN is null."""
    return value if math.isfinite(value) else None
