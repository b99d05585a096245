"""Maps images to features with a trained backbone."""

import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.data.augment import normalize_images
from music_jax.data.decode import center_crop, central_view
from music_jax.distributed import usable_cores
from music_jax.distributed.mesh import make_data_mesh, to_devices
from music_jax.errors import UndecodableError, UserError
from music_jax.exchange.backbone import TrainedBackbone
from music_jax.objectives import segment_codes, segment_probabilities

# An array [height, width] or [height, width, channels], or an image file.
Image = np.ndarray | str | os.PathLike[str]

# Optional output besides the features; both need the projection head.
SegmentOutput = Literal["codes", "probabilities"] | None

_MAX_CROPS = 1024  # in memory at once


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
        self._mesh = make_data_mesh()
        self.batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        if trained.network is None:
            arrays = trained.backbone_arrays()
        else:
            arrays = (trained.params, trained.batch_stats)
        replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._arrays = jax.device_put(arrays, replicated)
        self._encode = jax.jit(functools.partial(encode_crops, trained), static_argnames=("extra",))

    @property
    def has_codes(self) -> bool:
        """Whether there is a projection head whose embedding has segments."""
        trained = self.trained
        return trained.network is not None and trained.config.objective.name == "music"

    def __call__(self, images: np.ndarray | Sequence[Image]) -> np.ndarray:
        """Computes features.

        Args:
          images: uint8 [images, height, width, channels], or a sequence of images, each an array of
            any size or the path of a file.

        Returns:
          float32 [images, features].

        Raises:
          ValueError: An array is not uint8 or does not have the shape of an image.
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
        outputs = []
        with ThreadPoolExecutor(usable_cores()) as pool:
            for start in range(0, len(images), _MAX_CROPS):
                crops = pool.map(self._crop, images[start : start + _MAX_CROPS])
                while batch := list(itertools.islice(crops, self.batch_size)):
                    outputs.append(self.encode_crops(np.stack(batch), extra))
        if not outputs:
            blank = np.zeros((1, self.size, self.size, self.channels), np.uint8)
            features, extras = self.encode_crops(blank, extra)
            return features[:0], extras[:0]
        features, extras = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return features, extras

    def encode_crops(
        self, crops: np.ndarray, extra: SegmentOutput = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Computes features, and optionally codes or probabilities, of cropped images.

        Args:
          crops: uint8 [images, size, size, channels], at most `batch_size` images.
          extra: Output to compute besides the features.

        Returns:
          Features, float32 [images, features], and codes, int32 [images, segments], probabilities,
          float32 [images, segments, units], or an empty array, [images, 0].

        Raises:
          UserError: There are no segments.
        """
        if extra and not self.has_codes:
            raise UserError(
                f"{extra} need the projection head of a run with the objective music; exported "
                "backbones and other objectives have none"
            )
        # Padded to a power of two for each device, so that few programs are compiled.
        share = -(-len(crops) // self._mesh.size)
        rows = min(2 ** (share - 1).bit_length() * self._mesh.size, self.batch_size)
        padded = np.zeros((rows, *crops.shape[1:]), np.uint8)
        padded[: len(crops)] = crops
        outputs = self._encode(self._arrays, to_devices(padded, rows, self._mesh), extra=extra)
        features, extras = (np.asarray(x)[: len(crops)] for x in outputs)
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
        if image.dtype != np.uint8:
            raise ValueError(f"images must be uint8, with values from 0 to 255; got {image.dtype}")
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[2] != self.channels or 0 in image.shape:
            raise ValueError(
                f"images must be [height, width, {self.channels}] for this backbone; got an array "
                f"of shape {image.shape}"
            )
        if image.shape[:2] == (self.size, self.size) and self.size == self.resize_shorter_side:
            return image
        return center_crop(image, self.size, self.resize_shorter_side)

    def crop_file(self, encoded: bytes) -> np.ndarray:
        """Decodes the bytes of an image file and returns its central square.

        Returns:
          uint8 [size, size, channels].

        Raises:
          UndecodableError: The bytes are not a valid image of a supported format.
        """
        return central_view(
            encoded,
            size=self.size,
            resize_shorter_side=self.resize_shorter_side,
            channels=self.channels,
        )


def encode_crops(
    trained: TrainedBackbone,
    arrays: tuple[Any, Any],
    images: jax.Array,
    *,
    extra: SegmentOutput = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes features, and optionally codes or probabilities, as a pure function.

    Args:
      trained: Backbone, without its arrays.
      arrays: Parameters and running statistics of the network, or of the backbone if `trained` has
        no network.
      images: uint8 [batch, size, size, channels].
      extra: Output to compute besides the features.

    Returns:
      The same as `Encoder.encode_crops`.
    """
    config = trained.config
    normalized = normalize_images(
        images, mean=tuple(config.dataset.mean), std=tuple(config.dataset.std)
    )
    empty = jnp.zeros((images.shape[0], 0), jnp.int32)
    if trained.network is None:
        return trained.backbone.features(*arrays, normalized), empty
    features, embeddings = trained.network.infer(*arrays, normalized)
    segments, temperature = config.objective.num_segments, config.objective.temperature
    if extra is None:
        return features, empty
    if extra == "codes":
        return features, segment_codes(embeddings, num_segments=segments)
    return features, segment_probabilities(
        embeddings, num_segments=segments, temperature=temperature
    )
