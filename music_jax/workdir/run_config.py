"""config.json of a run: writes it, reads it, and decides which of its data locations to trust.

A data location that only the run's own files name is used only if this user's `main` wrote that
config, which a signature proves, or if the user names it on the command line.
"""

import contextlib
import datetime
import functools
import hashlib
import hmac
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import secrets
import shlex
import stat
import subprocess
import sys
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_dict

from music_jax.config import default_config, differences, from_json, get_field
from music_jax.errors import UserError, first_of, one_line
from music_jax.version import __version__
from music_jax.workdir.directory import user_directory
from music_jax.workdir.files import read_bytes, read_json, read_record, write_json

_logger = logging.getLogger(__name__)

# Config fields by which an evaluation finds its data. Only some values of `dataset.name` are
# locations; others name a dataset in the user's own TFDS directory.
DATA_FIELDS = (
    "dataset.name",
    "dataset.path",
    "dataset.options",
    "dataset.data_dir",
    "dataset.manual_dir",
    "evaluation.train",
    "evaluation.test",
    "semi_supervised.lists",
)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_TFDS_NAME = re.compile(r"\w+(/[\w.-]+)?(:\d[\w.*]*)?")  # NAME, NAME/CONFIG, either with :VERSION
_KEY_BYTES = 32
_NAMED_FIRST = ("dataset.", "objective.", "backbone.")  # of the fields in which two runs differ


