"""Writes the report: measurements, the plotting library and the scripts, in one HTML file."""

import base64
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
import markupsafe
import numpy as np
import plotly.offline
from etils import epath

from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import MusicError, UserError
from music_jax.evaluation.run import load_run
from music_jax.report import measures, tables
from music_jax.report.reading import RecordedRun, as_text, read_workdirs
from music_jax.version import __version__
from music_jax.workdir.files import check_writable, write_new

_logger = logging.getLogger(__name__)

MAX_BYTES = 9_500_000

# Sides, in pixels, of thumbnails and of the joint-probability matrix; the first that fit are used.
_SIDES = ((64, 1024), (48, 768), (40, 512), (32, 384), (24, 256), (16, 128))
_MAX_NAME = 80  # characters of an image's name
_SCRIPTS = ("start.js", "charts.js", "curves.js", "segments.js", "images.js", "main.js")


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """A run with the measurements that the report shows.

    Without a checkpoint or images, `missing` is the reason, and what needs them is not measured.
    """

    recorded: RecordedRun
    sample: measures.Sample | None = None
    missing: str = ""
    segments: measures.Segments | None = None
    maps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    neighbors: tuple[np.ndarray, np.ndarray] | None = None
    confusion: measures.Confusion | None = None
    num_training_images: int | None = None


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
    with _writing(path):  # fail now, not after all computations
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    html = render([measure_run(run, num_images, overrides) for run in recorded])
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
    recorded: RecordedRun, num_images: int, overrides: dict[str, object] | None = None
) -> ReportedRun:
    """Loads a run's network and images, if possible, and measures it for the report.

    Args:
      recorded: Records of the run.
      num_images: Number of images to show and measure.
      overrides: Config fields, by dotted name, that replace those of the run.
    """
    try:
        run = load_run(str(recorded.path), read_only=True, overrides=overrides)
        sample = measures.sample_images(run, num_images)
    except (MusicError, OSError) as error:
        missing = " ".join(str(error).split())
        _logger.warning(f"{recorded.name}: no images are shown: {missing}")
        return ReportedRun(recorded, missing=missing, confusion=_confusion(recorded))
    objective = run.config.objective
    segments = recorded.segments and measures.measure_sample_segments(
        sample, num_segments=objective.num_segments, temperature=objective.temperature
    )
    _logger.info(f"{recorded.name}: map of {len(sample.indices):,} images")
    maps = {
        name: measures.tsne_map(vectors)
        for name, vectors in (("embedding", sample.embeddings), ("features", sample.features))
    }
    if run.sources is None:
        num_training_images: int | None = len(run.images)
    else:
        num_training_images = None if run.config.evaluation.train else len(run.sources.train)
    return ReportedRun(
        recorded,
        sample=sample,
        segments=segments,
        maps={name: place for name, place in maps.items() if place is not None},
        neighbors=measures.neighbors(sample.features),
        confusion=_confusion(recorded, sample.class_names),
        num_training_images=num_training_images,
    )


def _confusion(
    recorded: RecordedRun, class_names: tuple[str, ...] = ()
) -> measures.Confusion | None:
    names = [as_text(name, _MAX_NAME) for name in class_names]
    found = recorded.predictions
    return None if found is None else measures.count_confusions(found, names)


def render(runs: list[ReportedRun]) -> bytes:
    """Renders the report as UTF-8.

    Raises:
      UserError: The report would be too large even with the smallest pictures.
    """
    for tile, matrix in _SIDES:
        html = _page(runs, tile=tile, matrix=matrix)
        if len(html) <= MAX_BYTES:
            return html
    raise UserError(
        f"a report of {len(runs)} runs would be larger than {MAX_BYTES / 1e6:.1f} MB; name fewer "
        "runs with --workdir or show fewer images with --images"
    )


def _page(runs: list[ReportedRun], *, tile: int, matrix: int) -> bytes:
    recorded = [run.recorded for run in runs]
    curves, data = tables.curves(recorded), []
    sprites: dict[str, str] = {}  # style rules by class; runs may share images
    for run in runs:
        run_data = _picture_data(run, tile=tile, matrix=matrix, sprites=sprites)
        points, bounds = tables.points(run.recorded), tables.bounds(run.recorded)
        # Values are in the order of the charts: names from a file could be special keys.
        run_data |= {
            "name": run.recorded.name,
            "curves": {
                "step": points["step"],
                "epoch": points["epoch"],
                "values": [points.get(curve.name) for curve in curves],
            },
            "bounds": [bounds.get(curve.name) for curve in curves],
        }
        data.append(run_data)
    charts = [
        {
            **curve._asdict(),
            "index": index,
            "alt": tables.describe(curve, recorded),
            "any_bound": any(curve.name in tables.bounds(run) for run in recorded),
        }
        for index, curve in enumerate(curves)
    ]
    script = "\n".join(map(_read, _SCRIPTS))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("report.html.jinja").render(
        runs=runs,
        tables=tables,
        title=" · ".join(run.name for run in recorded),
        facts=tables.facts(recorded, [run.num_training_images for run in runs]),
        fields=tables.fields(recorded),
        differing_fields=tables.differing_fields(recorded),
        scores=tables.scores(recorded),
        results=tables.results(recorded),
        charts=charts,
        thinned=any(map(tables.is_thinned, recorded)),
        any_segments=any(run.segments for run in runs),
        version=__version__,
        # Our own text, which is not escaped.
        style=markupsafe.Markup("\n".join([_read("report.css"), *sprites.values()])),
        script=markupsafe.Markup(script),
        hashes=" ".join(map(_policy_hash, (plotly.offline.get_plotlyjs(), script))),
        library=markupsafe.Markup(_compressed_library()),
        data=markupsafe.Markup(
            _compress(
                json.dumps(
                    {"runs": data, "units": [curve.unit for curve in curves]},
                    allow_nan=False,
                    separators=(",", ":"),
                )
            )
        ),
    )
    return escape_surrogates(text).encode()


