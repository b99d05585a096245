"""The files beside the checkpoints: config.json, metrics.jsonl, events.jsonl, skipped.jsonl."""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_dict

from music_jax.config import differences, from_json
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import is_main_process
from music_jax.errors import UserError
from music_jax.version import __version__
from music_jax.workdir import places
from music_jax.workdir.appending import Appended, open_to_append
from music_jax.workdir.epath_corrections import check_checkpoint_path
from music_jax.workdir.json_files import parse_json, read_json
from music_jax.workdir.new_file import check_writable, write_new

_logger = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def open_workdir(path: str, *, create: bool = True) -> epath.Path:
    """Makes the workdir if needed and checks that it can be written to.

    Raises:
      UserError: it cannot be made or written to, has a link that leads out of it (other than
        `checkpoints`), a pipe or a device in it, or (without `create`) is not there.
    """
    workdir = absolute(path)
    check_checkpoint_path(workdir)
    check_reachable(path)
    if not create and not workdir.exists():
        raise UserError(f"the workdir {path} does not exist")
    if "://" not in str(path):
        _check_nothing_leads_out(os.fspath(workdir))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        check_writable(workdir)
    except FileExistsError as error:
        raise UserError(f"the workdir {path} is a file; give a directory") from error
    except OSError as error:
        raise UserError(f"cannot write to the workdir {path}: {error}") from error
    return workdir


def _check_nothing_leads_out(workdir: str) -> None:
    """Nothing that is written into the workdir may come to lie elsewhere, or wait for ever.

    Only `checkpoints` may be a link to a directory elsewhere, in which the same holds.
    """
    checkpoints = os.path.join(workdir, "checkpoints")
    roots = [workdir]
    if os.path.islink(checkpoints) and os.path.isdir(checkpoints):
        roots.append(os.path.realpath(checkpoints))
    for root in roots:
        folders = [root]
        while folders:
            try:
                entries = list(os.scandir(folders.pop()))
            except OSError:  # it may not be read, is too deep, or another process tidies up
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_symlink():
                    if entry.path != checkpoints or len(roots) == 1:
                        _check_link(entry.path, root)
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    raise UserError(f"{entry.path} in the workdir is a pipe or a device; remove it")


def _check_link(path: str, root: str) -> None:
    root = os.path.realpath(root)
    target = os.path.realpath(path) if os.path.exists(path) else "nowhere"
    if os.path.commonpath([root, os.path.abspath(target)]) != root:
        raise UserError(
            f"{path} in the workdir is a link that leads out of it, to {target}; put what it leads "
            "to in its place, or give another --workdir"
        )


def absolute(path: str) -> epath.Path:
    """The path from the root, as Orbax wants it; that of a bucket as it is.

    Raises:
      UserError: no such kind of bucket is known, or a directory is taken for one.
    """
    if "://" in str(path):
        try:
            return epath.Path(path)
        except KeyError as error:
            raise UserError(
                f"the workdir {path} is in no place that is known; give a directory or "
                "gs://BUCKET/NAME"
            ) from error
    # POSIX lets a path begin with two slashes, and TensorStore does not.
    found = epath.Path("/" + os.path.abspath(os.path.expanduser(path)).lstrip("/"))
    if "://" in str(found):
        raise UserError(f"{path} is taken for the bucket {found}; give it by another name")
    return found


def check_reachable(path: str) -> None:
    """Checks that the place of a workdir, such as a bucket, can be reached.

    Raises:
      UserError: it cannot; the message says why, and which package is missing.
    """
    if "://" not in str(path):
        return
    bucket = absolute(path)
    try:
        bucket.exists()
    except ImportError as error:
        raise UserError(
            f"cannot reach the workdir {path}: {error}; buckets need one more package: pip install "
            "gcsfs for gs://, s3fs for s3://"
        ) from error
    except Exception as error:  # whatever the client of a bucket raises
        raise UserError(
            f"cannot reach the workdir {path}: {' '.join(str(error).split())[:300]}"
        ) from error


def read_config(workdir: epath.Path) -> dict[str, Any] | None:
    """The config that a workdir's run has, or None if it has none yet.

    Raises:
      UserError: the file is there but cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        config = read_json(path)["config"]
        if not isinstance(config, dict):
            raise ValueError("'config' is not an object")
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())}; put back a copy, or, if the "
            "config that you give is this run's, remove the file: it is written anew"
        ) from error


def read_signature(workdir: epath.Path) -> object:
    """What the workdir's config.json, which `read_config` has read, has as its signature."""
    return read_json(workdir / "config.json").get("signature")


def find_workdir(path: str) -> epath.Path:
    """Finds a run's workdir to read from; nothing is written into it.

    Raises:
      UserError: It is not there or holds no run.
    """
    check_reachable(path)
    workdir = absolute(path)
    if not workdir.exists():
        raise UserError(f"the workdir {path} does not exist")
    if not (workdir / "config.json").exists():
        raise UserError(f"{path} holds no run: it has no config.json")
    return workdir


def check_same_run(workdir: epath.Path, config: config_dict.ConfigDict) -> None:
    """Checks that a workdir's run, if it has one, trains what the config says.

    Fields that did not exist when the run was saved had their present defaults.

    Raises:
      UserError: it trains something else; the message names what differs.
    """
    old = read_config(workdir)
    if old is None:
        return
    differing = differences(as_json(from_json(old)), as_json(config))
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{workdir} holds another run ({'; '.join(differing[:3])}{more}); give the same config "
            "to go on with it, or another --workdir"
        )
    before, now = old.get("compute_dtype"), config.compute_dtype
    if before is not None and before != now:
        _logger.info(f"computing in {now} from here on, in {before} before")


