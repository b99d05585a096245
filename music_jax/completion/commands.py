"""The commands with their flags, as each of them tells itself."""

import concurrent.futures
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import music_jax
from music_jax import cli
from music_jax.config_fields import Field

# What the commands are started by.
PROGRAMS = ("python", "python3", "python3.11", "python3.12", "python3.13", "local.sh")

_PACKAGE = pathlib.Path(music_jax.__file__).parent


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
      name: without the dashes.
      meaning: in a few words.
      takes: "nothing", "directory", "file", "config" (a file of Python), "choice" or "text".
      choices: what it takes, if it takes one of a few.
    """

    name: str
    meaning: str
    takes: str
    choices: tuple[str, ...] = ()


class Command(NamedTuple):
    """A command, `python -m music_jax.NAME`.

    Attributes:
      name: such as `main`.
      flags: its own and those of all commands, but not the fields of a config.
      has_fields: whether it takes `--config.FIELD=VALUE`.
    """

    name: str
    flags: tuple[Flag, ...]
    has_fields: bool


def all_commands() -> list[Command]:
    """All commands; starts each of them to ask for its flags, which takes some seconds."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(_command, cli.commands()))


def _command(name: str) -> Command:
    # absl's own list of flags, for programs. It then exits with 1.
    asked = [sys.executable, "-m", f"music_jax.{name}", "--helpxml"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    if not told.stdout.startswith("<?xml"):
        raise RuntimeError(f"{' '.join(asked)} tells no flags: {told.stderr.strip()}")
    found = {}
    for entry in ElementTree.fromstring(told.stdout).iter("flag"):
        text = {part.tag: part.text or "" for part in entry}
        if text["file"] == "music_jax.cli" or text["file"].startswith(str(_PACKAGE)):
            choices = tuple(part.text or "" for part in entry.iter("enum_value"))
            found[text["name"]] = (text, choices)
    flags = [_flag(text, choices) for text, choices in found.values() if not _is_group(text)]
    if "config" in found:
        flags.append(Flag("helpfields", "Lists the fields of a config.", "nothing"))
    flags.append(Flag("help", "Tells what the command does.", "nothing"))
    return Command(name, tuple(sorted(flags)), "config" in found)


def _is_group(text: dict[str, str]) -> bool:
    """Whether it is a config that has fields to override, but is no file."""
    return text["type"] == "config object" and bool(text["default"])


def _flag(text: dict[str, str], choices: tuple[str, ...]) -> Flag:
    meaning = " ".join(text["meaning"].split())
    if choices:
        meaning = meaning.partition(">: ")[2]  # absl begins with the values
    return Flag(text["name"], meaning, _takes(text, choices), choices)


def _takes(text: dict[str, str], choices: tuple[str, ...]) -> str:
    if choices:
        return "choice"
    if text["type"] == "config object":
        return "config"
    if text["type"] == "string":
        return "directory" if text["name"].endswith("dir") else "file"
    return "nothing" if text["type"] == "bool" else "text"


def takes_of(field: Field) -> tuple[str, ...]:
    """What a config's field takes, as `Flag.takes`, and the values if there are but a few."""
    if isinstance(field.default, bool):
        return "choice", "true", "false"
    if field.choices:
        return "choice", *field.choices
    return ("directory" if field.name.endswith(("_dir", ".path")) else "text",)