def as_json(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Returns a config with the types of JSON: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def write_config(workdir: epath.Path, config: config_dict.ConfigDict) -> None:
    """Writes config.json: the resolved config, its signature, versions of packages and devices.

    Versions with which the run was started or resumed before stay in `earlier_versions`.
    """
    versions, before = _versions(), read_record(workdir / "config.json")
    earlier = before.get("earlier_versions")
    found = [*(earlier if isinstance(earlier, list) else []), before.get("versions")]
    # Anyone may have written the file.
    found = [x for x in found if isinstance(x, dict) and {str} >= set(map(type, x.values()))]
    earlier = found[:-1] if found[-1:] == [versions] else found
    record = {
        "config": as_json(config),
        "versions": versions,
        "earlier_versions": earlier,
        "devices": {
            "platform": jax.devices()[0].platform,
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "signature": sign(config),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(workdir / "config.json", record)


def _versions() -> dict[str, str]:
    """Returns the versions of this package, of Python and of the packages that affect results."""
    return {
        "music_jax": __version__,
        **({"commit": commit} if (commit := _commit()) else {}),
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _commit() -> str:
    """Returns the commit of the clone that this is run from, with `-dirty` if files differ."""
    clone = pathlib.Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return ""
    ask = ["git", "--no-optional-locks", "describe", "--always", "--exclude=*", "--abbrev=12"]
    # In a hook of Git these name another repository.
    others = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            [*ask, "--dirty"],
            cwd=clone,
            env={name: value for name, value in os.environ.items() if name not in others},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()
    return ""


def read_config(workdir: epath.Path) -> dict[str, Any] | None:
    """Reads the config of a run; returns None if the directory does not hold one yet.

    Raises:
      UserError: The file config.json exists but cannot be read.
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
            f"cannot read {path}: {one_line(error)}; restore a copy or, if you give "
            "the run's own config, remove the file: it is written again"
        ) from error


def read_signature(workdir: epath.Path) -> object:
    """Reads the signature in a config.json that `read_config` has accepted."""
    return read_json(workdir / "config.json").get("signature")


def check_same_run(workdir: epath.Path, config: config_dict.ConfigDict) -> None:
    """Checks that the run in a directory, if there is one, has an equivalent config.

    Fields that did not exist when the run was saved get their current defaults. A config without
    statistics of the channels is that of a run which has computed them.

    Raises:
      UserError: Fields that affect the training differ; the message gives the differences.
    """
    old = read_config(workdir)
    if old is None:
        return
    before, now = as_json(from_json(old)), as_json(config)
    if not config.dataset.mean:
        now["dataset"] |= {name: before["dataset"][name] for name in ("mean", "std")}
    differing = differences(before, now)
    if differing:
        differing.sort(key=lambda text: not text.startswith(_NAMED_FIRST))
        reasons = first_of(differing, separator="; ")
        raise UserError(
            f"{workdir} holds another run ({reasons}); give the same config to resume it, or "
            "another --workdir"
        )
    dtype = old.get("compute_dtype")
    if dtype is not None and dtype != config.compute_dtype:
        _logger.warning(f"computing in {config.compute_dtype} from here on, in {dtype} before")


def sign(config: config_dict.ConfigDict) -> str | None:
    """Signs the data locations of a config with a key that only this user can read.

    Returns:
      The signature; None, with a warning, if the key cannot be stored.
    """
    try:
        return _signature(config, _key(create=True))
    except OSError as error:
        if _locations(config):
            _logger.warning(
                f"the run is not signed: {error}; commands that evaluate it will ask for the "
                "locations of its data"
            )
        return None


def is_signed(config: config_dict.ConfigDict, signature: object) -> bool:
    """Returns whether this user's key made a config's signature; all processes of a run agree."""
    try:
        own = isinstance(signature, str) and hmac.compare_digest(
            signature.encode(errors="replace"), _signature(config, _key(create=False)).encode()
        )
    except OSError:
        own = False
    if jax.process_count() > 1:
        own = bool(multihost_utils.broadcast_one_to_all(np.asarray(own)))
    return own


def exclude_foreign_data(
    config: config_dict.ConfigDict,
    given: Collection[str],
    workdir: str,
    *,
    labels: bool,
    images: bool,
) -> None:
    """Resets data locations that the user did not give, in a config that this user did not sign.

    Args:
      config: Config of the run, with the values that the user gave; changed in place.
      given: Fields that the user gave on the command line.
      workdir: Directory of the run, for the message.
      labels: Whether labeled images are needed.
      images: Whether any images are needed.

    Raises:
      UserError: The evaluation needs such a location: the user did not name the sets that it reads.
    """
    foreign = {field: value for field, value in _locations(config).items() if field not in given}
    config.update_from_flattened_dict({field: _defaults()[field] for field in foreign})
    named = config.evaluation.test and (config.evaluation.train or not labels)
    if foreign and images and (not named or (labels and "semi_supervised.lists" in foreign)):
        flags = " ".join(f"--config.{field}={_quote(value)}" for field, value in foreign.items())
        raise UserError(
            f"{workdir} was not trained by this user on this machine, so data is not read from "
            f"locations that only its config.json names; give these, or others, yourself: {flags}"
        )


def _locations(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Returns the data locations that a config names, by field."""
    found = {}
    for field, default in _defaults().items():
        value = _value(config, field)
        if value != default and not (field == "dataset.name" and _TFDS_NAME.fullmatch(value)):
            found[field] = value
    return found


@functools.cache
def _defaults() -> dict[str, Any]:
    config = default_config()
    return {field: _value(config, field) for field in DATA_FIELDS}


def _value(config: config_dict.ConfigDict, field: str) -> Any:
    value = get_field(config, field)
    return value.to_dict() if isinstance(value, config_dict.ConfigDict) else value


def _quote(value: Any) -> str:
    text = str(value)
    return shlex.quote(text) if text.isprintable() else "LOCATION"


def _signature(config: config_dict.ConfigDict, key: bytes) -> str:
    locations = {"dataset.name": config.dataset.name} | _locations(config)
    text = "music_jax places " + json.dumps(locations, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(*, create: bool) -> bytes:
    """Reads this user's secret key, and creates it first if there is none.

    Raises:
      OSError: It cannot be read, or others can read it.
    """
    path = user_directory("state", create=create) / "key"
    if create and not path.exists():
        temporary = path.with_name(f"key.{secrets.token_hex(8)}")
        temporary.touch(mode=0o600, exist_ok=False)
        try:
            temporary.write_bytes(secrets.token_bytes(_KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # never replaces the key of a process that was faster
        finally:
            temporary.unlink()
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise OSError(f"others can read {path}; remove it, and a new one is made")
    key = read_bytes(path)
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path} is damaged; remove it, and a new one is made")
    return key
