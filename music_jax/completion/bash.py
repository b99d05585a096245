"""The script for bash, 3.2 and later."""

import shlex
from collections.abc import Iterable, Sequence

from music_jax.completion.commands import PROGRAMS, Command, takes_of
from music_jax.config_fields import Field

_SCRIPT = r"""# Completes the commands of music_jax in bash.
# Made by python -m music_jax.completion --shell=bash for version {version};
# make it anew after an update.

# Sets flags (of the command, those with a value ending in =) and has_fields.
_music_jax_flags() {{
  has_fields=
  case $1 in
{flags}
    *) return 1 ;;
  esac
}}

# Sets takes: what the flag $2 of the command $1 takes, or "choice" and what there is to choose.
_music_jax_takes() {{
  case $1:$2 in
{takes}
    *) takes=text ;;
  esac
}}

_music_jax_fields="{fields}"

# What completed python before, of bash-completion or the user's own.
_music_jax_else() {{
  local name
  for name in _comp_cmd_python _python; do
    if ! declare -F "$name" >/dev/null && declare -F _completion_loader >/dev/null; then
      _completion_loader python >/dev/null 2>&1
      _music_jax_register
    fi
    if declare -F "$name" >/dev/null; then
      "$name" "$@"
      return
    fi
  done
}}

_music_jax() {{
  COMPREPLY=()
  # bash cuts the line at = and : as well; here are its words as the command gets them.
  local words=() n=-1 i piece glue= command= flags= has_fields= takes= flag= value
  for ((i = 0; i <= COMP_CWORD; i++)); do
    piece=${{COMP_WORDS[i]}}
    if [[ $piece == [=:]* && $n -ge 0 ]]; then
      words[n]+=$piece
      glue=1
    elif [[ $glue ]]; then
      words[n]+=$piece
      glue=
    else
      words[++n]=$piece
    fi
  done
  local word=${{words[n]}}
  # Of it, bash replaces what follows the last cut.
  [[ $piece == [=:]* ]] && piece=
  local kept=${{word%"$piece"}}

  [[ ${{words[0]##*/}} == local.sh ]] && command=main
  for ((i = 1; i < n; i++)); do
    [[ ${{words[i]}} == -m && ${{words[i + 1]}} == music_jax.* ]] || continue
    if ((i + 1 == n)); then
      COMPREPLY=($(compgen -P music_jax. -W "{names}" -- "${{word#music_jax.}}"))
      return
    fi
    command=${{words[i + 1]#music_jax.}}
    break
  done
  if [[ -z $command && ${{words[n - 1]}} == -m && -n $word && music_jax. == "$word"* ]]; then
    COMPREPLY=($(compgen -P music_jax. -W "{names}" -- ""))
    return
  fi
  if [[ -z $command ]] || ! _music_jax_flags "$command"; then
    _music_jax_else "$@"
    return
  fi

  if [[ $word == --*=* ]]; then
    flag=${{word%%=*}}
    value=${{word#*=}}
  elif [[ $word != -* && ${{words[n - 1]}} == --* && " $flags " == *" ${{words[n - 1]}}= "* ]]; then
    flag=${{words[n - 1]}}
    value=$word
  fi
  local IFS=$'\n'
  if [[ $flag ]]; then
    _music_jax_takes "$command" "$flag"
    case $takes in
      directory) COMPREPLY=($(compgen -d -- "$value")) ;;
      file) COMPREPLY=($(compgen -f -- "$value")) ;;
      config) COMPREPLY=($(compgen -f -X '!*.py' -- "$value") $(compgen -d -- "$value")) ;;
      choice*) IFS=' ' read -ra takes <<<"$takes"
        COMPREPLY=($(IFS=' '; compgen -W "${{takes[*]:1}}" -- "$value")) ;;
    esac
    case $takes in directory | file | config) compopt -o filenames 2>/dev/null ;; esac
    if [[ $word == --*=* ]]; then
      value=${{flag}}=
      COMPREPLY=("${{COMPREPLY[@]/#/$value}}")
    fi
  elif [[ $word == --config.* && $has_fields ]]; then
    # A group at a time.
    local last= rest candidate
    for candidate in $(IFS=' '; compgen -W "$_music_jax_fields" -- "$word"); do
      rest=${{candidate#"$word"}}
      [[ $rest == *.* ]] && candidate=$word${{rest%%.*}}.
      [[ $candidate == "$last" ]] || COMPREPLY+=("$candidate")
      last=$candidate
    done
  else
    [[ $has_fields ]] && flags="$flags --config."
    COMPREPLY=($(IFS=' '; compgen -W "$flags" -- "$word"))
  fi
  if [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *[=.] ]]; then
    compopt -o nospace 2>/dev/null
  fi
  COMPREPLY=("${{COMPREPLY[@]#"$kept"}}")
}}

_music_jax_register() {{
  complete -o bashdefault -o default -F _music_jax {programs}
}}
_music_jax_register
"""


def script(commands: Sequence[Command], fields: Iterable[Field]) -> str:
    """The script, to be sourced."""
    import music_jax

    leaves = [field for field in fields if not field.is_group]
    return _SCRIPT.format(
        version=music_jax.__version__,
        names=" ".join(command.name for command in commands),
        programs=" ".join(PROGRAMS),
        flags="\n".join(_flags(command) for command in commands),
        takes="\n".join([*_takes(commands), *_field_takes(leaves)]),
        fields=" ".join(f"--config.{field.name}=" for field in leaves),
    )


def _flags(command: Command) -> str:
    shown = [f"--{f.name}" + ("" if f.takes == "nothing" else "=") for f in command.flags]
    fields = " has_fields=1" if command.has_fields else ""
    return f"    {command.name}) flags={shlex.quote(' '.join(shown))}{fields} ;;"


def _takes(commands: Sequence[Command]) -> list[str]:
    return [
        f"    {command.name}:--{flag.name}) "
        f"takes={shlex.quote(' '.join((flag.takes, *flag.choices)))} ;;"
        for command in commands
        for flag in command.flags
        if flag.takes not in ("nothing", "text")
    ]


def _field_takes(fields: Iterable[Field]) -> list[str]:
    lines = []
    for field in fields:
        takes = takes_of(field)
        if takes[0] != "text":
            lines.append(f"    *:--config.{field.name}) takes={shlex.quote(' '.join(takes))} ;;")
    return lines
