"""The page: what was gathered, the library that draws it, and the scripts, in one file."""

import base64
import contextlib
import functools
import gzip
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import markupsafe
import plotly.offline
from etils import epath

from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UserError
from music_jax.report import curves, overview
from music_jax.report.gathering import Shown, gather, payload
from music_jax.report.reading import Recorded, read_workdirs
from music_jax.version import __version__
from music_jax.workdir.files import check_writable, write_new

LARGEST = 9_500_000  # bytes of a report

# Sides, in pixels, of thumbnails and of the joint-probability matrix: the first that fit.
_LEVELS = ((64, 1024), (48, 768), (40, 512), (32, 384), (24, 256), (16, 128))

_SCRIPTS = ("start.js", "charts.js", "curves.js", "segments.js", "images.js", "main.js")
_PLACE = "music_jax.report"


class _Sprites:
    """Image files as style rules, each once though several runs may show the same images."""

    def __init__(self) -> None:
        self.rules: dict[str, str] = {}

    def add(self, url: str) -> str:
        """The class of elements that show a file."""
        name = f"sprite-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
        self.rules[name] = f".{name}{{background-image:url({url})}}"
        return name


def write_report(
    workdirs: list[str],
    *,
    output: str | None = None,
    num_images: int = 1000,
    overrides: dict[str, object] | None = None,
) -> tuple[epath.Path, int]:
    """Writes the report of some runs.

    Args:
      workdirs: of the runs.
      output: the file; by default `report.html` in the first workdir.
      num_images: how many images of each run to show and measure.
      overrides: Config fields, by dotted name, to open the runs with in place of their own.

    Returns:
      The file and its size in bytes.

    Raises:
      UserError: a workdir is not there or holds no run, the file cannot be written, or there are
        too many runs for one.
    """
    recorded = read_workdirs(workdirs)
    path = epath.Path(output).expanduser() if output else recorded[0].path / "report.html"
    if path.is_dir():
        raise UserError(f"--output={output} is a directory; name a file in it")
    with _writing(path):  # fails now, not after all that is computed
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    html = render([gather(run, num_images, overrides) for run in recorded])
    with _writing(path):
        write_new(path, html)
    return path, len(html)


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; name another file with --output") from error


def render(shown: list[Shown]) -> bytes:
    """The report as UTF-8.

    Raises:
      UserError: it would be too large even with the smallest pictures.
    """
    for tile, matrix in _LEVELS:
        html = _page(shown, tile=tile, matrix=matrix)
        if len(html) <= LARGEST:
            return html
    raise UserError(
        f"a report of {len(shown)} runs would be larger than {LARGEST / 1e6:.1f} MB; name fewer "
        "with --workdir, or show fewer images with --images"
    )


def _page(shown: list[Shown], *, tile: int, matrix: int) -> bytes:
    runs, sprites = [run.recorded for run in shown], _Sprites()
    kinds, everything = curves.kinds(runs), []
    for run in shown:
        data, files = payload(run, tile=tile, matrix=matrix)
        for name, url in files.items():
            data[f"{name}Class"] = sprites.add(url)
        recorded = run.recorded
        points, bounds = curves.points(recorded), curves.bounds(recorded)
        # In the order of the charts: a name from a file would be a key that may mean something.
        data |= {
            "name": recorded.name,
            "curves": {
                "step": points["step"],
                "epoch": points["epoch"],
                "values": [points.get(kind.name) for kind in kinds],
            },
            "bounds": [bounds.get(kind.name) for kind in kinds],
        }
        everything.append(data)
    charts = [
        {
            **kind._asdict(),
            "index": index,
            "alt": curves.described(kind, runs),
            "any_bound": _bounded(kind, runs),
        }
        for index, kind in enumerate(kinds)
    ]
    drawn = {"runs": everything, "units": [kind.unit for kind in kinds]}
    script = "\n".join(_read(name) for name in _SCRIPTS)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("report.html.jinja").render(
        runs=[_tables(run) for run in shown],
        title=" · ".join(run.name for run in runs),
        facts=overview.facts(runs, [run.num_training_images for run in shown]),
        fields=overview.fields(runs),
        differing=overview.differing(runs),
        scores=overview.scores(runs),
        figures=overview.figures(runs),
        charts=charts,
        thinned=any(map(curves.is_thinned, runs)),
        any_segments=any(run.segments for run in shown),
        version=__version__,
        style=_raw(_read("report.css") + "\n" + "\n".join(sprites.rules.values())),
        script=_raw(script),
        hashes=" ".join(_hash(each) for each in (_plot_library(), script)),
        library=_raw(_compressed_library()),
        data=_raw(_compressed(json.dumps(drawn, allow_nan=False, separators=(",", ":")))),
    )
    return escape_surrogates(text).encode()


class _Tables(NamedTuple):
    """What the template writes of a run."""

    shown: Shown
    name: str
    state: str
    stale: str | None
    headline: list[tuple[str, str, str]]
    history: dict[str, Any]
    notes: tuple[str, ...]


def _tables(shown: Shown) -> _Tables:
    run = shown.recorded
    return _Tables(
        shown=shown,
        name=run.name,
        state=overview.state(run),
        stale=overview.stale(run),
        headline=overview.headline(run),
        history=overview.history(run),
        notes=run.notes,
    )


def _bounded(kind: curves.Kind, runs: list[Recorded]) -> bool:
    return any(kind.name in curves.bounds(run) for run in runs)


@functools.cache
def _plot_library() -> str:
    return plotly.offline.get_plotlyjs()


@functools.cache
def _compressed_library() -> str:
    return _compressed(_plot_library())


def _compressed(text: str) -> str:
    """Text as the page's scripts read it back, of letters that mean nothing to HTML."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    """By which the page's policy lets a script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (resources.files(_PLACE) / "page" / name).read_text("utf-8")


def _raw(text: str) -> markupsafe.Markup:
    """Text of our own, to be written as it is."""
    return markupsafe.Markup(text)
