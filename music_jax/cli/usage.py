"""What `--help` prints below a command's own words: its flags, those of several processes last."""

import textwrap
from collections.abc import Iterable
from typing import Any

from absl import flags
from ml_collections import config_dict

_WIDTH = 100
_COLUMN = 28  # where the explanations begin
_ABSL_MULTI = "; repeat this option to specify a list of values"  # added to our own words


def flag_help(own: Iterable[flags.Flag], processes: Iterable[flags.Flag]) -> str:
    """The flags, one or a few lines each.

    Args:
      own: the command's.
      processes: those by which the processes of a run find each other.

    Returns:
      Some lines.
    """
    lines = ["Options:"]
    for flag in sorted(own, key=lambda flag: flag.name):
        lines += _entry(_form(flag), _explanation(flag))
        if "config" in flag.flag_type():
            lines += _entry("--helpfields", "Lists the fields of the config with their values.")
    several = sorted(processes, key=lambda flag: flag.name)
    if several:
        lines += ["", "In several processes, where the cluster does not tell them (TPU, Slurm, GKE"]
        lines[-1] += " and Open MPI do):"
        for flag in several:
            lines += _entry(_form(flag), _explanation(flag))
    return "\n".join(lines)


def _form(flag: flags.Flag) -> str:
    """How it is written, such as --batch_size=N."""
    if flag.boolean:
        return f"--no{flag.name}" if flag.default else f"--{flag.name}"
    if isinstance(flag.default, config_dict.ConfigDict):
        return f"--{flag.name}.FIELD=VALUE"
    if isinstance(flag, flags.EnumFlag):
        parser: Any = flag.parser
        return f"--{flag.name}={'|'.join(parser.enum_values)}"
    kinds = {"int": "N", "float": "X", "comma separated list of strings": "A,B,..."}
    value = kinds.get(flag.flag_type(), flag.name.rpartition("_")[2].upper())
    return f"--{flag.name}={value}"


def _explanation(flag: flags.Flag) -> str:
    text = " ".join((flag.help or "").split()).replace(_ABSL_MULTI, "")
    if isinstance(flag, flags.EnumFlag):
        text = text.partition(">: ")[2]  # absl begins with the values
    default = _default(flag)
    return f"{text} [{default}]" if default else text


def _default(flag: flags.Flag) -> str:
    value: Any = flag.default
    if value is None or isinstance(value, bool | config_dict.ConfigDict):
        return ""
    return ",".join(value) if isinstance(value, list) else str(value)


def _entry(form: str, text: str) -> list[str]:
    margin = " " * _COLUMN
    lines = textwrap.wrap(text, _WIDTH, initial_indent=margin, subsequent_indent=margin) or [margin]
    head = f"  {form}"
    if len(head) + 2 <= _COLUMN:
        lines[0] = head.ljust(_COLUMN) + lines[0].lstrip()
        return [line.rstrip() for line in lines]
    return [head, *lines]
