"""A run that is to be evaluated: its network, its images, and what was computed from both."""

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
from music_jax.evaluation.cache import ArrayCache, Expected, content_bytes
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

_PROBABILITIES_AT_ONCE = 4096  # samples


def agreed_fingerprint(source: Source) -> str:
    """Returns the fingerprint of a source on the main process, whose files may be other copies.

    All processes of a run call this together.
    """
    return from_main_process(lambda: source.fingerprint(times=True))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's network after some step, and the images that it is evaluated with.

    What is computed from them is kept in memory and, but for raw pixels, in the output directory.

    Attributes:
      config: the run's.
      workdir: Directory that results go to; the run's, or another one.
      sources: Images to learn from and to test on, some of which have labels, or None.
      images: what label-free measures are taken on: the test images if there are any, else those of
        the training.
      network: the network.
      params: its trained parameters.
      batch_stats: its trained statistics.
      step: of the checkpoint that they come from.
      mesh: the devices.
      skipped: takes note of images that cannot be decoded, which count in no figure.
      why_not: why there are no `sources`.
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
    why_not: str = "there are no labeled images"

    def train(self, of: str = "trained") -> SplitFeatures:
        """Features of the labeled training images.

        Args:
          of: `trained`, `random_init` (the backbone before the training) or `raw_pixels`.

        Raises:
          NotMeasurableError: the images do not have labels of two classes.
          UserError: a feature is not finite.
        """
        return self._labeled(self.evaluation_sources().train, of, classes=2)

    def test(self, of: str = "trained") -> SplitFeatures:
        """Features of the labeled test images; arguments and errors as `train`."""
        return self._labeled(self.evaluation_sources().test, of, classes=1)

    def labeled_rows(self, split: Literal["train", "test"]) -> np.ndarray:
        """Indices of the images of a split that have a label, ascending; all labels are read once.

        Features bring their labels along, so that only what reads the images themselves needs this.
        An image whose record is damaged is among them: it is skipped, and noted, when it is read.

        Raises:
          NotMeasurableError: as `train` and `test`.
        """
        source = getattr(self.evaluation_sources(), split)
        key = ("labels", id(source))
        if key not in self._memory:
            self._memory[key] = {"labels": source.labels()}
        labels = self._memory[key]["labels"]
        _check_classes(source, labels, 2 if split == "train" else 1)
        return np.flatnonzero(labels != -1)

    def unlabeled(self) -> SplitFeatures:
        """`features` and `embeddings` of all `images`, whether they have a label or not."""
        return self._split(self.images, "trained")

    def views(self) -> Arrays:
        """`features` and `embeddings` [images, views, ...] of several views of some `images`.

        Raises:
          UserError: one of them is not finite.
        """
        found = self._once(
            ("views",),
            f"step_{self.step}-views",
            self._key(self.images, "trained")
            | {
                "crop": as_json(self.config.crop),
                "augmentation": as_json(self.config.augmentation),
                "view_images": self.config.evaluation.view_images,
                "views": self.config.evaluation.num_views,
                "seed": self.config.seed,
            },
            lambda: extract_views(
                self.network,
                self.params,
                self.batch_stats,
                self.images,
                self.config,
                self.mesh,
                skipped=self.skipped,
                description=f"views of {self.images.name}",
            ),
            self._expected_floats(len(self.images), self.config.evaluation.num_views),
        )
        _check_finite(found, f"views of {self.images.name}")
        return found

    def probabilities(self) -> np.ndarray:
        """The segments' probabilities for all `images`, float32 [images, segments, units]."""
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
        parts = [convert(embeddings[start : start + _PROBABILITIES_AT_ONCE]) for start in starts]
        return np.concatenate([np.asarray(part) for part in parts])

    def without_label(self, *splits: Literal["train", "test"]) -> dict[str, Any]:
        """How many images of each split were left out for want of a label, as figures.

        Returns:
          `without_label`, a number for each split; nothing if there are no such images.
        """
        counts = {}
        for split in splits:
            source = getattr(self.evaluation_sources(), split)
            if ("labels", id(source)) in self._memory:
                counts[split] = len(source) - len(self.labeled_rows(split))
            else:
                counts[split] = self._split(source, "trained").labeled().without_label
        return {"without_label": counts} if any(counts.values()) else {}

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return self.evaluation_sources().train.num_classes

    def evaluation_sources(self) -> EvaluationSources:
        """The images to learn from and to test on.

        Raises:
          NotMeasurableError: there are none with labels.
        """
        if self.sources is None:
            raise NotMeasurableError(self.why_not)
        return self.sources

    def _labeled(self, source: Source, of: str, *, classes: int) -> SplitFeatures:
        found = self._split(source, of).labeled()
        _check_classes(source, found.labels, classes)
        return found

    def _split(self, source: Source, of: str) -> SplitFeatures:
        # The training images' embeddings, which nothing needs, can be 40 GB.
        training = self.sources is not None and source is self.sources.train
        embeddings = of == "trained" and (source is self.images or not training)

        def compute() -> Arrays:
            found = extract_split(
                self.extractor(of, embeddings=embeddings),
                source,
                self.config,
                self.mesh,
                skipped=self.skipped,
                description=f"features of {source.name}, {of.replace('_', ' ')}",
            )
            return found.arrays | {"labels": found.labels, "indices": found.indices}

        expected = self._expected_floats(len(source)) | {
            "labels": Expected((len(source),), np.int32, range(-1, max(source.num_classes, 1))),
            "indices": Expected((len(source),), np.int64, range(len(source))),
        }
        if not embeddings:
            del expected["embeddings"]
        arrays = self._once(
            (id(source), of),
            f"step_{self.step}-{of}",
            self._key(source, of) | {"embeddings": embeddings},
            compute,
            expected,
            on_disk=of != "raw_pixels",
        )
        arrays = dict(arrays)
        labels, indices = arrays.pop("labels"), arrays.pop("indices")
        _check_finite(arrays, source.name)
        return SplitFeatures(arrays, labels, indices)

    def _expected_floats(self, *shape: int) -> dict[str, Expected]:
        return {
            "features": Expected((*shape, self.network.num_features), np.float32),
            "embeddings": Expected((*shape, self.network.num_embedding), np.float32),
        }

    def extractor(self, of: str, *, embeddings: bool = False) -> Extractor:
        """What computes features from images; for `of`, see `train`."""
        if of == "raw_pixels":
            return pixel_extractor(self.config)
        params, batch_stats = self.params, self.batch_stats
        if of == "random_init":
            initial = jax.jit(
                functools.partial(init_network, self.config),
                compiler_options=INIT_COMPILER_OPTIONS,
            )
            params, batch_stats = initial(jax.random.key(self.config.seed))
        return backbone_extractor(
            self.network, params, batch_stats, self.config, self.mesh, embeddings=embeddings
        )

    def _key(self, source: Source, of: str) -> dict[str, Any]:
        """Returns all that features depend on."""
        config = as_json(self.config)
        return {
            "network": of,
            "step": self.step,
            "weights": self._weights,
            "images": self._fingerprint(source),
            "classes": source.class_names,
            "view": [config["crop"]["size"], config["crop"]["eval_resize"]],
            "pixels": [config["dataset"][name] for name in ("num_channels", "mean", "std")],
            "compute_dtype": config["compute_dtype"],
            "backbone": config["backbone"],
            "seed": config["seed"] if of == "random_init" else None,
        }

    def _fingerprint(self, source: Source) -> str:
        if id(source) not in self._fingerprints:
            self._fingerprints[id(source)] = source, agreed_fingerprint(source)
        return self._fingerprints[id(source)][1]

    @functools.cached_property
    def _fingerprints(self) -> dict[int, tuple[Source, str]]:
        return {}  # each with its source, so that no other one gets its id

    @functools.cached_property
    def _memory(self) -> dict[tuple, Arrays]:
        return {}

    @functools.cached_property
    def _weights(self) -> int:
        """Checksum of the trained network, so that another run's features are never taken."""
        whole = replicate((self.params, self.batch_stats), self.mesh)
        checksum = 0
        for leaf in jax.tree.leaves(whole):
            content = content_bytes(np.asarray(leaf.addressable_data(0)))
            checksum = zlib.crc32(content, checksum)
        return checksum

    def _once(
        self,
        memory_key: tuple,
        name: str,
        key: dict[str, Any],
        compute: Callable[[], Arrays],
        expected: dict[str, Expected],
        *,
        on_disk: bool = True,
    ) -> Arrays:
        if memory_key not in self._memory:
            cache = ArrayCache(self.workdir / "features")
            self._memory[memory_key] = (
                cache.get(name, key, compute, expected=expected) if on_disk else compute()
            )
        return self._memory[memory_key]


def _check_classes(source: Source, labels: np.ndarray, least: int) -> None:
    classes = len(np.unique(labels[labels >= 0]))
    if classes < least:
        raise NotMeasurableError(
            f"the images of {source.name} that can be decoded have labels of {classes} classes; at "
            f"least {least} are needed"
        )


def _check_finite(arrays: Arrays, images: str) -> None:
    if not all(np.all(np.isfinite(array)) for array in arrays.values()):
        raise UserError(
            f"some features of {images} are not finite: the network has diverged; evaluate an "
            "earlier checkpoint with --checkpoint=STEP"
        )
