"""Mean and standard deviation of the channels of images, computed once for a set and cached."""

import hashlib
import json
import logging
import math
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
from etils import epath
from ml_collections import config_dict
from numpy.typing import DTypeLike

from music_jax.config import from_json, validate
from music_jax.data.decode import decode
from music_jax.data.order import evenly_spaced
from music_jax.data.sources import Source
from music_jax.distributed import progress, usable_cores
from music_jax.distributed.mesh import from_main_process
from music_jax.errors import UndecodableError, UnusableDataError
from music_jax.workdir.directory import user_directory
from music_jax.workdir.files import read_record, write_json
from music_jax.workdir.run_config import read_config

_logger = logging.getLogger(__name__)

DEFAULT_COUNT = 10_000  # images
_VALUES_AT_ONCE = 2**20
_DIGITS = 6
_SMALLEST_SHARE = 1e-7  # of the mean, which float32 can tell from rounding

_Moments = tuple[int, np.ndarray, np.ndarray]  # number of pixels; mean and variance by channel


class ChannelStatistics(NamedTuple):
    """Statistics of the channels of images, in the units of `config.dataset.mean`.

    Attributes:
      mean: Mean of each channel over all pixels.
      std: Standard deviation of each channel; 1 for a channel with only one value.
      num_images: Number of images that they were computed from.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int


def compute_statistics(
    source: Source,
    *,
    channels: int,
    dtype: DTypeLike = np.uint8,
    count: int = DEFAULT_COUNT,
    num_threads: int | None = None,
) -> ChannelStatistics:
    """Computes the statistics of a source's images, decoded at full size.

    Args:
      source: Images; those that cannot be decoded are excluded.
      channels: Number of channels.
      dtype: Type of the pixels; uint8 values are divided by 255.
      count: Number of images, evenly spaced; all, if there are fewer.
      num_threads: Number of decoding threads; by default one per core.

    Raises:
      UnusableDataError: None of the images can be decoded.
    """
    chosen = evenly_spaced(len(source), min(count, len(source)))
    cv2.setNumThreads(0)  # Images are decoded on threads of their own.

    def measure(index: int) -> list[_Moments] | str:
        try:
            return _moments(decode(source.example(index)[0], channels, dtype=dtype))
        except UndecodableError as error:
            return f"image {source.record_name(index)}: {error}"

    moments: list[_Moments] = []
    problems: list[str] = []
    with (
        ThreadPoolExecutor(num_threads or usable_cores()) as pool,
        progress.bar(len(chosen), unit="img", description=f"statistics of {source.name}") as bar,
    ):
        for found in pool.map(measure, chosen):
            bar.update(1)
            if isinstance(found, str):
                problems.append(found)
            else:
                moments += found
    if not moments:
        raise UnusableDataError(
            f"none of {len(chosen):,} images of {source.name} can be decoded, such as {problems[0]}"
        )
    if problems:
        _logger.warning(
            f"{len(problems):,} of {len(chosen):,} images of {source.name} cannot be decoded and "
            f"are not in the statistics, such as {problems[0]}"
        )
    unit = 255.0 if np.dtype(dtype) == np.uint8 else 1.0
    pixels, means, variances = (np.asarray(x) for x in zip(*moments, strict=True))
    mean = np.average(means, axis=0, weights=pixels)
    variance = np.average(variances + np.square(means - mean), axis=0, weights=pixels)
    mean, std = mean / unit, np.sqrt(variance) / unit
    constant = std <= _SMALLEST_SHARE * np.abs(mean)
    return ChannelStatistics(
        tuple(map(_rounded, mean)),
        tuple(map(_rounded, np.where(constant, 1.0, std))),
        len(chosen) - len(problems),
    )


def compute_and_cache(
    source: Source, fingerprint: str, config: config_dict.ConfigDict, *, count: int = DEFAULT_COUNT
) -> ChannelStatistics:
    """Computes the statistics for a config, and writes them to the user's cache.

    A warning is logged if they cannot be written.

    Args:
      source: Images.
      fingerprint: Their fingerprint with times, from before they are read: they may change.
      config: Config with the number of channels and the type of the pixels.
      count: See `compute_statistics`.

    Raises:
      UnusableDataError: None of the images can be decoded.
    """
    found = compute_statistics(
        source,
        channels=config.dataset.num_channels,
        dtype=config.dataset.pixel_type,
        count=count,
        num_threads=config.num_decode_threads,
    )
    try:
        path = _cache_file(fingerprint, config)
        write_json(epath.Path(path), {"source": source.name, **found._asdict()})
    except OSError as error:
        _logger.warning(f"the statistics are not cached: {error}")
    return found


def with_statistics(
    config: config_dict.ConfigDict, source: Source, workdir: epath.Path
) -> config_dict.ConfigDict:
    """Returns a config that has the mean and the standard deviation of the channels.

    If it has none, the main process takes them from the run, if it has begun, or from the user's
    cache, or computes and caches them. All processes of a run call this together.

    Args:
      config: Config.
      source: Images to train on.
      workdir: Directory of the run.

    Raises:
      UnusableDataError: None of the images can be decoded.
    """
    if config.dataset.mean:
        return config

    def find() -> list[Any]:
        if recorded := read_config(workdir):
            own = from_json(recorded).dataset
            return [own.mean, own.std, None]
        fingerprint = source.fingerprint(times=True)
        return list(_cached(fingerprint, config) or compute_and_cache(source, fingerprint, config))

    mean, std, num_images = from_main_process(find)
    config = config.copy_and_resolve_references()
    config.dataset.mean, config.dataset.std = tuple(mean), tuple(std)
    validate(config)
    if num_images:
        _logger.info(
            f"{'pixels':12s} mean {config.dataset.mean}, standard deviation {config.dataset.std} "
            f"of {num_images:,} images"
        )
    return config


def _moments(image: np.ndarray) -> list[_Moments]:
    """Returns the moments of the pixels of each block of an image."""
    values = image.reshape(-1, image.shape[2])
    moments = []
    for part in np.array_split(values, values.size // _VALUES_AT_ONCE + 1):
        block = part.astype(np.float64)
        mean = block.mean(axis=0)
        variance = np.square(block - mean).mean(axis=0)  # faster than var(), which has no mean yet
        moments.append((len(block), mean, variance))
    return moments


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def _cache_file(fingerprint: str, config: config_dict.ConfigDict) -> pathlib.Path:
    """Returns the file of the statistics of images with a fingerprint.

    Raises:
      OSError: The user's cache cannot be used.
    """
    dataset = config.dataset
    key = json.dumps([fingerprint, dataset.num_channels, dataset.pixel_type])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return user_directory("cache", "statistics") / f"{name}.json"


def _cached(fingerprint: str, config: config_dict.ConfigDict) -> ChannelStatistics | None:
    try:
        record = read_record(epath.Path(_cache_file(fingerprint, config)))
        mean, std = (tuple(map(float, record[name])) for name in ("mean", "std"))
        found = ChannelStatistics(mean, std, int(record["num_images"]))
    except (OSError, KeyError, TypeError, ValueError):
        return None
    fits = len(mean) == len(std) == config.dataset.num_channels
    return found if fits and all(map(math.isfinite, (*mean, *std))) and min(std) > 0 else None
