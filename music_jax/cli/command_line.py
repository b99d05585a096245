"""The command line of every command: shared flags, `--help`, and the fields of the config."""

import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

from absl import flags
from ml_collections import config_dict, config_flags

from music_jax import config as config_lib
from music_jax.errors import UserError

ConfigUse = Literal["file", "fields"]

# The flags defined here are listed by `--help` as the command's own.
flags.disclaim_key_flags()

_PROCESSES = ("coordinator_address", "num_processes", "process_id")
_WIDTH = 100


def define_shared(*, workdir: bool, processes: bool, config: ConfigUse | None) -> None:
    """Defines the flags that a command shares with others; see `music_jax.cli.run`."""
    flags.DEFINE_string(
        "import", "", "Modules that register backbones, objectives or datasets: MODULE[,MODULE]."
    )
    if workdir:
        flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, logs, results.")
    if processes:
        unless = "if not detected automatically (on TPUs, Slurm, GKE and Open MPI it is)"
        flags.DEFINE_string("coordinator_address", None, f"HOST:PORT of process 0, {unless}.")
        flags.DEFINE_integer("num_processes", None, f"Number of processes in the run, {unless}.")
        flags.DEFINE_integer("process_id", None, f"Index of this process from 0, {unless}.")
    if config:
        names = ", ".join(config_lib.shipped_configs())
        flags.DEFINE_string(
            "config",
            None,
            f"Config file, or the name of one that comes with the package: {names}. "
            "--config.FIELD=VALUE overrides one of its fields."
            if config == "file"
            else "--config.FIELD=VALUE overrides a field of the run's config.",
        )
        flags.DEFINE_boolean("helpfields", False, "Lists the config's fields with their values.")


def process_flags() -> list[Any]:
    """Returns the address of process 0, the number of processes and the index of this one."""
    return [flags.FLAGS[name].value for name in _PROCESSES]


def parse(
    argv: Sequence[str], usage: str, config: ConfigUse | None, required: Sequence[str] = ()
) -> list[str]:
    """Parses the command line into `flags.FLAGS`; `--help` and `--helpfields` print and exit.

    Args:
      argv: The command line.
      usage: Text that `--help` prints above the flags.
      config: Same as for `music_jax.cli.run`.
      required: Names of the flags that have to be given.

    Returns:
      The arguments that are not flags, the program's name first.

    Raises:
      UserError: A flag, the config file or a field of the config is wrong.
    """
    if {"-h", "--help", "-help", "--helpshort"} & set(argv[1:]):
        described = flags.FLAGS.main_module_help().partition(":\n")[2]
        print(f"{usage.strip()}\n\nFlags:\n{described}")
        sys.exit(0)
    path, rest = _take_config_path(argv) if config else (None, list(argv))
    try:
        if config:
            if path is not None and config == "fields":
                raise UserError(
                    "this command takes no config file, only fields of one: --config.FIELD=VALUE"
                )
            values = config_lib.default_config() if path is None else config_lib.from_file(path)
            _check_fields(rest, values)
            config_flags.DEFINE_config_dict(
                "config", values, flag_values=flags.FLAGS, sys_argv=rest, allow_override=True
            )
        positional = flags.FLAGS(rest)
    except UserError:
        raise
    except flags.Error as error:
        message = _suggest_field(error) or f"{one_line(error)}; --help lists the flags"
        raise UserError(message) from error
    except Exception as error:  # The parsers of fields may raise anything.
        raise UserError(f"{type(error).__name__}: {one_line(error)}") from error
    if config:
        config_lib.check_values(flags.FLAGS.config)
        if flags.FLAGS.helpfields:
            print(fields_table(flags.FLAGS.config))
            sys.exit(0)
        if config == "file" and path is None:
            raise UserError("--config=FILE is missing, such as --config=configs/mnist5k.py")
    for name in required:
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing: {(flags.FLAGS[name].help or '').rstrip('.')}")
    return positional


def fields_table(config: config_dict.ConfigDict) -> str:
    """Returns all fields of a config with their values and descriptions, as text."""
    augmentation = config.augmentation.to_dict()
    same_views = augmentation["view_1"] == augmentation["view_2"]
    lines = []
    for name, text in config_lib.descriptions().items():
        value = config_lib.get_field(config, name)
        if isinstance(value, config_dict.ConfigDict):
            text = "as view_1" if same_views and name.endswith("view_2") else text
            lines += ["", f"config.{name}" + (f": {text}" if text else "")]
        elif not (same_views and name.startswith("augmentation.view_2.")):
            given = "" if value in (None, "") else shlex.quote(str(value))
            indent = "  " if "." in name else ""
            line = f"{indent}--config.{name}={given}"
            if len(line) + len(text) + 2 <= _WIDTH:
                lines.append(f"{line}  {text}".rstrip())
            else:
                lines += [line, textwrap.indent(textwrap.fill(text, _WIDTH - 6), indent + "    ")]
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """Returns the message of an error in one line."""
    return " ".join(str(error).split())


def _take_config_path(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the value of the last `--config=FILE` or `--config FILE`, and the other arguments."""
    path, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return path, rest


def _check_fields(argv: Sequence[str], config: config_dict.ConfigDict) -> None:
    """Checks that the config has each `--config.FIELD`, and that it is not a group."""
    known = config_lib.field_names(config)
    for argument in argv:
        field, _, value = argument.lstrip("-").partition("=")
        field = field.removeprefix("no")
        if not (argument.startswith("-") and field.startswith("config.")):
            continue
        field = field.removeprefix("config.")
        if field not in known:
            raise UserError(config_lib.unknown_field_message(field, known))
        inner = [name for name in known if name.startswith(field + ".")]
        if inner and not value.startswith("{"):
            example = f"{field}.name" if f"{field}.name" in inner else inner[0]
            raise UserError(
                f"config.{field} is a group of fields; give one of them, such as "
                f"--config.{example}=VALUE"
            )


def _suggest_field(error: flags.Error) -> str | None:
    """Returns a message for a field of the config that was given without `--config.`."""
    if not isinstance(error, flags.UnrecognizedFlagError) or "config" not in flags.FLAGS:
        return None
    name = error.flagname.replace("-", "_")
    known = config_lib.field_names(config_lib.default_config())
    fields = [name] if name in known else [field for field in known if field.endswith(f".{name}")]
    if not fields:
        return None
    options = " or ".join(f"--config.{field}" for field in fields)
    return f"unknown flag --{name}; did you mean {options}?"
