"""Identifies the code that made a result, so that results of different code can be told apart."""

import functools
import hashlib
import inspect
from collections import Counter
from collections.abc import Iterable
from typing import Any

from etils import epath
from ml_collections import config_dict

from music_jax import registry
from music_jax.claims.cells import Cell
from music_jax.claims.sweep import Sweep

_ROOT = epath.Path(__file__).parent.parent
# Packages and modules that affect a training or its measures.
_SOURCES = (
    *("config", "data", "evaluation", "metrics", "models", "objectives", "train"),
    *("optim.py", "claims/measure.py", "claims/probe.py", "claims/references.py"),
)


def fingerprint(config: config_dict.ConfigDict) -> str:
    """Returns hashes of the code that trains and measures a config, separated by `+`.

    The first is that of the source files of this package that affect a result; another one follows
    for each file that defines the objective or the backbone, if a user registered it. Versions of
    other packages are not covered.
    """
    parts = (
        registry.OBJECTIVES.get(config.objective.name),
        registry.BACKBONES.get(config.backbone.name),
    )
    files = [_source_file(getattr(part, "make", part)) for part in parts]
    own = [file for file in files if file and not epath.Path(file).is_relative_to(_ROOT)]
    return "+".join((_hash_package(), *map(_hash_file, own)))


def package_codes(sweep: Sweep, cells: Iterable[Cell]) -> Counter[str]:
    """Returns the number of results by the hash of this package's code, "" if it is unknown."""
    results = (sweep.results.read(cell) for cell in cells)
    return Counter(r.get("code", "").partition("+")[0] for r in results if r is not None)


def made_by_other_code(sweep: Sweep, cells: Iterable[Cell]) -> list[str]:
    """Returns the names of the cells whose results were not made by the code of this process."""
    found = ((cell, sweep.results.read(cell)) for cell in cells)
    return [
        cell.name
        for cell, result in found
        if result is not None and result.get("code") != fingerprint(sweep.cell_config(cell))
    ]


def changed_objectives(sweep: Sweep, cells: Iterable[Cell]) -> list[str]:
    """Returns the objectives with results of different versions of the user's own files."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        if (result := sweep.results.read(cell)) is not None:
            name = sweep.cell_config(cell).objective.name
            found.setdefault(name, set()).add(result.get("code", "").partition("+")[2])
    return sorted(name for name, codes in found.items() if len(codes) > 1)


def _source_file(make: Any) -> str | None:
    """Returns the file that defines a function or a class; None if it has none, as in a shell."""
    try:
        file = inspect.getsourcefile(make.func if isinstance(make, functools.partial) else make)
    except (OSError, TypeError):
        return None
    return file if file and epath.Path(file).is_file() else None


@functools.cache
def _hash_package() -> str:
    found = hashlib.sha256()
    for source in _SOURCES:
        path = _ROOT / source
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            found.update(f"{file.parent.name}/{file.name}\0".encode() + file.read_bytes())
    return found.hexdigest()[:12]


@functools.cache
def _hash_file(path: str) -> str:
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()[:12]
