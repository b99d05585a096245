"""Which images a report shows, what the network makes of them, and how they are packed."""

import base64
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from music_jax.data.augment import augment_views, view_augmentations
from music_jax.data.crops import Crop
from music_jax.data.loader import TrainingOrder, training_batches
from music_jax.errors import UserError
from music_jax.evaluation.features import extract_split, extract_views, normalize
from music_jax.evaluation.run import Run

_VIEWED = 6  # images whose augmented views are shown
_PAIRS = 2  # pairs of views of each
_STREAM = 2**36  # separates the draw of the images from other draws


@dataclasses.dataclass(frozen=True)
class Seen:
    """The images that a report shows and what the network makes of them.

    Attributes:
      source: what they are called together.
      of: how many images there are in all.
      indices: each one's index among them, int64 [images].
      names: what each is called.
      labels: int32 [images], -1 where there is none.
      class_names: of the labels.
      num_classes: how many labels there are; 0 for none.
      pixels: the central views, uint8 [images, height, width, channels].
      features: the backbone's, float32 [images, features].
      embeddings: the projection head's, float32 [images, dim].
      pair: embeddings of two training views of each of some of them, float32 [some, 2, dim].
      views: pictures, uint8 [shown, 1 + 2 pairs, height, width, channels]: a crop as it is cut,
        then pairs of views as the network sees them.
    """

    source: str
    of: int
    indices: np.ndarray
    names: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    num_classes: int
    pixels: np.ndarray
    features: np.ndarray
    embeddings: np.ndarray
    pair: np.ndarray
    views: np.ndarray


def look(run: Run, num_images: int) -> Seen:
    """Chooses images and runs them through the network.

    Args:
      run: the run; its `images` are drawn from.
      num_images: how many to take; all, if there are fewer.

    Raises:
      UserError: none can be decoded, or the network's outputs are not finite.
    """
    rng = np.random.Generator(np.random.Philox(key=[0, _STREAM]))
    chosen = np.sort(rng.permutation(len(run.images))[:num_images])
    source = run.images.subset(chosen)
    extractor = run.extractor("trained", embeddings=True)
    found = extract_split(
        lambda images: extractor(images) | {"pixels": images},
        source,
        run.config,
        run.mesh,
        skipped=run.skipped,
        description=f"images of {source.name}",
    )
    if not len(found):
        raise UserError(f"none of the images of {source.name} can be decoded")
    config = config_dict.ConfigDict(run.config.to_dict())
    config.evaluation.update({"view_images": len(found), "num_views": 2})
    pair = extract_views(
        run.network,
        run.params,
        run.batch_stats,
        source,
        config,
        run.mesh,
        skipped=run.skipped,
        description=f"two views of images of {source.name}",
    )["embeddings"]
    if not all(np.all(np.isfinite(x)) for x in (found.features, found.arrays["embeddings"], pair)):
        raise UserError("what the network makes of the images is not finite")
    return Seen(
        source=source.name,
        of=len(run.images),
        indices=chosen[found.indices],
        names=[source.record_name(int(i)) for i in found.indices],
        labels=found.labels,
        class_names=source.class_names,
        num_classes=source.num_classes,
        pixels=found.arrays["pixels"],
        features=found.features,
        embeddings=found.arrays["embeddings"],
        pair=pair,
        views=augmented(run),
    )


def augmented(run: Run) -> np.ndarray:
    """Training views of a few images, as the network sees them but not normalized.

    Returns:
      uint8 [shown, 1 + 2 pairs, height, width, channels]; the first is a crop before augmentation.
    """
    config, source = run.config, run.images
    count = min(_VIEWED, len(source))
    crop = Crop(config.crop.size, tuple(config.crop.scale), tuple(config.crop.aspect_ratio))
    batches = training_batches(
        source,
        TrainingOrder(len(source), count, config.seed),
        crop=crop,
        channels=config.dataset.num_channels,
        positions=np.arange(count),
        num_steps=1,
        num_views=2 * _PAIRS,
        skipped=run.skipped,
        num_threads=config.num_decode_threads,
    )
    batch = next(batches)
    mean, std = tuple(config.dataset.mean), tuple(config.dataset.std)
    key = jax.random.key(config.seed)
    augment = jax.jit(
        functools.partial(
            augment_views,
            views=view_augmentations(config) * _PAIRS,
            mean=mean,
            std=std,
            dtype=jnp.dtype(config.compute_dtype),
        )
    )
    views = augment(batch["images"], batch["sample_index"], key)
    plain = normalize(jnp.asarray(batch["images"][:, :1]), config)
    seen = np.concatenate([np.asarray(x, np.float32) for x in (plain, views)], axis=1)
    shades = seen * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return np.round(255 * np.clip(shades, 0, 1)).astype(np.uint8)


class Sprite(NamedTuple):
    """Many small images in one file.

    Attributes:
      url: the file, as a data URL.
      columns: images a row.
      rows: of images.
      tile: side of an image, in pixels of the file.
      pitch: from one image to the next; what lies between repeats the image's edge.
    """

    url: str
    columns: int
    rows: int
    tile: int
    pitch: int

    def described(self) -> dict[str, int]:
        """All but the file."""
        return {k: v for k, v in self._asdict().items() if k != "url"}


def sprite(images: np.ndarray, *, tile: int, columns: int | None = None) -> Sprite:
    """Packs images into one WebP file, shrunk to a side of at most `tile` pixels.

    Args:
      images: uint8 [images, height, width, channels], squares.
      tile: the largest side; smaller images keep theirs.
      columns: images a row; by default as many as rows.
    """
    count, side = len(images), min(tile, images.shape[1])
    pitch = -(-side // 8) * 8  # whole blocks, so that lossy neighbors do not mix
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    sheet = np.zeros((rows * pitch, columns * pitch, 3), np.uint8)
    extra = pitch - side
    for i, image in enumerate(images):
        small = image
        if image.shape[0] != side:
            small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        small = small.reshape(side, side, -1)
        padded = np.pad(small, ((0, extra), (0, extra), (0, 0)), mode="edge")
        y, x = pitch * (i // columns), pitch * (i % columns)
        sheet[y : y + pitch, x : x + pitch] = padded[..., ::-1]  # OpenCV's order is BGR
    return Sprite(f"data:image/webp;base64,{_webp(sheet)}", columns, rows, side, pitch)


def _webp(sheet: np.ndarray) -> str:
    """The smaller of the file without loss, where that is small anyway, and with."""
    encoded = [
        cv2.imencode(".webp", sheet, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
        for quality in (101, 82)  # more than 100 is without loss
    ]
    exact, lossy = encoded
    return base64.b64encode(exact if len(exact) <= 1.2 * len(lossy) else lossy).decode()


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array of small integers or floats as the page's scripts unpack it, little-endian."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return {
        "type": f"{array.dtype.kind}{array.dtype.itemsize}",
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }
