"""Cells of a comparison, each a training with its evaluation, and their results on disk."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax.config import default_config
from music_jax.config.fields import OPTIONS, flatten
from music_jax.distributed.shares import Share
from music_jax.errors import UserError
from music_jax.workdir.files import new_file, read_json, read_npz, write_json
from music_jax.workdir.run_config import as_json

Result = dict[str, Any]
# A search measures on validation images, a final cell on test images; a reference is no
# self-supervised training.
Kind = Literal["search", "final", "reference"]

# Config fields that do not affect a result.
_FREE = (
    *("dataset.data_dir", "dataset.manual_dir", "dataset.try_gcs", "log_every_steps"),
    *("num_decode_threads", "tensorboard", "wandb_project", "checkpoint", "sharding"),
)
_MAX_BYTES = 2**26  # of the predictions in a file


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training with its evaluation.

    Attributes:
      name: Name of its files, relative to the directory of the results.
      index: Index among the cells of its group, by which cells are divided among workers.
      kind: What is measured.
      fields: Config fields that differ from the comparison's config, with JSON values.
      start: Name of the collapsed state that it starts from, or "".
      reference: Name of the reference, or "".
      cost: Number of images that are trained on, counted in every epoch.
    """

    name: str
    index: int
    kind: Kind
    fields: Mapping[str, Any] = dataclasses.field(hash=False)
    start: str = ""
    reference: str = ""
    cost: float = 0.0

    @property
    def group(self) -> str:
        """Name of the cells that share its compiled programs."""
        return self.name.rpartition("/")[0]

    def owner(self, count: int) -> int:
        """Returns which of a number of workers runs the cell, from 0."""
        return (self.index + zlib.crc32(self.group.encode())) % count

    def is_in_share(self, share: Share) -> bool:
        """Returns whether the cell is one of those of a worker."""
        return self.owner(share.count) == share.index


class Results:
    """Files of the results of cells: one JSON file each, and one of predictions for final ones."""

    def __init__(self, directory: epath.Path):
        self.directory = directory
        self._found: dict[str, Result] = {}

    def read(self, cell: Cell) -> Result | None:
        """Returns a cell's result; None if there is none yet.

        Raises:
          UserError: The file is damaged, or belongs to another cell.
        """
        if cell.name not in self._found:
            path = self.directory / f"{cell.name}.json"
            try:
                result = read_json(path)
                saved = {name: result[name] for name in ("fields", "start")}
            except FileNotFoundError:
                return None
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} cannot be read: {error!r}; delete it and rerun") from error
            if saved != _identity(cell):
                raise UserError(
                    f"{path} is the result of other settings than those of this version; choose "
                    "another --output, or check out the version that wrote it"
                )
            self._found[cell.name] = result
        return self._found[cell.name]

    def has(self, name: str) -> bool:
        """Returns whether the cell of this name has been read."""
        return name in self._found

    def write(self, cell: Cell, result: Result, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a cell's predictions, if there are any, and then its result.

        Raises:
          UserError: The labels of the test images are not those of earlier results.
        """
        path = self.directory / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        predictions = {name: array for name, array in arrays.items() if name != "labels"}
        if "labels" in arrays:
            shared = self.directory / "labels.npz"
            if not shared.exists():
                _write_arrays(shared, {"labels": arrays["labels"]})
            elif not np.array_equal(self.labels(), arrays["labels"]):
                raise UserError(
                    f"the test images are others, or in another order, than those of {shared}; "
                    "prepare the dataset as for the earlier results, or choose another --output"
                )
        if predictions:
            _write_arrays(self.directory / f"{cell.name}.npz", predictions)
        write_json(path, _identity(cell) | result)

    def predictions(self, cell: Cell) -> dict[str, np.ndarray]:
        """Returns the predictions of a final cell for the test images, by protocol.

        Raises:
          UserError: The file is missing or damaged.
        """
        return _read_arrays(self.directory / f"{cell.name}.npz")

    def labels(self) -> np.ndarray:
        """Returns the labels of the test images; raises the same errors as `predictions`."""
        return _read_arrays(self.directory / "labels.npz")["labels"]

    def check_config(self, config: config_dict.ConfigDict, **about: Any) -> None:
        """Writes sweep.json if there is none, or else compares with it.

        Args:
          config: Config of the comparison.
          **about: Further properties of the comparison, as JSON values.

        Raises:
          UserError: The directory has results of another config.
        """
        now, path = {"config": _changed_fields(config), **about}, self.directory / "sweep.json"
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(path, now)
            return
        try:
            saved = read_json(path)
            names = {*saved["config"], *now["config"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error!r}; restore a copy") from error
        differing = [n for n in sorted(names) if saved["config"].get(n) != now["config"].get(n)]
        differing += [name for name, value in about.items() if saved.get(name) != value]
        if differing:
            raise UserError(
                f"{self.directory} has results of another config: {', '.join(differing[:3])} "
                "differ; give the same arguments, or another --output"
            )


def _identity(cell: Cell) -> Result:
    return {"fields": json.loads(json.dumps(dict(cell.fields))), "start": cell.start}


def _changed_fields(config: config_dict.ConfigDict) -> Result:
    """Returns the fields that affect results and are not at their defaults."""
    default = flatten(as_json(default_config()))
    return {
        field: value
        for field, value in flatten(as_json(config)).items()
        if value != default[field]
        and (not isinstance(value, dict) or field.endswith(f".{OPTIONS}"))
        and not any(field == free or field.startswith(f"{free}.") for free in _FREE)
    }


def _write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    small = {k: x.astype(np.min_scalar_type(int(x.max()))) for k, x in arrays.items()}
    with new_file(path) as file:
        np.savez_compressed(file, allow_pickle=False, **small)


def _read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path, max_array_bytes=_MAX_BYTES)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; restore it from the repository"
        ) from error
