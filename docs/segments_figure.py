"""Draws the images of some segments of a trained run: `segments.png` of the README.

    .venv/bin/python docs/segments_figure.py runs/mnist5k docs/segments.png

Each panel is one segment, each row one of its units, and each row shows the test images that the
segment assigns to the unit with the most certainty. The segments shown are the two that share the
most information with the labels, which the training never saw, and the one that shares the least.
"""

import sys

import jax
import matplotlib
import numpy as np
from etils import epath
from sklearn.metrics import normalized_mutual_info_score

from music_jax.checkpoint.manager import Checkpoints
from music_jax.config import from_json
from music_jax.data.augment import normalize_images
from music_jax.data.loader import evaluation_batches
from music_jax.data.tfds_source import open_split
from music_jax.distributed.mesh import make_data_mesh
from music_jax.objectives import segment_probabilities
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state, restore_state
from music_jax.workdir.run_config import read_config

matplotlib.use("agg")

import matplotlib.pyplot as plt

_IMAGES_A_ROW = 12
_UNITS_SHOWN = 8


def main(workdir: str, output: str) -> None:
    """Draws the figure."""
    directory = epath.Path(workdir).resolve()
    config = from_json(read_config(directory))
    recipe = make_recipe(config, steps_per_epoch=1)
    checkpoints = Checkpoints(directory, read_only=True)
    step = checkpoints.all_steps()[-1]
    state = restore_state(
        checkpoints, step, abstract_state(config, recipe.optimizer), make_data_mesh(1)
    )
    source = open_split(config.dataset, config.dataset.test_split)
    batch = next(
        evaluation_batches(
            source,
            size=config.crop.size,
            resize_shorter_side=config.crop.eval_resize,
            channels=config.dataset.num_channels,
            batch_size=len(source),
            positions=np.arange(len(source)),
        )
    )
    images, labels = batch["images"], batch["label"]
    inputs = normalize_images(
        images, mean=tuple(config.dataset.mean), std=tuple(config.dataset.std)
    )
    _, embeddings = jax.jit(recipe.network.infer)(state.params, state.batch_stats, inputs)
    probabilities = np.asarray(
        segment_probabilities(embeddings, num_segments=config.objective.num_segments)
    )
    information = [
        normalized_mutual_info_score(labels, probabilities[:, s].argmax(axis=1))
        for s in range(probabilities.shape[1])
    ]
    order = np.argsort(information)
    shown = (order[-1], order[-2], order[0])

    figure, axes = plt.subplots(1, len(shown), figsize=(13, 3.1), facecolor="white")
    for axis, segment in zip(axes, shown, strict=True):
        of_unit = probabilities[:, segment]
        used = np.argsort(-of_unit.sum(axis=0))[:_UNITS_SHOWN]
        rows = [
            np.concatenate(
                [images[i, ..., 0] for i in np.argsort(-of_unit[:, u])[:_IMAGES_A_ROW]], 1
            )
            for u in used
        ]
        axis.imshow(255 - np.concatenate(rows, 0), cmap="gray", vmin=0, vmax=255)
        side = images.shape[1]
        axis.set_yticks([side * (i + 0.5) for i in range(len(used))], [f"unit {u}" for u in used])
        axis.set_xticks([])
        axis.tick_params(length=0, labelsize=8)
        for line in range(1, len(used)):
            axis.axhline(line * side - 0.5, color="tab:blue", linewidth=0.8)
        axis.set_title(
            f"segment {segment}: information shared with the labels {information[segment]:.2f}",
            fontsize=10,
        )
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
