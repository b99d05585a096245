"""Reads configs from Python files and from the records of saved runs, and compares records."""

import os
import pathlib
import reprlib
import runpy
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from music_jax.config.defaults import default_config, is_free
from music_jax.config.fields import (
    OPTIONS,
    check_values,
    field_names,
    flatten,
    get_field,
    unknown_field_message,
)
from music_jax.errors import UserError

_PATHS = ("backbone.init_from", "dataset.path")


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
    _set_fields(config, fields)
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

    Raises:
      UserError: It has a field that this version lacks and that affects the training, or a value of
        the wrong type.
    """
    config = default_config()
    known = field_names(config)
    try:
        if wrong := [name for name in flatten(record, separator="\0") if "." in name]:
            raise ValueError(f"the name {wrong[0]!r} has a dot")
        for name, value in flatten(record).items():
            is_group = name in known and isinstance(get_field(config, name), config_dict.ConfigDict)
            if value == {} and not (is_group or is_free(name)):
                raise ValueError(f"{name!r} is empty")
        config.update_from_flattened_dict(
            {
                field: tuple(value) if isinstance(value, list) else value
                for field, value in _leaves(record).items()
                if field in known or not is_free(field)
            }
        )
    except Exception as error:  # A damaged record makes a ConfigDict raise anything.
        reason = _reason(error)[:300]
        raise UserError(f"the saved config does not fit this version: {reason}") from error
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the dotted name and both values of each field that differs and is not free.

    Fields of local views count only if there are any.
    """
    old, new = _leaves(old), _leaves(new)
    found = []
    fields = old.keys() | new.keys()
    if not (old.get("local_views.count") or new.get("local_views.count")):
        fields = {f for f in fields if not f.startswith(("local_views.", "augmentation.local."))}
    for field in sorted(fields):
        there, here = old.get(field), new.get(field)
        if field in _PATHS and isinstance(there, str) and isinstance(here, str):
            there, here = normalize_path(there), normalize_path(here)
        if there != here and not is_free(field):
            found.append(f"{field}: {reprlib.repr(there)} there, {reprlib.repr(here)} now")
    return found


def _leaves(record: dict[str, Any]) -> dict[str, Any]:
    found = flatten(record)
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, dict) or name.endswith(f".{OPTIONS}")
    }


def normalize_path(path: str) -> str:
    """Returns one name for all spellings of a folder: `~` expanded, no `./`, `//` or final `/`.

    Links are not resolved, a relative path stays relative, and the name of a TFDS split or the
    address of a bucket stays as it is.
    """
    if not path or "://" in path:
        return path
    return os.path.normpath(os.path.expanduser(path))


def _set_fields(config: config_dict.ConfigDict, fields: Mapping[str, Any]) -> None:
    """Sets fields by name or dotted name; those of a group to a mapping."""
    known = field_names(config)
    for field, value in fields.items():
        if field not in known:
            raise UserError(unknown_field_message(field, known))
        group, _, name = field.rpartition(".")
        old = get_field(config, field)
        if isinstance(old, config_dict.ConfigDict) and name != OPTIONS:
            if not isinstance(value, Mapping | config_dict.ConfigDict):
                raise UserError(
                    f"config.{field} is a group of fields and takes a dictionary such as "
                    f"{{{next(iter(old))!r}: VALUE}}; got {value!r}"
                )
            _set_fields(config, {f"{field}.{key}": inner for key, inner in value.items()})
            continue
        try:
            get_field(config, group)[name] = value
        except TypeError as error:
            kind = get_field(config, group).get_type(name).__name__
            raise UserError(f"config.{field} must be of type {kind}; got {value!r}") from error
