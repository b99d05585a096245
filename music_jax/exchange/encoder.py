"""From images to features, by a trained backbone."""

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.data.augment import normalize_images
from music_jax.distributed import usable_cores
from music_jax.distributed.mesh import make_data_mesh, to_devices
from music_jax.errors import UndecodableError, UserError
from music_jax.exchange.trained import TrainedBackbone, read_trained
from music_jax.objectives import segment_codes, segment_probabilities

# An array [height, width] or [height, width, channels], or an image file.
Image = np.ndarray | str | os.PathLike[str]

# What may be computed besides features: both need the projection head.
Also = Literal["codes", "probabilities"] | None

_T = TypeVar("_T")
_R = TypeVar("_R")


def load(path: str | os.PathLike[str], *, checkpoint: str | None = None) -> "Encoder":
    """Loads a trained backbone as a function from images to features.

    Args:
      path: a run's workdir, or a safetensors file that `music_jax.export` wrote.
      checkpoint: of a workdir: its step, or its directory; by default the latest.

    Returns:
      The function.

    Raises:
      UserError: there is no such run, checkpoint or file, or it is damaged.
    """
    return Encoder(read_trained(os.fspath(path), checkpoint=checkpoint))


class Encoder:
    """A function from images to features: the trained backbone in inference mode, in float32.

    Images are prepared as for the evaluation: the shorter side is resized, the central square is
    cut out and its values are normalized.

    Attributes:
      trained: the backbone.
      num_features: size of the features.
      size: side of the square that the backbone sees, in pixels.
      resize_shorter_side: what an image's shorter side becomes first.
      channels: 1 (gray) or 3 (RGB).
    """

    def __init__(self, trained: TrainedBackbone, *, batch_size: int = 128):
        """Puts the weights onto the devices.

        Args:
          trained: the backbone.
          batch_size: images that go through it at once, rounded up to a multiple of the devices.
        """
        config = trained.config
        self.trained = trained
        self.num_features = trained.backbone.num_features
        self.size = config.crop.size
        self.resize_shorter_side = config.crop.eval_resize
        self.channels = config.dataset.num_channels
        self._mesh = make_data_mesh()
        self.batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        if trained.network is None:
            arrays = trained.backbone_arrays()
        else:
            arrays = (trained.params, trained.batch_stats)
        self._arrays = jax.device_put(arrays, whole)
        self._encode = jax.jit(functools.partial(encode_crops, trained), static_argnames=("also",))

    @property
    def has_codes(self) -> bool:
        """Whether the projection head is there and its embedding has segments."""
        trained = self.trained
        return trained.network is not None and trained.config.objective.name == "music"

    def __call__(self, images: np.ndarray | Sequence[Image]) -> np.ndarray:
        """Computes features.

        Args:
          images: uint8 [images, height, width, channels], or a sequence of single images: arrays
            of any size, or paths of image files.

        Returns:
          float32 [images, features].

        Raises:
          ValueError: an array is not uint8, or its shape is not that of an image.
          UserError: a file cannot be read.
        """
        return self._run(images)[0]

    def codes(self, images: np.ndarray | Sequence[Image]) -> np.ndarray:
        """Computes discrete codes: the most probable unit of each segment.

        Args:
          images: as for a call.

        Returns:
          int32 [images, segments].

        Raises:
          ValueError: as for a call.
          UserError: as for a call, or there is no projection head or its embedding has no segments.
        """
        return self._run(images, "codes")[1]

    def probabilities(self, images: np.ndarray | Sequence[Image]) -> np.ndarray:
        """Computes how probable each segment holds each of its units to be.

        Args:
          images: as for a call.

        Returns:
          float32 [images, segments, units], each unit axis summing to 1.

        Raises:
          ValueError: as for a call.
          UserError: as for `codes`.
        """
        return self._run(images, "probabilities")[1]

    def _run(
        self, images: np.ndarray | Sequence[Image], also: Also = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise ValueError(
                "images are [images, height, width, channels], or a list of single ones; got an "
                f"array of shape {images.shape}"
            )
        if isinstance(images, str | os.PathLike):
            raise ValueError(f"images are a list, such as [{os.fspath(images)!r}]; got one path")
        views = ahead(self._view, images)
        outputs = []
        while batch := [view for _, view in zip(range(self.batch_size), views, strict=False)]:
            outputs.append(self.encode_views(np.stack(batch), also))
        if not outputs:
            nothing = np.zeros((1, self.size, self.size, self.channels), np.uint8)
            features, others = self.encode_views(nothing, also)
            outputs = [(features[:0], others[:0])]
        features, others = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return features, others

    def encode_views(self, views: np.ndarray, also: Also = None) -> tuple[np.ndarray, np.ndarray]:
        """Features, and what else is asked for, of images that are cut already.

        Args:
          views: uint8 [images, size, size, channels], at most `batch_size` of them.
          also: what to compute besides.

        Returns:
          float32 [images, features], and int32 [images, segments] codes, or float32 [images,
          segments, units] probabilities, or [images, 0].

        Raises:
          UserError: there are no codes, and no probabilities.
        """
        if also and not self.has_codes:
            raise UserError(
                f"{also} need the projection head of a run with the objective music; an exported "
                "backbone and other objectives have none"
            )
        # Few shapes, so that few programs are compiled: a power of two for each device.
        share = -(-len(views) // self._mesh.size)
        rows = min(2 ** (share - 1).bit_length() * self._mesh.size, self.batch_size)
        filled = np.zeros((rows, *views.shape[1:]), np.uint8)
        filled[: len(views)] = views
        outputs = self._encode(self._arrays, to_devices(filled, rows, self._mesh), also=also)
        features, found = (np.asarray(x)[: len(views)] for x in outputs)
        return features, found

    def _view(self, image: Image) -> np.ndarray:
        """The central square of an array or a file, uint8 [size, size, channels]."""
        if isinstance(image, str | os.PathLike):
            return self._view_of_file(image)
        image = np.asarray(image)
        if image.dtype != np.uint8:
            raise ValueError(f"images are uint8, of values from 0 to 255; got {image.dtype}")
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[2] != self.channels or 0 in image.shape:
            raise ValueError(
                f"an image is [height, width, {self.channels}] for this backbone; got an array of "
                f"shape {image.shape}"
            )
        height, width = image.shape[:2]
        if min(height, width) == self.size == self.resize_shorter_side and height == width:
            return image
        with _images_of_opencv():
            from music_jax.data.crops import center_crop
        return center_crop(image, self.size, self.resize_shorter_side)

    def _view_of_file(self, path: str | os.PathLike[str]) -> np.ndarray:
        try:
            with open(path, "rb") as file:
                return self.view_of(file.read())
        except (OSError, UndecodableError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"the image {os.fspath(path)!r}: {reason}") from error

    def view_of(self, encoded: bytes) -> np.ndarray:
        """The central square of an image file's bytes, uint8 [size, size, channels].

        Raises:
          UndecodableError: they are no whole image of a known format.
        """
        with _images_of_opencv():
            from music_jax.data.central import central_view
        return central_view(
            encoded,
            size=self.size,
            resize_shorter_side=self.resize_shorter_side,
            channels=self.channels,
        )


def encode_crops(
    trained: TrainedBackbone, arrays: tuple[Any, Any], images: jax.Array, *, also: Also = None
) -> tuple[jax.Array, jax.Array]:
    """Features, and codes or probabilities, of uint8 images, as a pure function.

    Args:
      trained: says what the arrays are.
      arrays: parameters and running statistics: the network's, if `trained` has one, else the
        backbone's.
      images: the images.
      also: what to compute besides.

    Returns:
      float32 [batch, features], and as `Encoder.encode_views` gives it.
    """
    config = trained.config
    normalized = normalize_images(
        images, mean=tuple(config.dataset.mean), std=tuple(config.dataset.std)
    )
    nothing = jnp.zeros((images.shape[0], 0), jnp.int32)
    if trained.network is None:
        return trained.backbone.features(*arrays, normalized), nothing
    if also is None:
        return trained.network.features(*arrays, normalized), nothing
    features, embeddings = trained.network.infer(*arrays, normalized)
    segments, temperature = config.objective.num_segments, config.objective.temperature
    if also == "codes":
        return features, segment_codes(embeddings, num_segments=segments)
    return features, segment_probabilities(
        embeddings, num_segments=segments, temperature=temperature
    )


def ahead(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Yields the function of each item, in order, computed by threads a little ahead of its use."""
    threads = usable_cores()
    waiting: collections.deque = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= max(threads, min(64 * threads, 1024)):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def _images_of_opencv() -> Any:
    from music_jax.exchange.extras import needs

    return needs("cv2", "data")
