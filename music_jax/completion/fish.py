"""The script for fish."""

from collections.abc import Iterable, Iterator, Sequence

import music_jax
from music_jax.completion.commands import PROGRAMS, Command, takes_of
from music_jax.config_fields import Field

_HEAD = r"""# Completes the commands of music_jax in fish.
# Made by python -m music_jax.completion --shell=fish for version @VERSION@;
# make it anew after an update.

# The command that the line starts, such as main.
function __music_jax_command
    set -l words (commandline -opc)
    if string match -qr '(^|/)local\.sh$' -- $words[1]
        echo main
        return
    end
    set -l before
    for word in $words
        if test "$before" = -m; and string match -q 'music_jax.*' -- $word
            string replace music_jax. '' -- $word
            return
        end
        set before $word
    end
end

function __music_jax_is
    contains -- (__music_jax_command) $argv
end

function __music_jax_wants_module
    test (commandline -opc)[-1] = -m
end

"""


def script(commands: Sequence[Command], fields: Iterable[Field]) -> str:
    """The script, to be sourced or put into fish's conf.d."""
    lines = [*_lines(commands, [field for field in fields if not field.is_group])]
    programs = " ".join(f"-c {program}" for program in PROGRAMS)
    return _HEAD.replace("@VERSION@", music_jax.__version__) + "".join(
        f"complete {programs} {line}\n" for line in lines
    )


def _lines(commands: Sequence[Command], fields: Sequence[Field]) -> Iterator[str]:
    names = " ".join(f"music_jax.{command.name}" for command in commands)
    yield f"-f -n __music_jax_wants_module -a {_quoted(names)}"
    for command in commands:
        for flag in command.flags:
            condition = f"'__music_jax_is {command.name}'"
            takes = (flag.takes, *flag.choices)
            yield f"-n {condition} -l {flag.name} {_action(takes)} -d {_quoted(flag.meaning)}"
    having = " ".join(command.name for command in commands if command.has_fields)
    for field in fields:
        action = _action(takes_of(field))
        meaning = f" -d {_quoted(field.meaning)}" if field.meaning else ""
        yield f"-n '__music_jax_is {having}' -l config.{field.name} {action}{meaning}"


def _action(takes: Sequence[str]) -> str:
    """Whether there is a value, and what may be one."""
    if takes[0] == "choice":
        return f"-x -a {_quoted(' '.join(takes[1:]))}"
    return {
        "nothing": "-f",
        "text": "-x",
        "file": "-r -F",
        "directory": "-x -a '(__fish_complete_directories)'",
        "config": "-x -a '(__fish_complete_suffix .py)'",
    }[takes[0]]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
