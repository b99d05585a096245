"""A run under evaluation: its network, its images, and the features computed from both."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.datasets import EvaluationSources
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import from_main_process
from music_jax.errors import NotMeasurableError, UserError
from music_jax.evaluation.cache import Expected, cached_arrays
from music_jax.evaluation.features import (
    Arrays,
    Extractor,
    SplitFeatures,
    backbone_extractor,
    extract_split,
    extract_views,
    pixel_extractor,
    replicate,
)
from music_jax.models.network import INIT_COMPILER_OPTIONS, Network, init_network
from music_jax.objectives import segment_probabilities
from music_jax.workdir.run_config import as_json

Model = Literal["trained", "random_init", "raw_pixels"]
Split = Literal["train", "test"]

_PROBABILITIES_AT_ONCE = 4096  # samples


def agreed_fingerprint(source: Source) -> str:
    """Returns the fingerprint of a source on the main process, for all processes.

    All processes of a run call this together; other processes may have other copies of the files.
    """
    return from_main_process(lambda: source.fingerprint(times=True))


@dataclasses.dataclass(frozen=True)
class Run:
    """The network of a run after some step, with the images that it is evaluated on.

    Features are kept in memory and, except for raw pixels, cached in the output directory. Methods
    with an argument `model` take `trained`, `random_init` (the backbone before training) or
    `raw_pixels` (the normalized pixels as features).

    Attributes:
      config: Config of the run.
      workdir: Directory for results: that of the run, or another one.
      sources: Training and test images with labels; None if there are none.
      images: Images for metrics without labels: the test images, or else the training images.
      network: Network.
      params: Trained parameters.
      batch_stats: Trained running statistics.
      step: Step of the checkpoint.
      mesh: Devices.
      skipped: Record of images that cannot be decoded, which no metric includes.
      why_no_sources: Reason why there are no `sources`.
    """

    config: config_dict.ConfigDict
    workdir: epath.Path
    sources: EvaluationSources | None
    images: Source
    network: Network
    params: dict
    batch_stats: dict
    step: int
    mesh: Mesh
    skipped: SkippedImages
    why_no_sources: str = "there are no labeled images"
    _memory: dict[tuple, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def train(self, model: Model = "trained") -> SplitFeatures:
        """Returns features of the labeled training images.

        Raises:
          NotMeasurableError: The images have labels of fewer than two classes.
          UserError: A feature is not finite.
        """
        return self._labeled("train", model)

    def test(self, model: Model = "trained") -> SplitFeatures:
        """Returns features of the labeled test images; raises the same errors as `train`."""
        return self._labeled("test", model)

    def labeled_rows(self, split: Split) -> np.ndarray:
        """Returns the indices of a split's labeled images, after reading all labels once.

        Only protocols that read the images themselves need this, since features come with labels.
        Images of damaged records are included: they are skipped when they are read.

        Raises:
          NotMeasurableError: See `train`.
        """
        source = getattr(self.evaluation_sources(), split)
        labels = self._memoize(("labels", id(source)), source.labels)
        _check_classes(source, labels, split)
        return np.flatnonzero(labels != -1)

    def unlabeled(self) -> SplitFeatures:
        """Returns `features` and `embeddings` of all `images`, with or without a label."""
        return self._split(self.images, "trained")

    def views(self) -> Arrays:
        """Returns `features` and `embeddings` of some `images`, [images, views, ...].

        Raises:
          UserError: A feature is not finite.
        """
        evaluation = self.config.evaluation
        key = self._key(self.images, "trained") | {
            "crop": as_json(self.config.crop),
            "augmentation": as_json(self.config.augmentation),
            "view_images": evaluation.view_images,
            "views": evaluation.num_views,
            "seed": self.config.seed,
        }

        def compute() -> Arrays:
            return extract_views(
                self.network,
                self.params,
                self.batch_stats,
                self.images,
                self.config,
                self.mesh,
                skipped=self.skipped,
                description=f"views of {self.images.name}",
            )

        def read_or_compute() -> Arrays:
            expected = self._expected(len(self.images), evaluation.num_views)
            name = f"step_{self.step}-views"
            return cached_arrays(self.workdir / "features", name, key, compute, expected=expected)

        views = self._memoize(("views",), read_or_compute)
        _check_finite(views, f"views of {self.images.name}")
        return views

    def probabilities(self) -> np.ndarray:
        """Returns the segments' probabilities of all `images`, [images, segments, units]."""
        objective = self.config.objective
        embeddings = self.unlabeled().arrays["embeddings"]
        convert = jax.jit(
            functools.partial(
                segment_probabilities,
                num_segments=objective.num_segments,
                temperature=objective.temperature,
            )
        )
        starts = range(0, len(embeddings), _PROBABILITIES_AT_ONCE)
        blocks = (embeddings[start : start + _PROBABILITIES_AT_ONCE] for start in starts)
        return np.concatenate([np.asarray(convert(block)) for block in blocks])

    def count_unlabeled(self, *splits: Split) -> dict[str, Any]:
        """Returns the entry `without_label` of a result, which is missing if all have labels."""
        counts = {}
        for split in splits:
            source = getattr(self.evaluation_sources(), split)
            labels = self._memory.get(("labels", id(source)))  # features need not exist
            labels = self._split(source, "trained").labels if labels is None else labels
            counts[split] = int(np.sum(labels < 0))
        return {"without_label": counts} if any(counts.values()) else {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.evaluation_sources().train.num_classes

    def evaluation_sources(self) -> EvaluationSources:
        """Returns the labeled training and test images.

        Raises:
          NotMeasurableError: There are none.
        """
        if self.sources is None:
            raise NotMeasurableError(self.why_no_sources)
        return self.sources

    def extractor(self, model: Model, *, embeddings: bool = False) -> Extractor:
        """Returns a function from images to features and, on request, embeddings."""
        if model == "raw_pixels":
            return pixel_extractor(self.config)
        params, batch_stats = self.params, self.batch_stats
        if model == "random_init":
            initial = jax.jit(
                functools.partial(init_network, self.config),
                compiler_options=INIT_COMPILER_OPTIONS,
            )
            params, batch_stats = initial(jax.random.key(self.config.seed))
        return backbone_extractor(
            self.network, params, batch_stats, self.config, self.mesh, embeddings=embeddings
        )

    def _labeled(self, split: Split, model: Model) -> SplitFeatures:
        source = getattr(self.evaluation_sources(), split)
        features = self._split(source, model).labeled()
        _check_classes(source, features.labels, split)
        return features

    def _split(self, source: Source, model: Model) -> SplitFeatures:
        # The embeddings of the training images are not needed, and can take 40 GB.
        training = self.sources is not None and source is self.sources.train
        embeddings = model == "trained" and (source is self.images or not training)

        def compute() -> Arrays:
            found = extract_split(
                self.extractor(model, embeddings=embeddings),
                source,
                self.config,
                self.mesh,
                skipped=self.skipped,
                description=f"features of {source.name}, {model.replace('_', ' ')}",
            )
            return found.arrays | {"labels": found.labels, "indices": found.indices}

        def read_or_compute() -> Arrays:
            if model == "raw_pixels":
                return compute()
            expected = self._expected(len(source)) | {
                "labels": Expected((len(source),), np.int32, range(-1, max(source.num_classes, 1))),
                "indices": Expected((len(source),), np.int64, range(len(source))),
            }
            if not embeddings:
                del expected["embeddings"]
            key = self._key(source, model) | {"embeddings": embeddings}
            name = f"step_{self.step}-{model}"
            return cached_arrays(self.workdir / "features", name, key, compute, expected=expected)

        arrays = dict(self._memoize(("features", id(source), model), read_or_compute))
        labels, indices = arrays.pop("labels"), arrays.pop("indices")
        _check_finite(arrays, source.name)
        return SplitFeatures(arrays, labels, indices)

    def _expected(self, *shape: int) -> dict[str, Expected]:
        return {
            "features": Expected((*shape, self.network.num_features), np.float32),
            "embeddings": Expected((*shape, self.network.num_embedding), np.float32),
        }

    def _key(self, source: Source, model: Model) -> dict[str, Any]:
        """Returns everything that features depend on."""
        config = as_json(self.config)
        _, fingerprint = self._memoize(  # cached with the source, so that its id stays unique
            ("fingerprint", id(source)), lambda: (source, agreed_fingerprint(source))
        )
        return {
            "network": model,
            "step": self.step,
            "weights": self._weights,
            "images": fingerprint,
            "classes": source.class_names,
            "view": [config["crop"]["size"], config["crop"]["eval_resize"]],
            "pixels": [config["dataset"][name] for name in ("num_channels", "mean", "std")],
            "compute_dtype": config["compute_dtype"],
            "backbone": config["backbone"],
            "seed": config["seed"] if model == "random_init" else None,
        }

    @functools.cached_property
    def _weights(self) -> int:
        """Checksum of the trained network, so that features of another run are never used."""
        replicated = replicate((self.params, self.batch_stats), self.mesh)
        checksum = 0
        for leaf in jax.tree.leaves(replicated):
            content = np.ascontiguousarray(leaf.addressable_data(0)).reshape(-1)
            checksum = zlib.crc32(content.view(np.uint8).data, checksum)
        return checksum

    def _memoize(self, key: tuple, compute: Callable[[], Any]) -> Any:
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]


def _check_classes(source: Source, labels: np.ndarray, split: Split) -> None:
    classes, needed = len(np.unique(labels[labels >= 0])), 2 if split == "train" else 1
    if classes < needed:
        raise NotMeasurableError(
            f"the images of {source.name} that can be decoded have labels of {classes} classes; at "
            f"least {needed} are needed"
        )


def _check_finite(arrays: Arrays, images: str) -> None:
    if not all(np.all(np.isfinite(array)) for array in arrays.values()):
        raise UserError(
            f"some features of {images} are not finite: the network has diverged; evaluate an "
            "earlier checkpoint with --checkpoint=STEP"
        )
