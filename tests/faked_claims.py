"""Comparisons whose cells have made-up results."""

import runpy
import zlib

import numpy as np
from etils import epath

from music_jax.claims.budget import BUDGETS, images_of
from music_jax.claims.cells import Results
from music_jax.claims.methods import find_methods
from music_jax.claims.planning import missing_cells
from music_jax.claims.sweep import Sweep

IMAGES = 400
LABELS = np.random.default_rng(7).integers(10, size=IMAGES)


def load(name):
    return runpy.run_path(f"configs/{name}.py")["get_config"]()


def make_sweep(
    tmp_path,
    name="fashion_mnist",
    *,
    methods=("music", "vicreg"),
    claims=(1,),
    seeds=4,
    budget="small",
    config=None,
):
    config, sizes = config or load(name), BUDGETS[budget]
    return Sweep(
        config=config,
        images=images_of(config.dataset.name, sizes),
        budget=sizes,
        methods=find_methods(list(methods)),
        claims=claims,
        seeds=seeds,
        results=Results(epath.Path(tmp_path)),
    )


def validation_accuracy(cell):
    """Returns an accuracy that is best at a learning rate of 8e-3 and a depth of 0."""
    fields = cell.fields
    rate = fields["optimizer.base_learning_rate"] * fields.get("batch_size", 256) / 256
    return 0.9 - 0.01 * abs(np.log2(rate / 8e-3)) - 0.001 * len(fields["projector.hidden_sizes"])


def finish(sweep, cell, accuracy=validation_accuracy, **more):
    """Writes the result of a cell, with predictions that differ between cells."""
    result, arrays = {"core_seconds": 36.0}, {}
    if not cell.reference:
        result["validation_top1"] = float(accuracy(cell))
    if cell.kind != "search":
        rng = np.random.default_rng(zlib.crc32(cell.name.encode()))
        share = 0.1 if cell.reference else 1 - accuracy(cell)
        wrong = rng.random(IMAGES) < share
        predictions = np.where(wrong, (LABELS + 1) % 10, LABELS)
        top1 = float(np.mean(predictions == LABELS))
        result |= {"linear_top1": top1, "knn_top1": top1, "ten_shot_top1": top1 - 0.1}
        arrays = {"linear": predictions, "knn": predictions, "labels": LABELS}
    sweep.results.write(cell, result | more, arrays)


def finish_all(sweep, **options):
    """Writes results until none is missing; returns the cells of each round."""
    rounds = []
    while missing := missing_cells(sweep):
        rounds.append(missing)
        for cell in missing:
            finish(sweep, cell, **options)
    return rounds
