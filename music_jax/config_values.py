"""Whether the values of a config can be meant at all, whatever the field is for."""

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
    elif not (value is None and default is None) and not _is_meant(value):
        wrong = f"be a finite number up to {_MAX_NUMBER}"
    if wrong:
        raise UserError(f"config.{field} must {wrong}; got {value!r}")


def _is_meant(number: Any) -> bool:
    return isinstance(number, int | float) and abs(number) <= _MAX_NUMBER
