"""The protocols that train on the images themselves: from a run to figures."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from music_jax.distributed import progress
from music_jax.errors import DivergedError, NotMeasurableError
from music_jax.evaluation.features import extract_split, normalize, random_crop_batches
from music_jax.evaluation.finetune import FinetuneRecipe, finetune, logit_extractor
from music_jax.evaluation.image_lists import rows_of_list
from music_jax.evaluation.metrics import linear_probe
from music_jax.evaluation.metrics.feature_scaling import fit_scaling
from music_jax.evaluation.metrics.few_shot import stratified_subset
from music_jax.evaluation.metrics.linear_probe import Heads, ProbeRecipe, ProbeResult
from music_jax.evaluation.run import Run

Figures = dict[str, Any]


def random_crop_probe(run: Run, of: str, recipe: ProbeRecipe, description: str) -> ProbeResult:
    """The linear probe on new crops and flips in each epoch, as `linear_probe.linear_probe`.

    Args:
      run: the run.
      of: whose features; see `Run.train`.
      recipe: how to train.
      description: what the progress bar says.

    Returns:
      The accuracies on the central views of all test images that have a label.

    Raises:
      DivergedError: as `linear_probe.linear_probe`.
    """
    settings, source = run.config.linear_eval, run.evaluation_sources().train
    labeled = run.labeled_rows("train")
    extract, test = run.extractor(of), run.test(of)
    scale = fit_scaling(settings.feature_scaling, lambda: run.train(of).features)
    scale_on_device = jax.jit(scale)

    def trained(recipe: ProbeRecipe, rows: np.ndarray) -> Heads:
        recipe = linear_probe.clip_batch(recipe, len(rows))
        batches = random_crop_batches(
            source.subset(rows),
            run.config,
            run.mesh,
            batch_size=recipe.batch_size,
            num_epochs=recipe.num_epochs,
            seed=run.config.seed,
            skipped=run.skipped,
        )
        steps_per_epoch = len(rows) // recipe.batch_size
        total = recipe.num_epochs * steps_per_epoch
        with progress.bar(total, unit="step", description=description) as bar:
            return linear_probe.fit(
                (
                    (scale_on_device(extract(images)["features"]), labels)
                    for images, labels in batches
                ),
                recipe,
                num_features=test.features.shape[1],
                num_classes=run.num_classes,
                steps_per_epoch=steps_per_epoch,
                seed=run.config.seed,
                after_step=bar.update,
            )

    rates = recipe.base_learning_rates
    if len(rates) > 1:
        rest, held_out = linear_probe.split_for_validation(
            len(labeled), settings.validation_fraction, run.config.seed
        )
        train = run.train(of)
        part = train.rows(np.flatnonzero(np.isin(train.indices, labeled[held_out])))
        heads = trained(recipe, labeled[rest])
        rates = (rates[linear_probe.best_rate(heads, scale(part.features), part.labels)],)
    recipe = dataclasses.replace(recipe, base_learning_rates=rates)
    heads = trained(recipe, labeled)
    return linear_probe.score_heads(
        heads, scale(test.features), test.labels, rates[0], num_train=len(labeled)
    )


def full_finetune(run: Run) -> Figures:
    """Fine-tuning of the whole backbone on all labeled training images."""
    settings, rows = run.config.finetune, run.labeled_rows("train")
    recipe = _recipe(settings, settings.backbone_learning_rate, settings.head_learning_rate)
    return _finetuned(run, rows, recipe, "fine-tuning") | run.without_label("train", "test")


def semi_supervised(run: Run) -> Figures:
    """Fine-tuning on a small share of the labels: 1 % and 10 %, by default."""
    settings, source = run.config.semi_supervised, run.evaluation_sources().train
    found = {}
    for i, fraction in enumerate(settings.fractions):
        if settings.lists[i]:
            listed = rows_of_list(source, settings.lists[i])
            rows = np.intersect1d(listed, run.labeled_rows("train"))
        else:
            train = run.train()
            rows = train.indices[stratified_subset(train.labels, fraction, seed=run.config.seed)]
        recipe = _recipe(
            settings, settings.backbone_learning_rates[i], settings.head_learning_rates[i]
        )
        name = f"{100 * fraction:g} %"
        found[name] = _finetuned(run, rows, recipe, f"fine-tuning on {name}") | {
            "list": settings.lists[i] or "stratified"
        }
    return {"by_share": found, **run.without_label("train", "test")}


def _recipe(
    settings: config_dict.ConfigDict, backbone_learning_rate: float, head_learning_rate: float
) -> FinetuneRecipe:
    return FinetuneRecipe(
        num_epochs=settings.num_epochs,
        batch_size=settings.batch_size,
        backbone_learning_rate=backbone_learning_rate,
        head_learning_rate=head_learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _finetuned(run: Run, rows: np.ndarray, recipe: FinetuneRecipe, description: str) -> Figures:
    if len(rows) < 2:
        raise NotMeasurableError(f"{description} needs two images or more with a label")
    train, test = run.evaluation_sources()
    recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, len(rows)))
    steps_per_epoch = len(rows) // recipe.batch_size
    prepare = functools.partial(normalize, config=run.config)
    batches = random_crop_batches(
        train.subset(rows),
        run.config,
        run.mesh,
        batch_size=recipe.batch_size,
        num_epochs=recipe.num_epochs,
        seed=run.config.seed,
        skipped=run.skipped,
    )
    total = recipe.num_epochs * steps_per_epoch
    with progress.bar(total, unit="step", description=description) as bar:
        classifier = finetune(
            run.network,
            run.params,
            run.batch_stats,
            batches,
            recipe,
            num_classes=run.num_classes,
            steps_per_epoch=steps_per_epoch,
            normalize=prepare,
            mesh=run.mesh,
            seed=run.config.seed,
            after_step=bar.update,
        )
    found = extract_split(
        logit_extractor(run.network, classifier, prepare),
        test.subset(run.labeled_rows("test")),
        run.config,
        run.mesh,
        skipped=run.skipped,
        description=f"{description}, test",
    )
    if not len(found):
        raise NotMeasurableError(f"none of the images of {test.name} can be decoded")
    logits = found.arrays["logits"]
    if not np.all(np.isfinite(logits)):
        raise DivergedError(f"{description} diverged; lower its learning rates")
    ranks = linear_probe.ranks(logits, found.labels)
    return {
        "top1": float(np.mean(ranks < 1)),
        "top5": float(np.mean(ranks < 5)),
        "num_train": len(rows),
        "num_test": len(found),
        "batch_size": recipe.batch_size,
    }
