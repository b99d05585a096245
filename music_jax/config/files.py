"""Reads configs from Python files and from the `config.json` of a run."""

import os
import pathlib
import reprlib
import runpy
from typing import Any

from ml_collections import config_dict

from music_jax.config.defaults import default_config
from music_jax.config.validation import check_values, set_fields
from music_jax.errors import UserError

# Fields and groups that may change when a run resumes, since they do not affect the training.
FREE_FIELDS = (
    "backbone.remat",
    "checkpoint",
    "compute_dtype",  # Parameters stay float32, and the run logs from which step it differs.
    "dataset.data_dir",
    "dataset.manual_dir",
    "dataset.max_skipped_share",
    "dataset.test_split",
    "dataset.try_gcs",
    "deterministic",
    "evaluation",
    "few_shot",
    "finetune",
    "guards",
    "knn",
    "linear_eval",
    "log_every_steps",
    "num_decode_threads",
    "online_probe",
    "semi_supervised",
    "sharding",
    "tensorboard",
    "wandb_project",
)
# Groups of earlier versions that did not affect the training either.
_REMOVED_GROUPS = ("clustering", "retrieval")


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns the paths of the config files that come with the package, by name."""
    package = pathlib.Path(__file__).parents[1]
    folder = package / "configs"
    if not folder.is_dir():  # a clone, in which the folder is beside the package
        folder = package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def from_file(path: str | os.PathLike[str], **fields: Any) -> config_dict.ConfigDict:
    """Returns the config of a config file, with some fields changed.

        config = from_file("digits", num_epochs=8, objective={"num_segments": 16})

    Args:
      path: A Python file with a function `get_config`, or the name of a config that comes with the
        package, such as `mnist5k`.
      **fields: Values of fields by name; those of a group as a dictionary.

    Returns:
      The config.

    Raises:
      UserError: The file cannot be read or has no such function, there is no such field, or a
        field does not take such a value.
    """
    name = os.fspath(path)
    shipped = shipped_configs()
    file = name if os.path.isfile(name) else str(shipped.get(name, name))
    try:
        get_config = runpy.run_path(file)["get_config"]
    except Exception as error:  # A config file may raise anything.
        if not os.path.exists(file):
            raise UserError(
                f"there is no config file {name!r}; give the path of one, or one of the names "
                f"{', '.join(shipped)}"
            ) from error
        raise UserError(
            f"{name!r} is not a config file, such as configs/digits.py: {_reason(error)}"
        ) from error
    try:
        config = get_config()
    except Exception as error:
        raise UserError(f"the config file {name!r} fails: {_reason(error)}") from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"get_config of the config file {name!r} must return a config, as "
            f"music_jax.config.default_config makes one; got {config!r:.100}"
        )
    set_fields(config, fields)
    check_values(config)
    return config


def _reason(error: Exception) -> str:
    """Returns the message of an error in one line, without the field list of ml_collections."""
    name = type(error).__name__
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    message, _, rest = text.partition("Other fields present")
    hint = rest.rpartition("Did you mean")
    return " ".join(f"{name}: {message}{hint[1]}{hint[2] if hint[1] else ''}".split())


def from_json(record: dict[str, Any]) -> config_dict.ConfigDict:
    """Returns the config in a `config.json`, of this version of the package or another one.

    Fields that it lacks get their defaults. Fields that this version lacks are dropped if they do
    not affect the training.

    Args:
      record: The JSON object.

    Raises:
      UserError: It has a field that this version lacks and that affects the training, or a value of
        the wrong type.
    """
    config = default_config()
    try:
        config.update(_known_fields(record, config.to_dict()))
    except Exception as error:  # A damaged record makes a ConfigDict raise anything.
        reason = " ".join(str(error).split("Other fields present")[0].split())
        raise UserError(f"the saved config does not fit this version: {reason[:300]}") from error
    return config


def _known_fields(record: dict[str, Any], known: dict[str, Any], prefix: str = "") -> Any:
    """Drops unknown free fields and converts lists to tuples."""
    kept = {}
    for key, value in record.items():
        if key not in known and is_free(prefix + key):
            continue
        if isinstance(value, dict) and isinstance(known.get(key), dict):
            value = _known_fields(value, known[key], f"{prefix}{key}.")
        kept[key] = tuple(value) if isinstance(value, list) else value
    return kept


def is_free(field: str) -> bool:
    """Returns whether the field of a dotted name may change when a run resumes."""
    free = (*FREE_FIELDS, *_REMOVED_GROUPS)
    return any(field == name or field.startswith(name + ".") for name in free)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted name and both values of each field that differs and is not free."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        if is_free(name):
            continue
        a, b = old.get(key), new.get(key)
        if name == "dataset.path" and isinstance(a, str) and isinstance(b, str):
            a, b = normalize_path(a), normalize_path(b)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, name + ".")
        elif a != b:
            found.append(f"{name}: {reprlib.repr(a)} there, {reprlib.repr(b)} now")
    return found


def normalize_path(path: str) -> str:
    """Returns one name for all spellings of a folder: `~` expanded, no `./`, `//` or final `/`.

    Links are not resolved, a relative path stays relative, and the name of a TFDS split or the
    address of a bucket stays as it is.
    """
    if not path or "://" in path:
        return path
    return os.path.normpath(os.path.expanduser(path))