def _read(name: str) -> str:
    return (resources.files("music_jax.report") / "page" / name).read_text("utf-8")


@functools.cache
def _compressed_library() -> str:
    return _compress(plotly.offline.get_plotlyjs())


def _compress(text: str) -> str:
    """Compresses text for the page's scripts, in characters that need no escape in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _policy_hash(script: str) -> str:
    """Returns the hash by which the content security policy allows a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _picture_data(
    run: ReportedRun, *, tile: int, matrix: int, sprites: dict[str, str]
) -> dict[str, Any]:
    """Returns the data of a run's pictures for the page's scripts, as JSON values.

    Args:
      run: Run.
      tile: Largest side of a thumbnail, in pixels.
      matrix: Largest side of the joint-probability matrix.
      sprites: Style rules of image files, to which those of the run are added.
    """
    sample, segments, confusion = run.sample, run.segments, run.confusion
    data: dict[str, Any] = {"confusion": None}
    if confusion is not None:
        counts = _pack(confusion.counts.astype(np.uint32))
        data["confusion"] = {"names": confusion.names, "counts": counts}
    if sample is None:
        return data
    thumbs, data["thumbsClass"] = _sprite(sample.pixels, tile, sprites)
    num_viewed, columns = sample.views.shape[:2]
    flat_views = sample.views.reshape(-1, *sample.views.shape[2:])
    views, data["viewsClass"] = _sprite(flat_views, 2 * tile, sprites, columns=columns)
    predicted = measures.predictions_of(sample, run.recorded.predictions)
    data |= {
        "images": {
            **thumbs,
            "count": len(sample.indices),
            "side": sample.pixels.shape[1],
            "names": [as_text(name, _MAX_NAME) for name in sample.names],
            "labels": _pack(sample.labels.astype(np.int16)),
            "predicted": _pack(predicted.astype(np.int16)),
        },
        "classes": [as_text(name, _MAX_NAME) for name in sample.class_names]
        or [str(i) for i in range(sample.num_classes)],
        "views": {**views, "count": num_viewed, "pairs": (columns - 1) // 2},
        "maps": {
            name: _pack(np.round(60000 * place).astype(np.uint16))
            for name, place in run.maps.items()
        },
        "segments": None,
    }
    if run.neighbors is not None:
        rows, similarities = run.neighbors
        data["neighbors"] = {
            "rows": _pack(rows.astype(np.uint16)),
            "similarity": _pack(np.round(1000 * similarities).astype(np.int16)),
        }
    if segments is not None:
        count, units = segments.counts.shape
        joint = measures.joint_ratios(
            sample,
            segments.order,
            num_segments=count,
            temperature=float(run.recorded.field("objective.temperature", 1.0)),
            max_side=matrix,
        )
        data["segments"] = {
            "count": count,
            "units": units,
            "order": segments.order.tolist(),
            "usage": _pack(segments.measures.usage.astype(np.float32)),
            "counts": _pack(segments.counts),
            "codes": _pack(segments.codes.astype(np.uint8 if units <= 256 else np.uint16)),
            "top": _pack(segments.top),
            "certainty": _pack(np.round(255 * segments.certainty).astype(np.uint8)),
            "labelNmi": None if segments.label_nmi is None else segments.label_nmi.tolist(),
            "entropy": segments.measures.usage_entropy.tolist(),
            "confidence": segments.measures.confidence.tolist(),
            "information": _pack(segments.measures.mutual_information.astype(np.float32)),
            "joint": {
                "shown": joint.segments.tolist(),
                "levels": _pack(joint.levels),
                "low": joint.low,
                "high": joint.high,
                "pairs": len(sample.view_pairs),
            },
        }
    return data


def _sprite(
    images: np.ndarray, max_side: int, sprites: dict[str, str], *, columns: int | None = None
) -> tuple[dict[str, int], str]:
    """Packs square images into one WebP file, shrunk to a side of at most `max_side` pixels.

    Args:
      images: uint8 [images, side, side, channels].
      max_side: Largest side; smaller images keep theirs.
      sprites: Style rules by class, to which that of the file is added.
      columns: Number of columns; about the number of rows by default.

    Returns:
      The layout, where `pitch` is the distance of two images, and the class.
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
    return {"columns": columns, "rows": rows, "tile": side, "pitch": pitch}, name


def _pack(array: np.ndarray) -> dict[str, Any]:
    """Packs an array for the page's scripts, little-endian."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return {
        "type": f"{array.dtype.kind}{array.dtype.itemsize}",
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }
