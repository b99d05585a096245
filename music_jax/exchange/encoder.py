"""Loads a trained backbone, and maps images to features with it."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax import registry
from music_jax.checkpoint.manager import restore_network
from music_jax.config import from_json, validate
from music_jax.data.arrays import to_pixels
from music_jax.data.augment import normalize_images
from music_jax.data.crops import center_crop, central_view
from music_jax.data.decode import EncodedImage
from music_jax.distributed import usable_cores
from music_jax.distributed.mesh import Placing, make_data_mesh
from music_jax.errors import UndecodableError, UserError
from music_jax.exchange.weights import (
    Tensors,
    check_shapes,
    from_torch,
    nested,
    read_safetensors,
    tensors_by_name,
)
from music_jax.models.network import FrozenBackbone, Network, make_frozen_backbone
from music_jax.objectives import segment_codes, segment_probabilities
from music_jax.workdir.directory import find_workdir
from music_jax.workdir.files import parse_json
from music_jax.workdir.run_config import read_config

METADATA_KEY = "music_jax"  # key of the description in the metadata of a safetensors file

# An array [height, width] or [height, width, channels], or an image file.
Image = np.ndarray | str | os.PathLike[str]

# Optional output besides the features; both need the projection head.
SegmentOutput = Literal["codes", "probabilities"] | None

NO_CODES = (
    "the projection head of a run with the objective music; exported backbones and other "
    "objectives have none"
)
_MAX_CROPS = 1024  # in memory at once


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedBackbone:
    """The weights of a backbone, in float32, and its config.

    Attributes:
      config: Config of the run; for a backbone from a file, only the fields of `description`.
      step: Step of the checkpoint.
      tensors: Parameters and running statistics by dotted name, such as `blocks.0.norm1.mean`.
      network: Backbone with its projection head, or None if there are no weights for the head.
      params: Parameters of the network, or None.
      batch_stats: Running statistics of the network, or None.
    """

    config: config_dict.ConfigDict
    step: int
    tensors: Tensors
    network: Network | None = None
    params: Any = None
    batch_stats: Any = None

    @property
    def pixel_type(self) -> str:
        """Type of the images' values: uint8, uint16 or float32."""
        return self.config.dataset.pixel_type

    @functools.cached_property
    def backbone(self) -> FrozenBackbone:
        """The backbone as a function of its weights."""
        return make_frozen_backbone(self.config)

    def backbone_arrays(self) -> tuple[Any, Any]:
        """Returns the parameters and the running statistics as nested dictionaries."""
        backbone = self.backbone
        return nested(self.tensors, backbone.params), nested(self.tensors, backbone.batch_stats)

    def description(self) -> dict[str, Any]:
        """Returns the metadata that a file needs besides the tensors to be loaded, as JSON."""
        config = self.config
        fields = ("name", "stem", "num_heads")
        backbone = {k: x for k in fields if (x := config.backbone[k]) is not None}
        backbone |= {"options": x} if (x := registry.options(config.backbone)) else {}
        return {
            "version": 1,
            "step": self.step,
            "num_features": self.backbone.num_features,
            "config": {
                "backbone": backbone,
                "crop": {"size": config.crop.size, "eval_resize": config.crop.eval_resize},
                "dataset": {
                    "num_channels": config.dataset.num_channels,
                    "mean": list(config.dataset.mean),
                    "std": list(config.dataset.std),
                    # Files of earlier versions have none, and uint8 images.
                    **({"pixel_type": self.pixel_type} if self.pixel_type != "uint8" else {}),
                },
            },
        }

    def encode(
        self, arrays: tuple[Any, Any], images: jax.Array, *, extra: SegmentOutput = None
    ) -> tuple[jax.Array, jax.Array]:
        """Computes features, and optionally codes or probabilities, as a pure function.

        Args:
          arrays: Parameters and running statistics of the network, or of the backbone if there is
            no network.
          images: Images [batch, size, size, channels] of the pixel type.
          extra: Output to compute besides the features.

        Returns:
          The same as `Encoder.encode_crops`.
        """
        dataset, objective = self.config.dataset, self.config.objective
        images = normalize_images(images, mean=tuple(dataset.mean), std=tuple(dataset.std))
        empty = jnp.zeros((images.shape[0], 0), jnp.int32)
        if self.network is None:
            return self.backbone.features(*arrays, images), empty
        features, embeddings = self.network.infer(*arrays, images)
        if extra is None:
            return features, empty
        if extra == "codes":
            return features, segment_codes(embeddings, num_segments=objective.num_segments)
        return features, segment_probabilities(
            embeddings, num_segments=objective.num_segments, temperature=objective.temperature
        )