def as_json(config: config_dict.ConfigDict) -> dict[str, Any]:
    """The config as it reads back from JSON: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def write_config(workdir: epath.Path, config: config_dict.ConfigDict) -> None:
    """Writes config.json: the resolved config, the packages' versions and the devices."""
    record = {
        "config": as_json(config),
        "versions": {
            "music_jax": __version__,
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "devices": {
            "platform": jax.devices()[0].platform,
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "signature": places.sign(config),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(workdir / "config.json", record)


def write_json(path: epath.Path, record: dict[str, Any]) -> None:
    """Writes a JSON file so that a reader finds either the old one or the new one, whole.

    Raises:
      ValueError: a number in it is not finite, which JSON has no name for.
    """
    write_new(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def open_skipped(workdir: epath.Path, config: config_dict.ConfigDict) -> SkippedImages:
    """Opens skipped.jsonl: this process's notes of images that cannot be decoded."""
    return SkippedImages(
        workdir,
        max_share=config.dataset.max_skipped_share,
        process_index=jax.process_index(),
        num_processes=jax.process_count(),
    )


def join_skipped(skipped: SkippedImages, source: Source | None = None) -> None:
    """Joins what all processes noted in skipped.jsonl; all processes call this together.

    Args:
      skipped: what this process noted.
      source: images of which those that earlier runs skipped count too.

    Raises:
      UnusableDataError: on process 0, if more of a source's images are skipped, by all processes
        together, than may be; the others then wait to be told.
    """
    skipped.close()
    _wait_for_all("skipped images noted")
    if jax.process_index() == 0:
        try:
            skipped.merge()
        finally:
            skipped.close()
        if source is not None:
            skipped.check(source)
    _wait_for_all("skipped images joined")


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def report_skipped(skipped: SkippedImages) -> None:
    """Joins what all processes noted, which may raise, and says how many images were skipped."""
    join_skipped(skipped)
    if jax.process_index() == 0 and len(skipped):
        _logger.info(skipped.summary())


class MetricsLog:
    """metrics.jsonl: one line a logged step, each step once; written by the main process alone."""

    def __init__(self, workdir: epath.Path, start_step: int, *, ignore_failures: bool = False):
        """Opens the file, without what was logged after `start_step` by a run that was cut off.

        Lines that cannot be read, or that repeat a step, are left out, and one line says so.

        Args:
          workdir: of the run.
          start_step: the step that the run goes on from.
          ignore_failures: on a full disk, say so once and write the lines when there is room, in
            place of raising OSError.
        """
        self._ignore_failures = ignore_failures
        self._failed = False
        self._file = (
            self._open(workdir / "metrics.jsonl", start_step) if is_main_process() else None
        )

    @staticmethod
    def _open(path: epath.Path, start_step: int) -> Appended:
        before = path.read_bytes() if path.exists() else b""
        kept: dict[int, bytes] = {}
        lines, last = before.splitlines(), 0
        for line in lines:
            step = _step_of(line)
            if step is not None and step > last:
                kept[step], last = line, step
        lost = len(lines) - len(kept)
        # The last line of a run that was cut off may be half a line: that is no damage.
        lost -= bool(lines and not before.endswith(b"\n") and _step_of(lines[-1]) is None)
        if lost:
            _logger.info(f"{path}: {lost} damaged or repeated lines are left out")
        after = b"".join(line + b"\n" for step, line in kept.items() if step <= start_step)
        if after != before:
            write_new(path, after)
        return open_to_append(path)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self.flush()

    def flush(self, *, now: bool = False) -> None:
        """Makes the lines visible to others, in a bucket some seconds later or `now`."""
        if self._file is not None:
            with self._failures_told():
                self._file.flush(now=now)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with self._failures_told():
                self._file.close()

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._ignore_failures:
                raise
            if not self._failed:
                self._failed = True
                _logger.info(f"metrics.jsonl is behind: {error}")


class EventsLog:
    """events.jsonl: a line for each resume, tripped guard, rewind, skip or failed save, as it came.

    Unlike metrics.jsonl it tells of every attempt, and nothing is ever taken out. Every process may
    write; what the others write is dropped but for the main one's. A full disk, itself worth a
    line, is no error here: the lines are written when there is room.
    """

    def __init__(self, workdir: epath.Path):
        """Names the file, and ends a line that was cut off."""
        self._file: Appended | None = None
        self._failed = False
        if is_main_process():
            path = workdir / "events.jsonl"
            cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
            self._file = open_to_append(path)
            if cut_off:
                self._file.write("\n")

    def write(self, event: str, **fields: Any) -> None:
        """Adds a line; numbers that JSON cannot hold become text."""
        if self._file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"event": event, "time": now} | finite(fields)
        self._file.write(json.dumps(record) + "\n")
        self._try(self._file.flush)

    def close(self) -> None:
        """Makes all lines visible to others."""
        if self._file is not None:
            self._try(self._file.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if not self._failed:
                self._failed = True
                _logger.info(f"events.jsonl is behind: {error}")


def finite(value: Any) -> Any:
    """The value with every number that JSON has no name for as text, such as "nan"."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _step_of(line: bytes) -> int | None:
    """The line's step; None for a line that is damaged or was cut off."""
    try:
        step = parse_json(line.decode())["step"]
        return step if type(step) is int and step >= 0 else None
    except (ValueError, KeyError, TypeError):
        return None
