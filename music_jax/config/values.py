"""Names, types and ranges of a config's fields, whatever the field is for."""

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from music_jax.errors import UserError

_MAX_NUMBER = 2**32  # in any field; larger ones overflow somewhere, and are never meant


def check_values(config: config_dict.ConfigDict, default: config_dict.ConfigDict) -> None:
    """Checks that all fields are there, and numbers finite and of a size that can be meant.

    Args:
      config: the config.
      default: one that has all fields, with values of the kind that they take.

    Raises:
      UserError: a field is not as described; the message names it.
    """
    for field, value in default.to_dict().items():
        _check(config, field, value)


def _check(config: config_dict.ConfigDict, field: str, default: Any) -> None:
    value = config
    for part in field.split("."):
        if part not in value:
            raise UserError(
                f"the config lacks the field {field!r}; a config file starts from "
                "music_jax.config.default_config(), which has them all"
            )
        value = value[part]
    wrong = None
    if isinstance(default, dict):
        if not isinstance(value, config_dict.ConfigDict):
            raise UserError(f"config.{field} must be a group of fields; got {value!r}")
        for key, inner in default.items():
            _check(config, f"{field}.{key}", inner)
    elif isinstance(value, tuple):
        if default and isinstance(default[0], str):
            if not all(isinstance(text, str) and "\0" not in text for text in value):
                wrong = "be a tuple of texts without a zero byte"
        else:
            kind = int if default and isinstance(default[0], int) else int | float
            if not all(_is_meant(number) and isinstance(number, kind) for number in value):
                wrong = "be a tuple of numbers"
    elif isinstance(value, str):
        if "\0" in value:
            wrong = "hold no zero byte"
    elif value is None and default is not None:
        wrong = f"be of type {type(default).__name__}"
    elif isinstance(value, bool) and not isinstance(default, bool | None):
        wrong = "be a number"
    elif value is not None and not _is_meant(value):
        wrong = f"be a finite number up to {_MAX_NUMBER}"
    if wrong:
        raise UserError(f"config.{field} must {wrong}; got {value!r}")


def _is_meant(number: Any) -> bool:
    return isinstance(number, int | float) and abs(number) <= _MAX_NUMBER


def set_fields(
    config: config_dict.ConfigDict, fields: Mapping[str, Any], *, prefix: str = ""
) -> None:
    """Sets fields of a config, those of a group as a mapping.

    Args:
      config: the config, or a group of it.
      fields: values by name, or by dotted name.
      prefix: dotted name of the group, with a dot behind.

    Raises:
      UserError: there is no such field, or it takes no such value.
    """
    known = config.to_dict()
    for name, value in fields.items():
        field = f"{prefix}{name}"
        name, _, inner = name.partition(".")
        value = {inner: value} if inner else value
        if name not in known:
            raise UserError(unknown_field_message(field, field_names(config, prefix)))
        if isinstance(known[name], dict):
            if not isinstance(value, Mapping | config_dict.ConfigDict):
                raise UserError(
                    f"config.{field} is a group of fields and takes a dictionary such as "
                    f"{{{next(iter(known[name]))!r}: VALUE}}; got {value!r}"
                )
            set_fields(config[name], value, prefix=f"{prefix}{name}.")
            continue
        try:
            config[name] = value
        except TypeError as error:
            kind = config.get_type(name).__name__
            raise UserError(f"config.{field} must be of type {kind}; got {value!r}") from error


def field_names(config: config_dict.ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a config, inner ones included."""
    names = []
    for key in config:
        value = config.get_ref(key).get() if config.get_ref(key) is not None else None
        names.append(prefix + key)
        if isinstance(value, config_dict.ConfigDict):
            names += field_names(value, f"{prefix}{key}.")
    return names


def unknown_field_message(field: str, known: Sequence[str]) -> str:
    """Says that a config has no such field, and which known one is nearest."""
    last = field.rpartition(".")[2]
    same_ending = [name for name in known if name.rpartition(".")[2] == last]
    nearest = difflib.get_close_matches(field, same_ending or known, n=1, cutoff=0.0)
    return f"the config has no field {field!r}; the nearest known one is {nearest[0]!r}"


def normalize_path(path: str) -> str:
    """Returns one name for all spellings of a folder: `~` expanded, no `./`, `//` or final `/`.

    Links are not resolved, a relative path stays relative, and the name of a TFDS split or the
    address of a bucket stays as it is.
    """
    if not path or "://" in path:
        return path
    return os.path.normpath(os.path.expanduser(path))