def load_backbone(path: str, *, checkpoint: str | int | None = None) -> TrainedBackbone:
    """Loads a backbone from a run's workdir or from an exported safetensors file.

    Args:
      path: Workdir or file.
      checkpoint: Step or directory of a checkpoint in the workdir; None for the latest valid one.

    Raises:
      UserError: There is no workdir or file, or it cannot be read.
    """
    location = epath.Path(path).expanduser()
    if location.is_dir():
        return _load_run(path, checkpoint)
    if not location.exists():
        raise UserError(f"there is neither a workdir nor a file {path!r}")
    if checkpoint is not None:
        raise UserError(f"{path} is a file and has no checkpoints; omit --checkpoint")
    return _load_file(location)


def _load_run(path: str, checkpoint: str | int | None) -> TrainedBackbone:
    workdir = find_workdir(path)
    config = _inference_config(read_config(workdir))
    step, network, *variables = restore_network(workdir, config, checkpoint, make_data_mesh())
    params, batch_stats = jax.device_get(variables)
    tensors = tensors_by_name(params["backbone"], batch_stats.get("backbone", {}))
    return TrainedBackbone(config, step, tensors, network, params, batch_stats)


def _load_file(path: epath.Path) -> TrainedBackbone:
    tensors, metadata = read_safetensors(path)
    try:
        described = parse_json(metadata[METADATA_KEY])
        step, layout = int(described["step"]), described["layout"]
        if layout not in ("music_jax", "torchvision"):
            raise ValueError("its description is from another version")
        config = _inference_config(described["config"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} was not exported by music_jax.export ({type(error).__name__}: {error}); "
            "import weights from elsewhere with python -m music_jax.import_weights"
        ) from error
    if layout == "torchvision":
        return TrainedBackbone(config, step, from_torch(config, tensors, str(path)))
    trained = TrainedBackbone(config, step, tensors)
    expected = tensors_by_name(trained.backbone.params, trained.backbone.batch_stats)
    check_shapes(tensors, {name: x.shape for name, x in expected.items()}, str(path))
    return trained


def _inference_config(saved: Any) -> config_dict.ConfigDict:
    config = from_json(saved)
    config.compute_dtype = "float32"
    validate(config, training=False)
    return config


