"""What the input costs: decoding alone, the loader, and the same views made with Pillow.

    python tests/benchmarks/input.py --json=input.json

makes 500 x 375 JPEGs from scikit-image's photos in a temporary folder, and compares

- decode: OpenCV decodes each file from memory at its full size, and nothing else;
- loader: `training_batches` over a folder of 20,000 names of such files, two crops of 224 pixels
  (scale 0.08 to 1);
- pillow: Pillow reads and decodes each file, and cuts the same two crops by
  `Image.resize(box=...)`, bilinear: what torchvision does by default.

Each is run on one thread and on two. They take turns, so that the load of the machine is the same
for all; a rate is the median of its turns, a ratio the median of the turns' ratios. Rates are in
images per second: `wall` by the clock, `core` by the time that the process spent on the cores,
which other programs disturb less.

`--part=memory` reads 20,000 samples and prints the resident memory on the way.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

os.environ["JAX_PLATFORMS"] = "cpu"

import cv2
import numpy as np
import psutil
import skimage
from PIL import Image

from music_jax.data.crops import Crop, draw_box
from music_jax.data.folder import open_folder
from music_jax.data.loader import TrainingOrder, training_batches

WIDTH, HEIGHT, QUALITY, SIZE = 500, 375, 95, 224
BATCH = 64
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")


def make_files(folder: str, count: int) -> list[str]:
    """JPEGs of random parts of the photos; their mean size is near ImageNet's 110 kB."""
    photos = [getattr(skimage.data, name)() for name in PHOTOS]
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        photo = photos[i % len(photos)]
        scale = max(HEIGHT / photo.shape[0], WIDTH / photo.shape[1], 1.0) * 1.05
        photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        top = rng.integers(photo.shape[0] - HEIGHT)
        left = rng.integers(photo.shape[1] - WIDTH)
        part = photo[top : top + HEIGHT, left : left + WIDTH, ::-1]
        paths.append(f"{folder}/{i:05d}.jpg")
        cv2.imwrite(paths[-1], part, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return paths


def link_files(folder: str, paths: list[str], count: int) -> None:
    """As many names as a real dataset has, for the same files."""
    for i in range(len(paths), count):
        os.link(paths[i % len(paths)], f"{folder}/{i:05d}.jpg")


def decode_all(encoded: list[bytes]) -> None:
    for image in encoded:
        cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)


def pillow_all(paths: list[str]) -> None:
    crop = Crop(SIZE)
    rng = np.random.default_rng(0)
    for path in paths:
        image = Image.open(path).convert("RGB")
        for _ in range(2):
            top, left, height, width = draw_box(image.height, image.width, crop, rng)
            box = (left, top, left + width, top + height)
            np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def batches(folder: str, num_samples: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    source = open_folder(folder)
    return training_batches(
        source,
        TrainingOrder(len(source), BATCH, seed=0),
        crop=Crop(SIZE),
        channels=3,
        positions=np.arange(BATCH),
        num_steps=num_samples // BATCH,
        num_threads=threads,
    )


def loader_all(folder: str, num_samples: int, threads: int) -> None:
    for _ in batches(folder, num_samples, threads):
        pass


def in_threads(function: Callable, items: list, threads: int) -> None:
    parts = [items[i::threads] for i in range(threads)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, parts))


def rates(run: Callable[[], None], count: int) -> tuple[float, float]:
    wall, core = time.perf_counter(), time.process_time()
    run()
    return count / (time.perf_counter() - wall), count / (time.process_time() - core)


def measure_rates(folder: str, paths: list[str], repeats: int) -> dict:
    encoded = []
    for path in paths:
        with open(path, "rb") as file:
            encoded.append(file.read())
    count = len(paths) // BATCH * BATCH
    forms: dict[str, Callable[[int], None]] = {
        "decode": lambda threads: in_threads(decode_all, encoded[:count], threads),
        "loader": lambda threads: loader_all(folder, count, threads),
        "pillow": lambda threads: in_threads(pillow_all, paths[:count], threads),
    }
    cv2.setNumThreads(0)
    turns: list[dict[str, tuple[float, float]]] = []
    for _ in range(repeats):
        turns.append(
            {
                f"{name}_{threads}": rates(lambda run=run, n=threads: run(n), count)
                for threads in (1, 2)
                for name, run in forms.items()
            }
        )

    def median(number: Callable[[dict], float]) -> float:
        return round(statistics.median(number(turn) for turn in turns), 3)

    result = {
        "files": len(paths),
        "mean_file_bytes": round(sum(map(len, encoded)) / len(encoded)),
        "cores": len(os.sched_getaffinity(0)),
        "repeats": repeats,
    }
    for i, unit in enumerate(("wall", "core")):
        for key in turns[0]:
            result[f"{key}_images_per_{unit}_second"] = median(lambda t, k=key, i=i: t[k][i])
        for other in ("decode", "pillow"):
            for n in (1, 2):
                result[f"loader_over_{other}_{n}_{unit}"] = median(
                    lambda t, o=other, n=n, i=i: t[f"loader_{n}"][i] / t[f"{o}_{n}"][i]
                )
    for name in forms:
        result[f"{name}_2_over_1_wall"] = median(
            lambda t, name=name: t[f"{name}_2"][0] / t[f"{name}_1"][0]
        )
    return result


def measure_memory(folder: str, num_samples: int) -> dict:
    process = psutil.Process()
    every = max(1, num_samples // BATCH // 10)
    resident = {}
    for step, _ in enumerate(batches(folder, num_samples, threads=2)):
        if step % every == 0:
            resident[step * BATCH] = round(process.memory_info().rss / 2**20, 1)
    return {"resident_mib_by_samples": resident}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("rates", "memory"), default="rates")
    parser.add_argument("--files", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=20_000, help="names in the folder")
    parser.add_argument("--json", help="where to write the figures too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(folder, arguments.files)
        link_files(folder, paths, arguments.samples)
        if arguments.part == "rates":
            result = measure_rates(folder, paths, arguments.repeats)
        else:
            result = measure_memory(folder, arguments.samples)
    print(json.dumps(result, indent=2))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
