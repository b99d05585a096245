"""Writes the report: measurements, the plotting library and the scripts, in one HTML file."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from importlib import resources
from typing import Any

import cv2
import jinja2
import numpy as np
import plotly.offline
from etils import epath

from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import MusicError, UserError, one_line
from music_jax.evaluation.run import config_of_run, load_run
from music_jax.report import comparison, in_page, learned, measures, tables
from music_jax.report.reading import RecordedRun, as_text, count_texts, read_workdirs
from music_jax.version import __version__
from music_jax.workdir.files import check_writable, write_new

_logger = logging.getLogger(__name__)

MAX_BYTES = 9_500_000

# Sides, in pixels, of thumbnails and of the joint-probability matrix; the first that fit are used.
_SIDES = ((64, 1024), (48, 768), (40, 512), (32, 384), (24, 256), (16, 128))
_MAX_NAME = 80  # characters of an image's name
_STYLES = ("report.css", "try_it.css")
_SCRIPTS = (
    *("start.js", "charts.js", "curves.js", "segments.js", "images.js"),
    *("pixels.js", "network.js", "try_it.js", "main.js"),
)


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """A run with the measurements that the report shows."""

    recorded: RecordedRun
    sample: measures.Sample | None  # None without a checkpoint or images
    missing: str  # reason why there is no sample
    verdicts: tuple[learned.Verdict, learned.Verdict]  # on collapse and redundancy
    confusion: measures.Confusion | None  # of the linear probe, if there are predictions
    mistakes: measures.Mistakes | None  # of the linear probe, if its images are known
    data: dict[str, Any]  # of the page's scripts, apart from what depends on the pictures' size
    num_training_images: int | None
    network: str = ""  # compressed data of the page's scripts, if they can apply it to images
    no_network: str = ""  # reason why there is no network, if there is a sample

    def class_name(self, label: int) -> str:
        """Returns the name of a class of the images."""
        names = self.data.get("classes", [])
        return names[label] if label < len(names) else str(label)


def write_report(
    workdirs: list[str],
    *,
    output: str | None = None,
    num_images: int = 1000,
    overrides: dict[str, object] | None = None,
) -> tuple[epath.Path, int]:
    """Writes the report of some runs.

    Args:
      workdirs: Workdirs of the runs.
      output: File to write; by default `report.html` in the first workdir.
      num_images: Number of images of each run to show and measure.
      overrides: Config fields, by dotted name, that replace those of the runs.

    Returns:
      The file and its size in bytes.

    Raises:
      UserError: A workdir does not exist or holds no run, the file cannot be written, or there are
        too many runs for one file.
    """
    recorded = read_workdirs(workdirs)
    path = epath.Path(output).expanduser() if output else recorded[0].path / "report.html"
    if path.is_dir():
        raise UserError(f"--output={output} is a directory; name a file in it")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)  # fail now, not after all computations
    network_bytes = in_page.MAX_BYTES // len(recorded)
    html = render([measure_run(run, num_images, overrides, network_bytes) for run in recorded])
    with _writing(path):
        write_new(path, html)
    return path, len(html)


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another --output") from error


def measure_run(
    recorded: RecordedRun,
    num_images: int,
    overrides: dict[str, object] | None = None,
    network_bytes: int = in_page.MAX_BYTES,
) -> ReportedRun:
    """Loads a run's network and images, if possible, and measures it for the report.

    Args:
      recorded: Records of the run.
      num_images: Number of images to show and measure.
      overrides: Config fields, by dotted name, that replace those of the run.
      network_bytes: Largest size of a network in the page, before it is encoded as text.

    Raises:
      UserError: An override is wrong.
    """
    if overrides:
        config_of_run(recorded.path, overrides)
    try:
        run = load_run(str(recorded.path), read_only=True, overrides=overrides)
        sample = measures.sample_images(run, num_images)
        found = recorded.predictions
        mistakes = measures.mistaken_images(run, found) if found is not None else None
    except (MusicError, OSError) as error:
        missing = one_line(error)
        _logger.warning(f"{recorded.name}: no images are shown: {missing}")
        return measure_sample(recorded, missing=missing)
    _logger.info(f"{recorded.name}: map of {len(sample.indices):,} images")
    if run.sources is None:
        num_training_images: int | None = len(run.images)
    else:
        num_training_images = None if run.config.evaluation.train else len(run.sources.train)
    measured = measure_sample(
        recorded, sample, mistakes=mistakes, num_training_images=num_training_images
    )
    network = in_page.network_data(run, sample, recorded.classifier, max_bytes=network_bytes)
    if isinstance(network, str):
        return dataclasses.replace(measured, no_network=network)
    return dataclasses.replace(measured, network=_compress(_as_json(network)))


def measure_sample(
    recorded: RecordedRun,
    sample: measures.Sample | None = None,
    *,
    mistakes: measures.Mistakes | None = None,
    missing: str = "",
    num_training_images: int | None = None,
) -> ReportedRun:
    """Measures images of a run, if there are any; see `ReportedRun` for the arguments."""
    class_names = [as_text(name, _MAX_NAME) for name in sample.class_names] if sample else []
    found, confusion = recorded.predictions, None
    data: dict[str, Any] = {"segments": None, "maps": {}, "confusion": None}
    if found is not None:
        confusion = measures.count_confusions(found, class_names)
        data["confusion"] = {"names": confusion.names, "counts": confusion.counts.astype(np.uint32)}
    if sample is not None:
        data |= {
            "images": {
                "count": len(sample.indices),
                "names": [as_text(name, _MAX_NAME) for name in sample.names],
                "labels": sample.labels.astype(np.int32),
                "predicted": measures.predictions_of(sample, found).astype(np.int32),
            },
            "classes": class_names or [str(i) for i in range(sample.num_classes)],
            "neighbors": measures.neighbors(sample.features),
        }
        with concurrent.futures.ThreadPoolExecutor() as threads:
            places = threads.map(measures.tsne_map, (sample.embeddings, sample.features))
            for name, place in zip(("embedding", "features"), places, strict=True):
                if place is not None:
                    data["maps"][name] = np.round(60000 * place).astype(np.uint16)
        if recorded.segments:
            data["segments"] = measures.measure_sample_segments(
                sample,
                num_segments=recorded.segments[0],
                temperature=float(recorded.field("objective.temperature", 1.0)),
            )
    return ReportedRun(
        recorded=recorded,
        sample=sample,
        missing=missing,
        verdicts=learned.verdicts(recorded, sample, data["segments"]),
        confusion=confusion,
        mistakes=mistakes,
        data=data,
        num_training_images=num_training_images,
    )


def render(runs: list[ReportedRun]) -> bytes:
    """Renders the report as UTF-8.

    Raises:
      UserError: The report would be too large even with the smallest pictures.
    """
    bare = [
        dataclasses.replace(run, network="", no_network="it does not fit in the page")
        if run.network
        else run
        for run in runs
    ]
    for shown in (runs, bare):
        for tile, matrix in _SIDES:
            html = _page(shown, tile=tile, matrix=matrix)
            if len(html) <= MAX_BYTES:
                return html
    raise UserError(
        f"a report of {len(runs)} runs would be larger than {MAX_BYTES / 1e6:.1f} MB; name fewer "
        "runs with --workdir or show fewer images with --images"
    )


def _page(runs: list[ReportedRun], *, tile: int, matrix: int) -> bytes:
    recorded = [run.recorded for run in runs]
    curves = tables.curves(recorded)
    sprites: dict[str, str] = {}  # style rules by class; runs may share images
    data = [
        run.data
        | _pictures(run, tile=tile, matrix=matrix, sprites=sprites)
        | {
            "name": run.recorded.name,
            "curves": tables.points(run.recorded, curves),
            "bounds": [tables.bounds(run.recorded).get(curve.name) for curve in curves],
        }
        for run in runs
    ]
    content = {"runs": data, "units": [curve.unit for curve in curves]}
    script = "\n".join(map(_read, _SCRIPTS))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"text": as_text, "points": learned.points}
    text = environment.get_template("report.html.jinja").render(
        runs=runs,
        recorded=recorded,
        tables=tables,
        learned=learned,
        comparison=comparison,
        count_texts=count_texts,
        title=" · ".join(run.name for run in recorded),
        facts=tables.rows([tables.facts(run.recorded, run.num_training_images) for run in runs]),
        curves=curves,
        bounded={name for run in recorded for name in tables.bounds(run)},
        thinned=any(len(run.metrics) > tables.MAX_POINTS for run in recorded),
        version=__version__,
        style="\n".join([*map(_read, _STYLES), *sprites.values()]),
        script=script,
        hashes=" ".join(map(_policy_hash, (plotly.offline.get_plotlyjs(), script))),
        library=_compressed_library(),
        data=_compress(_as_json(content)),
    )
    return escape_surrogates(text).encode()


def _read(name: str) -> str:
    return (resources.files("music_jax.report") / "page" / name).read_text("utf-8")


@functools.cache
def _compressed_library() -> str:
    return _compress(plotly.offline.get_plotlyjs())


def _as_json(data: Any) -> str:
    return json.dumps(data, allow_nan=False, default=_pack, separators=(",", ":"))


def _compress(text: str) -> str:
    """Compresses text for the page's scripts, in characters that need no escape in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _policy_hash(script: str) -> str:
    """Returns the hash by which the content security policy allows a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _pictures(
    run: ReportedRun, *, tile: int, matrix: int, sprites: dict[str, str]
) -> dict[str, Any]:
    """Returns the data of a run that depend on the size of the pictures; adds to `sprites`."""
    sample, segments = run.sample, run.data["segments"]
    if sample is None:
        return {}
    count, columns = sample.views.shape[:2]
    views = sample.views.reshape(-1, *sample.views.shape[2:])
    return {
        "images": run.data["images"] | _sprite(sample.pixels, tile, sprites),
        "mistakes": run.mistakes and _sprite(run.mistakes.pixels, 2 * tile, sprites),
        "views": _sprite(views, 2 * tile, sprites, columns=columns)
        | {"count": count, "pairs": (columns - 1) // 2},
        "segments": segments
        and segments | {"joint": measures.joint_ratios(sample, segments, max_side=matrix)},
    }


def _sprite(
    images: np.ndarray, max_side: int, sprites: dict[str, str], *, columns: int | None = None
) -> dict[str, Any]:
    """Packs square images, uint8 [images, side, side, 1 or 3], into one WebP file.

    They are shrunk to a side of at most `max_side` pixels. The style rule of the file is added to
    `sprites`. Returns the layout, with the `pitch` from image to image, and the class `sprite`.
    """
    count, side = len(images), min(max_side, images.shape[1])
    pitch = -(-side // 8) * 8  # whole blocks, so that lossy neighbors do not mix
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    sheet = np.zeros((rows * pitch, columns * pitch, 3), np.uint8)
    for i, image in enumerate(images):
        if image.shape[0] != side:
            image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        extra = (0, pitch - side)
        padded = np.pad(image.reshape(side, side, -1), (extra, extra, (0, 0)), mode="edge")
        y, x = pitch * (i // columns), pitch * (i % columns)
        sheet[y : y + pitch, x : x + pitch] = padded[..., ::-1]  # OpenCV's order is BGR
    lossless, lossy = (
        cv2.imencode(".webp", sheet, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
        for quality in (101, 82)  # above 100 is lossless
    )
    content = lossless if len(lossless) <= 1.2 * len(lossy) else lossy
    name = f"sprite-{hashlib.sha256(content).hexdigest()[:12]}"
    url = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
    sprites[name] = f".{name}{{background-image:url({url})}}"
    return {"columns": columns, "rows": rows, "tile": side, "pitch": pitch, "sprite": name}


def _pack(array: np.ndarray) -> dict[str, Any]:
    """Packs an array for the page's scripts, little-endian."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return {
        "type": f"{array.dtype.kind}{array.dtype.itemsize}",
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }
