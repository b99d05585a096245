"""Which places of data the files of a run may name.

A place of data that only the run's own files name is used only if `main` of this user wrote that
config (proved by a signature), or the user names it again on the command line.
"""

import functools
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import shlex
import stat
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import config_dict

from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.workdir.user_directories import state_directory

_logger = logging.getLogger(__name__)

# Config fields by which an evaluation finds its data. Only some values of `dataset.name` are
# places: others name a dataset in the user's own directory of TFDS.
FIELDS = (
    "dataset.name",
    "dataset.path",
    "dataset.data_dir",
    "dataset.manual_dir",
    "evaluation.train",
    "evaluation.test",
    "semi_supervised.lists",
)
_TFDS_NAME = re.compile(r"\w+(/[\w.-]+)?(:\d[\w.*]*)?")  # NAME, NAME/CONFIG, either with :VERSION
_KEY_BYTES = 32


def sign(config: config_dict.ConfigDict) -> str | None:
    """Signs the places that a config names, with a key that only this user can read.

    Returns:
      The signature; None, with a line that says so, where the key cannot be kept.
    """
    try:
        return _signature(config, _key(create=True))
    except OSError as error:
        if _named(config):
            _logger.info(
                f"the run is not signed: {error}; commands that evaluate it will ask for the "
                "places of its data"
            )
        return None


def is_signed(config: config_dict.ConfigDict, signature: object) -> bool:
    """Whether this user's key made the signature of a config; all processes of a run agree."""
    try:
        own = isinstance(signature, str) and hmac.compare_digest(
            signature.encode(errors="replace"), _signature(config, _key(create=False)).encode()
        )
    except OSError:
        own = False
    if jax.process_count() > 1:
        own = bool(multihost_utils.broadcast_one_to_all(np.asarray(own)))
    return own


def leave_out_foreign(
    config: config_dict.ConfigDict,
    given: Collection[str],
    workdir: str,
    *,
    labels: bool,
    images: bool,
) -> None:
    """Takes out of a config without this user's signature the places that the user did not name.

    Args:
      config: The run's config, with the user's values in place of the run's.
      given: Fields that the user named on the command line.
      workdir: The run's, for the message.
      labels: Whether labeled images are needed.
      images: Whether any images are needed.

    Raises:
      UserError: The evaluation needs such a place: the user did not name the sets that it reads.
    """
    foreign = {field: value for field, value in _named(config).items() if field not in given}
    config.update_from_flattened_dict({field: _defaults()[field] for field in foreign})
    named = config.evaluation.test and (config.evaluation.train or not labels)
    if foreign and images and (not named or (labels and "semi_supervised.lists" in foreign)):
        flags = " ".join(f"--config.{field}={_quoted(value)}" for field, value in foreign.items())
        raise UserError(
            f"{workdir} was not trained by this user on this machine, so data is not read from "
            f"places that only its config.json names; name these, or others, again: {flags}"
        )


def _named(config: config_dict.ConfigDict) -> dict[str, Any]:
    """The places that a config names, by field."""
    named = {}
    for field, default in _defaults().items():
        value = functools.reduce(getattr, field.split("."), config)
        if value != default and not (field == "dataset.name" and _TFDS_NAME.fullmatch(value)):
            named[field] = value
    return named


@functools.cache
def _defaults() -> dict[str, Any]:
    config = default_config()
    return {field: functools.reduce(getattr, field.split("."), config) for field in FIELDS}


def _quoted(value: Any) -> str:
    text = str(value)
    return shlex.quote(text) if text.isprintable() else "PLACE"


def _signature(config: config_dict.ConfigDict, key: bytes) -> str:
    named = {"dataset.name": config.dataset.name} | _named(config)
    text = "music_jax places " + json.dumps(named, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(*, create: bool) -> bytes:
    """This user's secret key, made when it is first needed.

    Raises:
      OSError: It cannot be read, or others can read it.
    """
    path = state_directory(create=create) / "key"
    if create and not path.exists():
        temporary = path.with_name(f"key.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            os.link(temporary, path)  # never over the key of a process that was faster
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise OSError(f"others can read {path}; remove it, and a new one is made")
        key = file.read()
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path} is damaged; remove it, and a new one is made")
    return key
