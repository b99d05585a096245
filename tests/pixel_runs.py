"""Runs whose network is a linear map of the pixels, which compiles quickly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from listed_records import list_source
from small_runs import small_config
from tfds_sets import IMAGES, LABELS, png

from music_jax.data.datasets import EvaluationSources
from music_jax.data.skipped import SkippedImages
from music_jax.distributed.mesh import make_data_mesh
from music_jax.evaluation.run import Run

SIDE = 8


@dataclasses.dataclass(frozen=True)
class LinearNetwork:
    """Features are the pixels times `scale`, embeddings the features times `head`."""

    num_features: int = SIDE * SIDE
    num_embedding: int = 30

    def features(self, params, batch_stats, images):
        return images.reshape(images.shape[0], -1) * params["scale"][None]

    def infer(self, params, batch_stats, images):
        features = self.features(params, batch_stats, images)
        return features, features @ params["head"]

    def train_features(self, params, batch_stats, images, key):
        return self.features(params, batch_stats, images), batch_stats


def pixel_config():
    """Of digits of 8 pixels that are seen whole, in 6 segments of 5 units."""
    config = small_config()
    config.crop.update(
        {"size": SIDE, "eval_resize": SIDE, "scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}
    )
    config.evaluation.update({"view_images": 16, "num_views": 2})
    config.few_shot.update({"shots": (1, 2), "draws": 2})
    config.linear_eval.update(
        {"num_epochs": 3, "batch_size": 16, "base_learning_rates": (0.1, 1.0)}
    )
    config.finetune.update({"num_epochs": 2, "batch_size": 16})
    config.semi_supervised.update({"num_epochs": 2, "batch_size": 16, "fractions": (0.2,)})
    return config


def digits_source(name, rows, *, unlabeled=(), num_classes=10):
    """Digits by their index, some of them without a label."""
    records = [
        {"image": png(IMAGES[i]), "label": -1 if i in unlabeled else int(LABELS[i])} for i in rows
    ]
    names = tuple(map(str, range(num_classes)))
    return list_source(name, records, num_classes, names)


def pixel_run(directory, train, test, config=None):
    """A run that learns from one source and is tested on another."""
    rng = np.random.Generator(np.random.Philox(key=0))
    config = config or pixel_config()
    size = config.objective.num_segments * config.objective.units_per_segment
    head = rng.standard_normal((SIDE * SIDE, size), np.float32)
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return Run(
        config=config,
        workdir=directory,
        sources=EvaluationSources(train, test),
        images=test,
        network=LinearNetwork(),
        params=jax.tree.map(jnp.asarray, {"scale": np.ones(SIDE * SIDE, np.float32), "head": head}),
        batch_stats={},
        step=3,
        mesh=make_data_mesh(),
        skipped=SkippedImages(directory, max_share=0.5),
    )
