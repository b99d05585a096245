"""Measures the cost of the input: decoding alone, the loader, and the same views with Pillow.

    python tests/benchmarks/input.py --json=input.json

writes 500 x 375 JPEGs from scikit-image's photos to a temporary folder, and compares

- decode: OpenCV decodes each file from memory at its full size;
- quick: the loader's own decoder does the same, as for training views;
- loader: `training_batches` over a folder of 20,000 names of such files, two crops of 224 pixels
  (scale 0.08 to 1);
- local: the same with four local views of 96 pixels (scale 0.05 to 0.3) besides;
- pillow: Pillow reads and decodes each file, cuts two such crops and resizes them bilinearly, as
  torchvision's ImageFolder and RandomResizedCrop do by default.

Each runs on one thread and on two. They take turns of some seconds in random order, so that the
load of the machine is the same for all. A loader is created for each turn and starts to read ahead;
its turns have four times as many images as the others', so that this counts less. A rate is the
median of its turns, a ratio the median of the turns' ratios. `wall` is by the clock, `core` by the
time that the process spent on the cores, which other programs disturb less. Required ratios are
printed beside those measured.

`--part=memory` reads 20,000 samples and prints the resident memory in between.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import random
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

from music_jax.data.crops import NUMBERS_PER_BOX, Crop, draw_boxes
from music_jax.data.decode import decode
from music_jax.data.folder import open_folder
from music_jax.data.loader import Views, training_batches
from music_jax.data.order import TrainingOrder
from music_jax.data.sources import Source

WIDTH, HEIGHT, SIZE = 500, 375, 224
BATCH, TURN = 64, 2048
LOADER_TURN = 4 * TURN
VIEWS = {"images": (Crop(SIZE), 2)}
WITH_LOCAL = VIEWS | {"local_images": (Crop(96, (0.05, 0.3)), 4)}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")


def make_files(folder: str, count: int, quality: int) -> list[str]:
    """Writes JPEGs of random parts of the photos; 67 kB each on average at quality 95."""
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
        cv2.imwrite(paths[-1], part, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return paths


def link_files(folder: str, paths: list[str], count: int) -> None:
    """Links the same files under as many names as a real dataset has."""
    for i in range(len(paths), count):
        os.link(paths[i % len(paths)], f"{folder}/{i:05d}.jpg")


def decode_all(encoded: list[bytes]) -> None:
    for image in encoded:
        cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)


def decode_quickly(encoded: list[bytes]) -> None:
    for image in encoded:
        decode(image, 3, quick=True)


def pillow_all(paths: list[str]) -> None:
    crop = Crop(SIZE)
    rng = np.random.default_rng(0)
    sides = np.full(2, HEIGHT), np.full(2, WIDTH)
    for path in paths:
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        boxes = draw_boxes(*sides, crop, rng.random((2, NUMBERS_PER_BOX)))
        for top, left, height, width in boxes.tolist():
            part = image.crop((left, top, left + width, top + height))
            np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def batches(
    source: Source,
    num_samples: int,
    threads: int,
    start: int,
    views: Views = VIEWS,
) -> Iterator[dict[str, np.ndarray]]:
    return training_batches(
        source,
        TrainingOrder(len(source), BATCH, seed=0),
        views=views,
        channels=3,
        positions=np.arange(BATCH),
        start_step=start // BATCH,
        num_steps=(start + num_samples) // BATCH,
        num_threads=threads,
    )


def loader_all(source: Source, threads: int, start: int, views: Views = VIEWS) -> None:
    for _ in batches(source, LOADER_TURN, threads, start, views):
        pass


def in_threads(function: Callable, items: list, threads: int) -> None:
    parts = [items[i::threads] for i in range(threads)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, parts))


def rates(run: Callable[[], None], count: int) -> dict[str, float]:
    wall, core = time.perf_counter(), time.process_time()
    run()
    return {
        "wall": count / (time.perf_counter() - wall),
        "core": count / (time.process_time() - core),
    }


def measure_rates(source: Source, paths: list[str], repeats: int) -> dict:
    encoded = []
    for path in paths:
        with open(path, "rb") as file:
            encoded.append(file.read())
    forms: dict[str, Callable[[int, int], None]] = {
        "decode": lambda repeat, threads: in_threads(decode_all, encoded, threads),
        "quick": lambda repeat, threads: in_threads(decode_quickly, encoded, threads),
        "loader": lambda repeat, threads: loader_all(source, threads, repeat * LOADER_TURN),
        "local": lambda repeat, threads: loader_all(
            source, threads, repeat * LOADER_TURN, WITH_LOCAL
        ),
        "pillow": lambda repeat, threads: in_threads(pillow_all, paths, threads),
    }
    counts = dict.fromkeys(forms, TURN) | dict.fromkeys(("loader", "local"), LOADER_TURN)
    cv2.setNumThreads(0)
    rng = random.Random(0)
    turns = []
    for repeat in range(repeats + 1):
        runs = [(name, threads) for threads in (1, 2) for name in forms]
        rng.shuffle(runs)
        turns.append(
            {
                f"{name}_{threads}": rates(
                    functools.partial(forms[name], repeat, threads), counts[name]
                )
                for name, threads in runs
            }
        )
    del turns[0]  # warm-up

    def ratio(a: str, b: str, clock: str) -> float:
        return round(statistics.median(turn[a][clock] / turn[b][clock] for turn in turns), 3)

    return {
        "files": len(paths),
        "mean_file_bytes": round(sum(map(len, encoded)) / len(encoded)),
        "cores": len(os.sched_getaffinity(0)),
        "repeats": repeats,
        "images_per_second": {
            form: {
                clock: round(statistics.median(turn[form][clock] for turn in turns), 1)
                for clock in ("wall", "core")
            }
            for form in sorted(turns[0])
        },
        "ratios": {
            "loader over decode": {
                "needed": 0.75,
                "wall": ratio("loader_1", "decode_1", "wall"),
                "core": ratio("loader_1", "decode_1", "core"),
            },
            "loader over quick": {
                "wall": ratio("loader_1", "quick_1", "wall"),
                "core": ratio("loader_1", "quick_1", "core"),
            },
            "loader over pillow": {
                "needed": 2.5,
                "wall": ratio("loader_1", "pillow_1", "wall"),
                "core": ratio("loader_1", "pillow_1", "core"),
            },
            "local over loader": {
                "wall": ratio("local_1", "loader_1", "wall"),
                "core": ratio("local_1", "loader_1", "core"),
            },
            "loader, two threads over one": {
                "needed": 1.8,
                "wall": ratio("loader_2", "loader_1", "wall"),
            },
            "decode, two threads over one": {"wall": ratio("decode_2", "decode_1", "wall")},
        },
    }


def measure_memory(source: Source, num_samples: int) -> dict:
    process = psutil.Process()
    every = max(1, num_samples // BATCH // 10)
    resident = {}
    for step, _ in enumerate(batches(source, num_samples, threads=2, start=0)):
        if step % every == 0:
            resident[step * BATCH] = round(process.memory_info().rss / 2**20, 1)
    first, *later = list(resident.values())[1:]
    return {"resident_mib_by_samples": resident, "growth_mib": round(max(later) - first, 1)}


def print_table(result: dict) -> None:
    for name, clocks in result.get("images_per_second", {}).items():
        form, threads = name.split("_")
        print(f"{form:8s} {threads} thread(s)  {clocks['wall']:8.1f} images/s by the clock", end="")
        print(f", {clocks['core']:8.1f} a second on a core")
    for name, found in result.get("ratios", {}).items():
        needed = f"at least {found['needed']}" if "needed" in found else "to compare with"
        core = f", {found['core']:.2f} by time on the cores" if "core" in found else ""
        print(f"{name:30s} {found['wall']:.2f} by the clock{core} ({needed})")
    if "growth_mib" in result:
        resident = result["resident_mib_by_samples"]
        print(", ".join(f"{samples:,}: {mib} MiB" for samples, mib in resident.items()))
        print(f"resident memory grew by {result['growth_mib']} MiB after the first tenth (flat)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("rates", "memory"), default="rates")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100")
    parser.add_argument("--samples", type=int, default=20_000, help="number of names in the folder")
    parser.add_argument("--json", help="file to which the results are written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(folder, TURN, arguments.quality)
        link_files(folder, paths, arguments.samples)
        source = open_folder(folder)
        if arguments.part == "rates":
            result = measure_rates(source, paths, arguments.repeats)
        else:
            result = measure_memory(source, arguments.samples)
    print_table(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
