"""Protocols with a frozen backbone: functions from a run to a result, as JSON values."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from music_jax.distributed import progress
from music_jax.distributed.mesh import shares_cores
from music_jax.errors import DivergedError, NotMeasurableError
from music_jax.evaluation.features import Model
from music_jax.evaluation.results import (
    MEAN_AVERAGE_PRECISION,
    Classifier,
    Predictions,
    Result,
    write_classifier,
    write_predictions,
)
from music_jax.evaluation.run import Run
from music_jax.metrics import linear_probe
from music_jax.metrics.few_shot import few_shot, mean_interval
from music_jax.metrics.knn import average_precisions, knn_predict, knn_scores
from music_jax.metrics.label_free import alignment, alpha_req, lidar, rankme, uniformity
from music_jax.metrics.linear_probe import ProbeRecipe, ProbeResult
from music_jax.metrics.multi_label import average_precisions as class_average_precisions
from music_jax.metrics.multi_label import mean_average_precision
from music_jax.metrics.scaling import fit_scaling
from music_jax.metrics.segments import (
    agreement_between_segments,
    cluster_scores,
    gap_to_bound,
    joint_clusters,
    measure_segments,
)

_logger = logging.getLogger(__name__)

_MAX_GALLERY = 200_000  # training images to rank, drawn at random
_MAX_RANKED = 25_600  # samples for the singular values, as in RankMe's paper


def linear(run: Run, *, save_predictions: bool = False) -> Result:
    """Trains the linear probe, on the trained backbone and on the baselines.

    Args:
      run: Run.
      save_predictions: Whether to write the classifier and its predictions for the test images into
        the workdir.

    Raises:
      DivergedError: The probe of the trained backbone diverged. A diverged baseline is missing.
    """
    settings, test = run.config.linear_eval, run.test()
    trained = _linear_probe(run, "trained")
    if save_predictions and not run.multi_label:
        columns = test.indices, test.labels, trained.predictions
        found = Predictions(*columns, run.step, trained.confidences)
        write_predictions(run.workdir, found)
        if classifier := trained.classifier():
            write_classifier(run.workdir, Classifier(*classifier, run.step))

    def baseline(model: Model) -> float | None:
        try:
            found = _linear_probe(run, model)
        except DivergedError as error:
            _logger.warning(f"this baseline is missing: {error}")
            return None
        precisions = found.average_precisions
        return found.top1 if precisions is None else mean_average_precision(precisions)

    return {
        **_scores(run, trained),
        "num_train": trained.num_train,
        "num_test": len(test),
        "num_classes": run.num_classes,
        "learning_rate": trained.base_learning_rate
        * min(settings.batch_size, trained.num_train)
        / 256,
        **_baselines(run, baseline),
    }


def _scores(run: Run, probe: ProbeResult) -> Result:
    precisions = probe.average_precisions
    if precisions is None:
        return {"top1": probe.top1, "top5": probe.top5}
    names = run.evaluation_sources().train.class_names
    by_class = {n: _finite(float(x)) for n, x in zip(names, precisions, strict=True)}
    return {
        MEAN_AVERAGE_PRECISION: mean_average_precision(precisions),
        f"chance_{MEAN_AVERAGE_PRECISION}": _chance(run),
        "average_precision_by_class": by_class,
    }


def _chance(run: Run) -> float:
    """Returns the mean average precision of constant scores."""
    labels = run.test().labels
    return mean_average_precision(class_average_precisions(np.zeros(labels.shape), labels))


def _baselines(run: Run, score: Callable[[Model], float | None]) -> Result:
    models: tuple[Model, ...] = ("raw_pixels", "random_init")
    name = MEAN_AVERAGE_PRECISION if run.multi_label else "top1"
    return {f"{m}_{name}": score(m) if run.config.linear_eval[m] else None for m in models}


def _linear_probe(run: Run, model: Model) -> ProbeResult:
    settings = run.config.linear_eval
    recipe = ProbeRecipe(**{f.name: settings[f.name] for f in dataclasses.fields(ProbeRecipe)})
    description = f"linear probe, {model.replace('_', ' ')}"
    try:
        if settings.random_crops:
            return random_crop_probe(run, model, recipe, description)
        train, test = run.train(model), run.test(model)
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
    except DivergedError as error:
        raise DivergedError(
            f"{description}: training diverged; lower config.linear_eval.base_learning_rates"
        ) from error


def random_crop_probe(run: Run, model: Model, recipe: ProbeRecipe, description: str) -> ProbeResult:
    """Trains a linear probe on new crops in each epoch, and tests it on the central views."""
    settings, test = run.config.linear_eval, run.test(model)
    indices, extract = run.labeled_rows("train"), run.extractor(model)
    scale = fit_scaling(settings.feature_scaling, lambda: run.train(model).features)
    scale_on_device = jax.jit(scale)

    def batches(recipe: ProbeRecipe, rows: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
        choosing = len(recipe.base_learning_rates) > 1
        crops = run.random_crop_batches(
            run.evaluation_sources().train.subset(indices[rows]),
            batch_size=recipe.batch_size,
            num_epochs=recipe.num_epochs,
            description=description + ", learning rate" * choosing,
        )
        return ((scale_on_device(extract(x)["features"]), labels) for x, labels in crops)

    def validation_samples(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        held_out = run.train(model)
        held_out = held_out.select(np.flatnonzero(np.isin(held_out.indices, indices[rows])))
        return scale(held_out.features), held_out.labels

    return linear_probe.train_and_test(
        batches,
        validation_samples,
        (scale(test.features), test.labels),
        recipe,
        num_train=len(indices),
        num_classes=run.num_classes,
        validation_fraction=settings.validation_fraction,
        seed=run.config.seed,
        synchronous=shares_cores(run.mesh),
    )._replace(scale=scale)


def knn(run: Run) -> Result:
    """Classifies by the weighted vote of the nearest training samples, for several k."""
    settings = run.config.knn
    ks = sorted({settings.k, *settings.more_k})

    def score_by_k(model: Model) -> dict[int, float]:
        train, test = run.train(model), run.test(model)
        arguments = train.features, train.labels, test.features
        options = {"k": ks, "temperature": settings.temperature}
        if run.multi_label:
            scores = knn_scores(*arguments, **options)
            precisions = (class_average_precisions(x, test.labels) for x in scores)
            return dict(zip(ks, map(mean_average_precision, precisions), strict=True))
        predicted = knn_predict(*arguments, num_classes=run.num_classes, **options)
        return dict(zip(ks, np.mean(predicted == test.labels, axis=1).tolist(), strict=True))

    trained = score_by_k("trained")
    name = MEAN_AVERAGE_PRECISION if run.multi_label else "top1"
    return {
        name: trained[settings.k],
        f"{name}_by_k": {str(k): score for k, score in trained.items()},
        "k": settings.k,
        "temperature": settings.temperature,
        "num_train": len(run.train()),
        "num_test": len(run.test()),
        **_baselines(run, lambda model: score_by_k(model)[settings.k]),
    }


def fewshot(run: Run) -> Result:
    """Evaluates logistic regression on a few samples per class, over several draws."""
    settings, train, test = run.config.few_shot, run.train(), run.test()
    results = {}
    total = len(settings.shots) * settings.draws
    with progress.bar(total, unit="draw", description="few-shot") as bar:
        for shots in settings.shots:
            accuracies = few_shot(
                train.features,
                train.labels,
                test.features,
                test.labels,
                shots=shots,
                draws=settings.draws,
                seed=run.config.seed,
                after_draw=bar.update,
            )
            mean, half_width = mean_interval(accuracies)
            results[str(shots)] = {
                "top1": mean,
                "interval": _finite(half_width),
                "draws": accuracies.tolist(),
            }
    return {"top1_by_shots": results, "num_test": len(test)}


def retrieval(run: Run) -> Result:
    """Computes the mean average precision of searches among the training images."""
    train, test = run.train(), run.test()
    if len(train) > _MAX_GALLERY:
        rng = np.random.Generator(np.random.Philox(key=[run.config.seed, 2**34]))
        train = train.select(np.sort(rng.permutation(len(train))[:_MAX_GALLERY]))
    precisions = average_precisions(train.features, train.labels, test.features, test.labels)
    precisions = precisions[np.isfinite(precisions)]  # queries with a relevant image
    return {
        "map": float(np.mean(precisions)) if len(precisions) else None,
        "num_gallery": len(train),
        "num_queries": len(precisions),
    }


def clustering(run: Run) -> Result:
    """Compares the units of each segment, and clusters of the joint code, with the labels."""
    labels = run.unlabeled().labels
    labeled = np.flatnonzero(labels >= 0)
    labels, probabilities = labels[labeled], run.probabilities()[labeled]
    num_clusters = len(np.unique(labels))
    if num_clusters < 2:
        raise NotMeasurableError("clustering needs test images with labels of two classes or more")
    codes = probabilities.argmax(axis=2)  # [images, segments]
    agreement = agreement_between_segments(codes)
    scores = [cluster_scores(code, labels)._asdict() for code in codes.T]
    chosen = int(np.argmax(agreement))
    oracle = int(np.argmax([score["accuracy"] for score in scores]))
    joint = joint_clusters(probabilities, num_clusters=num_clusters, seed=run.config.seed)
    return {
        "joint_code": {**cluster_scores(joint, labels)._asdict(), "num_clusters": num_clusters},
        "chosen_segment": {
            "rule": "without labels: the segment whose mean NMI with the others is largest",
            "segment": chosen,
            "agreement": float(agreement[chosen]),
            **scores[chosen],
        },
        "oracle_segment": {
            "rule": "by the test labels: the segment of the highest accuracy",
            "segment": oracle,
            **scores[oracle],
        },
        "segments": [
            {"agreement": float(a), **score} for a, score in zip(agreement, scores, strict=True)
        ],
        "num_images": len(labels),
    }


def label_free(run: Run) -> Result:
    """Computes metrics that need no labels, on one view of each image and on several."""
    _check_two_images(run)
    outputs, views = run.unlabeled().arrays, run.views()

    def measures(name: str) -> Result:
        one, several = outputs[name][:_MAX_RANKED], views[name]
        return {
            "rankme": _finite(rankme(one)),
            "lidar": _finite(lidar(several)),
            "alpha_req": _finite(alpha_req(one)),
            "uniformity": _finite(uniformity(one)),
            "alignment": alignment(several[:, 0], several[:, 1]),
            "size": one.shape[1],
        }

    num_viewed_images, num_views = views["features"].shape[:2]
    return {
        "features": measures("features"),
        "embeddings": measures("embeddings"),
        "num_images": len(outputs["features"][:_MAX_RANKED]),
        "num_viewed_images": num_viewed_images,
        "num_views": num_views,
    }


def segments(run: Run) -> Result:
    """Measures the usage of units, the mutual information of segments, and the gap to the bound."""
    _check_two_images(run)
    objective = run.config.objective
    probabilities = run.probabilities()
    measures = measure_segments(probabilities)
    views = run.views()["embeddings"]
    gap = gap_to_bound(
        views[:, 0],
        views[:, 1],
        num_segments=objective.num_segments,
        temperature=objective.temperature,
    )
    samples, count, units = probabilities.shape
    usage = float(np.mean(measures.usage_entropy))
    between = measures.mutual_information[~np.eye(count, dtype=bool)]
    by_segment = ("usage_entropy", "dead_units", "confidence", "assignment_entropy", "information")
    return {
        "num_images": samples,
        "log_units": math.log(units),
        "usage_entropy": _summary(measures.usage_entropy),
        "usage_entropy_share": usage / math.log(units),
        "dead_units": int(np.sum(measures.dead_units)),
        "num_units": count * units,
        "confidence": _summary(measures.confidence),
        "assignment_entropy": _summary(measures.assignment_entropy),
        "mutual_information": {
            **_summary(between),
            "bias": (units - 1) ** 2 / (2 * samples),
            "share_of_usage_entropy": float(np.mean(between) / usage) if usage > 0 else None,
        },
        "gap_to_bound": gap | {"num_images": len(views)},
        "by_segment": {name: getattr(measures, name).tolist() for name in by_segment},
        "mutual_information_matrix": measures.mutual_information.tolist(),
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
    """Returns the value, or None for NaN, which JSON lacks."""
    return value if math.isfinite(value) else None