class Encoder:
    """Maps images to features: a trained backbone in inference mode, in float32.

    Images are preprocessed as for the evaluation: the shorter side is resized, the central square
    is cropped, and the values are normalized.

    Attributes:
      trained: Backbone.
      num_features: Number of features.
      size: Side of the central square, in pixels.
      resize_shorter_side: Length that an image's shorter side is resized to first, in pixels.
      channels: Number of channels.
      pixel_type: Type of the images' values.
      batch_size: Number of images that are processed at once.
    """

    def __init__(self, trained: TrainedBackbone, *, batch_size: int = 128):
        """Puts the weights on the devices.

        Args:
          trained: Backbone.
          batch_size: Number of images to process at once; rounded up to a multiple of the number of
            devices.
        """
        config = trained.config
        self.trained = trained
        self.num_features = trained.backbone.num_features
        self.size = config.crop.size
        self.resize_shorter_side = config.crop.eval_resize
        self.channels = config.dataset.num_channels
        self.pixel_type = trained.pixel_type
        self._mesh = make_data_mesh()
        self.batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        arrays = (trained.params, trained.batch_stats)
        if trained.network is None:
            arrays = trained.backbone_arrays()
        replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._arrays = jax.device_put(arrays, replicated)
        self._encode = jax.jit(trained.encode, static_argnames=("extra",))

    def __repr__(self) -> str:
        images = f"{self.pixel_type} [images, height, width, {self.channels}]"
        name = self.trained.config.backbone.name
        return f"Encoder({name}: {images} -> float32 [images, {self.num_features}])"

    @property
    def has_codes(self) -> bool:
        """Whether there is a projection head whose embedding has segments."""
        trained = self.trained
        return trained.network is not None and trained.config.objective.name == "music"

    def __call__(self, images: np.ndarray | Sequence[Image]) -> np.ndarray:
        """Computes features.

        Args:
          images: Images [images, height, width, channels] of the pixel type, or a sequence of
            images, each an array of any size or the path of a file.

        Returns:
          float32 [images, features].

        Raises:
          ValueError: An array has another type or does not have the shape of an image.
          UserError: A file cannot be read.
        """
        return self._run(images)[0]

    def codes(self, images: np.ndarray | Sequence[Image]) -> np.ndarray:
        """Computes discrete codes, the most probable unit of each segment.

        Args:
          images: Same as for `__call__`.

        Returns:
          int32 [images, segments].

        Raises:
          ValueError: See `__call__`.
          UserError: A file cannot be read, or there is no projection head with segments.
        """
        return self._run(images, "codes")[1]

    def probabilities(self, images: np.ndarray | Sequence[Image]) -> np.ndarray:
        """Computes the probability of each unit in its segment.

        Args:
          images: Same as for `__call__`.

        Returns:
          float32 [images, segments, units]; each unit axis sums to 1.

        Raises:
          ValueError: See `__call__`.
          UserError: See `codes`.
        """
        return self._run(images, "probabilities")[1]

    def _run(
        self, images: np.ndarray | Sequence[Image], extra: SegmentOutput = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise ValueError(
                "images must be [images, height, width, channels] or a list of single images; got "
                f"an array of shape {images.shape}"
            )
        if isinstance(images, str | os.PathLike):
            raise ValueError(f"images must be a list, such as [{os.fspath(images)!r}]; got a path")
        with ThreadPoolExecutor(usable_cores()) as pool:
            starts = range(0, len(images), _MAX_CROPS)
            parts = (pool.map(self._crop, images[i : i + _MAX_CROPS]) for i in starts)
            return self.encode_crops(itertools.chain.from_iterable(parts), extra)

    def encode_crops(
        self, crops: Iterable[np.ndarray], extra: SegmentOutput = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Computes features, and optionally codes or probabilities, of cropped images.

        Args:
          crops: Images [size, size, channels] of the pixel type.
          extra: Output to compute besides the features.

        Returns:
          Features, float32 [images, features], and codes, int32 [images, segments], probabilities,
          float32 [images, segments, units], or an empty array, [images, 0].

        Raises:
          UserError: There are no segments.
        """
        if extra and not self.has_codes:
            raise UserError(f"{extra} need {NO_CODES}")
        crops, outputs = iter(crops), list[list[np.ndarray]]()
        # No crops are a batch too, whose outputs have the shapes and types.
        while (batch := list(itertools.islice(crops, self.batch_size))) or not outputs:
            # Padded to a power of two for each device, so that few programs are compiled.
            share = max(1, -(-len(batch) // self._mesh.size))
            rows = min(2 ** (share - 1).bit_length() * self._mesh.size, self.batch_size)
            padded = np.zeros((rows, self.size, self.size, self.channels), self.pixel_type)
            for i, crop in enumerate(batch):
                if crop.shape != padded.shape[1:]:
                    raise ValueError(f"expected crops {padded.shape[1:]}; got {crop.shape}")
                padded[i] = crop
            images = Placing(rows, self._mesh)(padded)
            found = self._encode(self._arrays, images, extra=extra)
            outputs.append([np.asarray(x)[: len(batch)] for x in found])
        features, extras = map(np.concatenate, zip(*outputs, strict=True))
        return features, extras

    def _crop(self, image: Image) -> np.ndarray:
        if isinstance(image, str | os.PathLike):
            try:
                with open(image, "rb") as file:
                    return self.crop_file(file.read())
            except (OSError, UndecodableError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"cannot read the image {os.fspath(image)!r}: {reason}") from error
        image = np.asarray(image)
        if self.pixel_type == "uint8" and image.dtype != np.uint8:
            raise ValueError(f"images must be uint8, with values from 0 to 255; got {image.dtype}")
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[2] != self.channels or 0 in image.shape:
            raise ValueError(
                f"images must be [height, width, {self.channels}] for this backbone; got an array "
                f"of shape {image.shape}"
            )
        try:
            image = to_pixels(image, self.channels, self.pixel_type)
        except UndecodableError as error:
            raise ValueError(f"an image cannot be used: {error}") from error
        return center_crop(image, self.size, self.resize_shorter_side)

    def crop_file(self, encoded: EncodedImage) -> np.ndarray:
        """Decodes the bytes of an image file and returns its central square.

        Returns:
          Image [size, size, channels] of the pixel type.

        Raises:
          UndecodableError: The bytes are not a valid image of a supported format.
        """
        return central_view(
            encoded,
            size=self.size,
            resize_shorter_side=self.resize_shorter_side,
            channels=self.channels,
            dtype=self.pixel_type,
        )
