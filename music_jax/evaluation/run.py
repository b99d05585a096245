"""A run under evaluation: its network, its images, and the features computed from both."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax.checkpoint.manager import restore_network
from music_jax.config import FREE_FIELDS, from_json, is_free, validate
from music_jax.data import datasets
from music_jax.data.datasets import EvaluationSources
from music_jax.data.labels import lacks_label
from music_jax.data.skipped import SkippedImages, UnlistedImages, open_skipped
from music_jax.data.sources import Source
from music_jax.distributed.mesh import from_main_process, make_data_mesh
from music_jax.errors import NonFiniteError, NotMeasurableError, UserError
from music_jax.evaluation.features import (
    Arrays,
    Expected,
    FrozenNetwork,
    Model,
    SplitFeatures,
    cached_arrays,
)
from music_jax.objectives import segment_probabilities
from music_jax.workdir.directory import find_workdir, open_workdir
from music_jax.workdir.run_config import (
    DATA_FIELDS,
    as_json,
    exclude_foreign_data,
    is_signed,
    read_config,
    read_signature,
)

Split = Literal["train", "test"]

# Fields of `config.backbone` that features do not depend on.
_TRAINING_FIELDS = ("init_from", "frozen_stages")
_PROBABILITIES_AT_ONCE = 4096  # samples
_NO_IMAGES = Source("no images", 0, lambda index: {})


def agreed_fingerprint(source: Source) -> str:
    """Returns the fingerprint of a source on the main process, for all processes.

    All processes of a run call this together; other processes may have other copies of the files.
    """
    return from_main_process(lambda: source.fingerprint(times=True))


@dataclasses.dataclass(frozen=True)
class Run(FrozenNetwork):
    """The network of a run after some step, with the images that it is evaluated on.

    Features are kept in memory and, except for raw pixels, cached in the output directory. See
    `extractor` for the argument `model` of the methods.

    Attributes:
      workdir: Directory for results: that of the run, or another one.
      sources: Training and test images with labels; None if there are none.
      images: Images for metrics without labels: the test images, or else the training images.
      step: Step of the checkpoint.
      why_no_sources: Reason why there are no `sources`.
    """

    workdir: epath.Path
    sources: EvaluationSources | None
    images: Source
    step: int
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

        For protocols that read the images themselves and need not hold the features of a split.
        Images of damaged records are included: they are skipped when they are read.

        Raises:
          NotMeasurableError: See `train`.
        """
        source = getattr(self.evaluation_sources(), split)
        labels = self._memoize("labels", source, source.labels)
        _check_classes(source, labels, split)
        return np.flatnonzero(~lacks_label(labels))

    def unlabeled(self) -> SplitFeatures:
        """Returns `features` and `embeddings` of all `images`, with or without a label."""
        return self._split(self.images, "trained")

    def views(self) -> Arrays:
        """Returns `features` and `embeddings` of some `images`, [images, views, ...].

        Raises:
          UserError: A feature is not finite.
        """
        evaluation = self.config.evaluation

        def compute() -> Arrays:
            return self.extract_views(
                self.images,
                num_images=evaluation.view_images,
                num_views=evaluation.num_views,
                description=f"views of {self.images.name}",
            )

        key = self._key(self.images, "trained") | {
            "crop": as_json(self.config.crop),
            "augmentation": as_json(self.config.augmentation),
            "view_images": evaluation.view_images,
            "views": evaluation.num_views,
            "seed": self.config.seed,
        }
        expected = self._expected(len(self.images), evaluation.num_views)
        return self._cached("views", self.images, key, expected, compute)

    def probabilities(self) -> np.ndarray:
        """Returns the segments' probabilities of all `images`, [images, segments, units]."""
        objective = self.config.objective
        embeddings = self.unlabeled().arrays["embeddings"]
        options = {"num_segments": objective.num_segments, "temperature": objective.temperature}
        convert = jax.jit(functools.partial(segment_probabilities, **options))
        blocks = np.array_split(embeddings, len(embeddings) // _PROBABILITIES_AT_ONCE + 1)
        return np.concatenate([np.asarray(convert(block)) for block in blocks])

    def count_unlabeled(self, splits: tuple[Split, ...]) -> dict[str, Any]:
        """Returns the entry `without_label` of a result, which is missing if all have labels."""
        counts = {}
        for split in splits:
            source = getattr(self.evaluation_sources(), split)
            _, labels = self._memory.get(("labels", id(source)), (None, None))
            labels = self._split(source, "trained").labels if labels is None else labels
            counts[split] = int(np.sum(lacks_label(labels)))
        return {"without_label": counts} if any(counts.values()) else {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.evaluation_sources().train.num_classes

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.evaluation_sources().train.multi_label

    def evaluation_sources(self) -> EvaluationSources:
        """Returns the labeled training and test images.

        Raises:
          NotMeasurableError: There are none.
        """
        if self.sources is None:
            raise NotMeasurableError(self.why_no_sources)
        return self.sources

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
            extractor = self.extractor(model, embeddings=embeddings)
            description = f"features of {source.name}, {model.replace('_', ' ')}"
            found = self.extract(extractor, source, description)
            return found.arrays | {"labels": found.labels, "indices": found.indices}

        if model == "raw_pixels":
            arrays = dict(self._memoize(model, source, compute))
        else:
            size = len(source)
            none = source.no_labels(1)
            highest = 1 if source.multi_label else max(source.num_classes - 1, 0)
            expected = self._expected(size) | {
                "labels": Expected((size, *none.shape[1:]), none.dtype, range(-1, highest + 1)),
                "indices": Expected((size,), np.int64, range(size)),
            }
            if not embeddings:
                del expected["embeddings"]
            key = self._key(source, model) | {"embeddings": embeddings}
            arrays = dict(self._cached(model, source, key, expected, compute))
        labels, indices = arrays.pop("labels"), arrays.pop("indices")
        return SplitFeatures(arrays, labels, indices)

    def _expected(self, *shape: int) -> dict[str, Expected]:
        return {
            "features": Expected((*shape, self.network.num_features), np.float32),
            "embeddings": Expected((*shape, self.network.num_embedding), np.float32),
        }

    def _key(self, source: Source, model: Model) -> dict[str, Any]:
        """Returns everything that features depend on."""
        config = as_json(self.config)
        fingerprint = self._memoize("fingerprint", source, lambda: agreed_fingerprint(source))
        return {
            "network": model,
            "step": self.step,
            "weights": self.weights_checksum,
            "images": fingerprint,
            "classes": source.class_names,
            "view": [config["crop"]["size"], config["crop"]["eval_resize"]],
            "pixels": [config["dataset"][name] for name in ("num_channels", "mean", "std")],
            "compute_dtype": config["compute_dtype"],
            "backbone": {k: x for k, x in config["backbone"].items() if k not in _TRAINING_FIELDS},
            "seed": config["seed"] if model == "random_init" else None,
        }

    @functools.cached_property
    def weights_checksum(self) -> int:
        """Checksum of the trained network, so that nothing of another run is ever used."""
        checksum = 0
        for leaf in jax.tree.leaves(self.replicate((self.params, self.batch_stats))):
            checksum = zlib.crc32(np.asarray(leaf.addressable_data(0)).tobytes(), checksum)
        return checksum

    def _cached(
        self,
        name: str,
        source: Source,
        key: dict[str, Any],
        expected: dict[str, Expected],
        compute: Callable[[], Arrays],
    ) -> Arrays:
        """Returns arrays from memory or from the cache on disk, or computes them."""

        def read_or_compute() -> Arrays:
            directory, file = self.workdir / "features", f"step_{self.step}-{name}"
            arrays = cached_arrays(directory, file, key, compute, expected=expected)
            if not all(np.all(np.isfinite(array)) for array in arrays.values()):
                raise NonFiniteError(
                    f"some features of {source.name} are not finite: the network has diverged; "
                    "evaluate an earlier checkpoint with --checkpoint=STEP"
                )
            return arrays

        return self._memoize(name, source, read_or_compute)

    def _memoize(self, name: str, source: Source, compute: Callable[[], Any]) -> Any:
        """Computes something of a source once; the source is kept, so that its id stays unique."""
        key = name, id(source)
        if key not in self._memory:
            self._memory[key] = source, compute()
        return self._memory[key][1]


def _check_classes(source: Source, labels: np.ndarray, split: Split) -> None:
    if source.multi_label:
        if not np.any(labels == 1):
            raise NotMeasurableError(
                f"none of the images of {source.name} that can be decoded has a class"
            )
        return
    classes, needed = len(np.unique(labels[labels >= 0])), 2 if split == "train" else 1
    if classes < needed:
        raise NotMeasurableError(
            f"the images of {source.name} that can be decoded have labels of {classes} classes; at "
            f"least {needed} are needed"
        )


def load_run(
    workdir: str,
    *,
    output: str | None = None,
    read_only: bool = False,
    checkpoint: str | int | None = None,
    overrides: dict[str, object] | None = None,
    labels: bool = True,
    images: bool = True,
) -> Run:
    """Loads a checkpoint of a run, and opens the images that it is evaluated on.

    Only images that are needed have to exist: the training images are opened if `evaluation.test`
    or, for labels, `evaluation.train` names no others.

    Args:
      workdir: Workdir of the run. Nothing is written into it if `output` is given.
      output: Directory for results; the workdir by default.
      read_only: Whether to write nothing at all, not even the list of images that cannot be
        decoded.
      checkpoint: Step or directory of the checkpoint; the latest by default.
      overrides: Config fields, by dotted name, that replace those of the run.
      labels: Whether to open labeled images, if there are any.
      images: Whether to open any images of the run.

    Raises:
      UserError: There is no such run or checkpoint, an override would change the training, or the
        images are in a location that only the run's files name; see `music_jax.workdir.run_config`.
    """
    given = overrides or {}
    directory = find_workdir(workdir)
    config, own = config_of_run(directory, given)
    if not own:
        exclude_foreign_data(config, given, workdir, labels=labels, images=images)
    if read_only:
        results = directory
        skipped: SkippedImages = UnlistedImages(directory, max_share=1.0)
    else:
        try:
            results = open_workdir(output or workdir, create=bool(output))
        except UserError as error:
            raise UserError(f"{error}; or name another directory with --output=DIR") from error
        skipped = open_skipped(results, config)
    sources, found, reason = None, _NO_IMAGES, Run.why_no_sources
    if images:
        datasets.prepare(config, given)
        if labels:
            try:
                sources = datasets.evaluation_sources(config)
            except NotMeasurableError as error:
                reason = str(error)
        found = sources.test if sources else datasets.evaluation_images(config)
    mesh = make_data_mesh()
    return Run(
        config=config,
        workdir=results,
        sources=sources,
        images=found,
        mesh=mesh,
        skipped=skipped,
        why_no_sources=reason,
        **restore_network(directory, config, checkpoint, mesh)._asdict(),
    )


def config_of_run(
    workdir: epath.Path, overrides: dict[str, object]
) -> tuple[config_dict.ConfigDict, bool]:
    """Reads the config of a run, replaces some of its fields, and checks it.

    Returns:
      The config, and whether this user's own `main` wrote the config of the run.

    Raises:
      UserError: There is no such run, an override would change the training, or a value is wrong.
    """
    saved = read_config(workdir)
    if saved is None:  # removed in the meantime
        raise UserError(f"{workdir} holds no run: it has no config.json")
    config = from_json(saved)
    own = is_signed(config, read_signature(workdir))
    _override(config, overrides)
    validate(config, training=False)
    return config, own


def _override(config: config_dict.ConfigDict, overrides: dict[str, object]) -> None:
    for field, value in overrides.items():
        if field == "dataset.path":  # the training images may have been moved
            if not config.dataset.path:
                raise UserError(
                    "config.dataset.path applies to runs trained on a folder; this one was trained "
                    f"on {config.dataset.name}: use config.dataset.data_dir"
                )
        elif not is_free(field) and field not in DATA_FIELDS:
            raise UserError(
                f"config.{field} cannot change after training; use one of "
                f"{', '.join((*DATA_FIELDS[:2], *FREE_FIELDS))}"
            )
        config.update_from_flattened_dict({field: value})
