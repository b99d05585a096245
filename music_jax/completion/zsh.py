"""The script for zsh."""

import shlex
from collections.abc import Iterable, Sequence

import music_jax
from music_jax.completion.commands import PROGRAMS, Command, takes_of
from music_jax.config_fields import Field

_SCRIPT = r"""# Completes the commands of music_jax in zsh.
# Made by python -m music_jax.completion --shell=zsh for version @VERSION@;
# make it anew after an update.

typeset -ga _music_jax_fields _music_jax_names
_music_jax_names=(@NAMES@)
_music_jax_fields=(
@FIELDS@
)

# Sets switches, valued (both with explanations) and has_fields.
_music_jax_flags() {
  case $1 in
@FLAGS@
    (*) return 1 ;;
  esac
}

_music_jax_takes() {
  case $1:$2 in
@TAKES@
    (*) _message 'value' ;;
  esac
}

_music_jax() {
  local command= word has_fields=
  local -a switches valued parts
  integer i
  [[ ${words[1]:t} == local.sh ]] && command=main
  for ((i = 2; i < CURRENT; i++)); do
    [[ ${words[i]} == -m ]] || continue
    if ((i + 1 == CURRENT)) && [[ -n $PREFIX ]] &&
      [[ music_jax. == $PREFIX* || $PREFIX == music_jax.* ]]; then
      compadd -- music_jax.${^_music_jax_names}
      return
    fi
    [[ $i+1 -lt CURRENT && ${words[i+1]} == music_jax.* ]] && command=${words[i+1]#music_jax.}
    break
  done
  if [[ -z $command ]] || ! _music_jax_flags $command; then
    $_music_jax_before "$@"
    return
  fi

  if [[ $PREFIX == --*=* ]]; then
    word=${PREFIX%%=*}
    compset -P 1 '*='
    _music_jax_takes $command $word
  elif [[ $PREFIX == --config.* && -n $has_fields ]]; then
    # A group at a time.
    for word in ${(M)_music_jax_fields:#${PREFIX}*}; do
      [[ ${word#$PREFIX} == *.* ]] && word=$PREFIX${${word#$PREFIX}%%.*}.
      parts+=($word)
    done
    compadd -S '' -- ${(u)parts}
  else
    [[ -n $has_fields ]] && valued+=('--config.:A field of the config.')
    _describe -o option switches -- valued -S ''
  fi
}

typeset -g _music_jax_before=${_comps[python]:-_default}
[[ $_music_jax_before == _music_jax ]] && _music_jax_before=_default
compdef _music_jax @PROGRAMS@
"""


def script(commands: Sequence[Command], fields: Iterable[Field]) -> str:
    """The script, to be sourced below `compinit`."""
    leaves = [field for field in fields if not field.is_group]
    parts = {
        "VERSION": music_jax.__version__,
        "NAMES": " ".join(command.name for command in commands),
        "FIELDS": "\n".join(f"  --config.{field.name}=" for field in leaves),
        "FLAGS": "\n".join(_flags(command) for command in commands),
        "TAKES": "\n".join([*_takes(commands), *_field_takes(leaves)]),
        "PROGRAMS": " ".join(PROGRAMS),
    }
    text = _SCRIPT
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _flags(command: Command) -> str:
    def described(valued: bool) -> str:
        return " ".join(
            shlex.quote(f"--{flag.name}{'=' * valued}:{flag.meaning}")
            for flag in command.flags
            if (flag.takes != "nothing") == valued
        )

    fields = " has_fields=1" if command.has_fields else ""
    return (
        f"    ({command.name})\n      switches=({described(False)})\n"
        f"      valued=({described(True)}){fields} ;;"
    )


def _action(takes: Sequence[str]) -> str:
    if takes[0] == "choice":
        return "compadd -- " + " ".join(shlex.quote(value) for value in takes[1:])
    return {"directory": "_files -/", "file": "_files", "config": "_files -g '*.py'"}[takes[0]]


def _takes(commands: Sequence[Command]) -> list[str]:
    return [
        f"    ({command.name}:--{flag.name}) {_action((flag.takes, *flag.choices))} ;;"
        for command in commands
        for flag in command.flags
        if flag.takes not in ("nothing", "text")
    ]


def _field_takes(fields: Iterable[Field]) -> list[str]:
    return [
        f"    (*:--config.{field.name}) {_action(takes_of(field))} ;;"
        for field in fields
        if takes_of(field)[0] != "text"
    ]
