"""Runs commands: flags, `--help`, the fields of the config, one-line errors and exit codes."""

import contextlib
import errno
import os
import pathlib
import re
import select
import shlex
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Literal, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from music_jax import config as config_lib
from music_jax import registry
from music_jax.distributed.progress import printable
from music_jax.distributed.signals import end_on_signal, ignore_signals
from music_jax.errors import MusicError, StoppedError, UserError, install_command, one_line

# The flags defined here are listed by `--help` as the command's own.
flags.disclaim_key_flags()

ConfigUse = Literal["file", "fields"]

# Modules that the extra `data` installs.
_DATA = (
    *("array_record", "cv2", "dm_pix", "grain", "matplotlib", "mlxtend", "simplejpeg", "sklearn"),
    *("tensorflow_datasets", "threadpoolctl", "tifffile"),
)
# Buckets are reached by gcsfs, even where TensorFlow is installed, which takes seconds to load.
os.environ.setdefault("EPATH_USE_TF", "false")

# Errors of a file system that is full or cannot be written to.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_PIPE_CLOSED = 128 + signal.SIGPIPE  # exit code that a shell reports after SIGPIPE
_WIDTH = 100


def run(
    main: Callable[[], None],
    usage: str | None,
    *,
    workdir: bool = False,
    checkpoint: bool = False,
    processes: bool = False,
    config: ConfigUse | None = None,
    required: Sequence[str] = (),
) -> None:
    """Parses the command line, runs a command and exits with the code for its outcome.

    Flags are global to the process, so a command defines its own just before it calls this, and
    not on import.

    Args:
      main: The command; it reads its flags from `flags.FLAGS`.
      usage: The module's docstring, which `--help` prints above the flags.
      workdir: Whether to define `--workdir`.
      checkpoint: Whether to define `--checkpoint`.
      processes: Whether to define the flags by which the processes of a run find each other.
      config: `file` to define `--config=FILE` and `--config.FIELD=VALUE`, `fields` for only the
        latter. `FLAGS.config` is then a config.
      required: Names of the flags that have to be given.
    """
    end_on_signal(_stop_at_once)
    flags.DEFINE_string(
        "import", "", "Modules that register backbones, objectives or datasets: MODULE[,MODULE]."
    )
    if workdir:
        flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, logs, results.")
    if checkpoint:
        text = "Step of the checkpoint, or its directory; the latest by default."
        flags.DEFINE_string("checkpoint", None, text)
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
    logging.set_verbosity(logging.FATAL)  # The command itself reports errors, once.

    def flags_parser(argv: Sequence[str]) -> list[str]:
        try:
            return parse(argv, usage or "", config, required)
        except UserError as error:
            fail(error)

    def guarded(argv: Sequence[str]) -> None:
        try:
            from music_jax.distributed.mesh import check_gpu_plugins, skip_absent_tpu
            from music_jax.distributed.progress import log_to_stdout

            check_gpu_plugins()
            skip_absent_tpu()
            log_to_stdout()
            _import_modules(flags.FLAGS["import"].value or "")
            main()
        except Exception as error:
            if _is_closed_pipe(error):
                _end_peers(_PIPE_CLOSED, "its output is closed")
                raise
            expected = _as_music_error(error)
            if expected is not None:
                fail(expected)
            check_devices()
            _end_peers(1, one_line(error, named=True), unexpected=error)
            raise
        if peers := _peers():
            peers.stop_watching()
        ignore_signals()

    with exit_on_closed_pipe():
        app.run(guarded, flags_parser=flags_parser)


def parse(
    argv: Sequence[str], usage: str, config: ConfigUse | None, required: Sequence[str] = ()
) -> list[str]:
    """Parses the command line into `flags.FLAGS`; `--help` and `--helpfields` print and exit.

    Raises:
      UserError: A flag, the config file or a field of the config is wrong.
    """
    if {"-h", "--help", "-help", "--helpshort"} & set(argv[1:]):
        described = flags.FLAGS.main_module_help().partition(":\n")[2]
        print(f"{usage.strip()}\n\nFlags:\n{described}")
        sys.exit(0)
    path = None
    try:
        rest = flags.FLAGS(argv, known_only=config is not None)
        if config:
            path = flags.FLAGS.config
            if path is not None and config == "fields":
                raise UserError(
                    "this command takes no config file, only fields of one: --config.FIELD=VALUE"
                )
            values = config_lib.default_config() if path is None else config_lib.from_file(path)
            _check_fields(rest, values)
            flags.FLAGS["config"].unparse()  # so that it can be replaced
            config_flags.DEFINE_config_dict(
                "config", values, flag_values=flags.FLAGS, sys_argv=rest, allow_override=True
            )
            rest = flags.FLAGS(rest)
    except UserError:
        raise
    except flags.Error as error:
        message = _suggest_field(error) or f"{one_line(error)}; --help lists the flags"
        raise UserError(message) from error
    except Exception as error:  # The parsers of fields may raise anything.
        raise UserError(one_line(error, named=True)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; every option starts with --")
    if config:
        config_lib.check_values(flags.FLAGS.config)
        if flags.FLAGS.helpfields:
            print(_fields_table(flags.FLAGS.config))
            sys.exit(0)
        if config == "file" and path is None:
            raise UserError("--config=FILE is missing, such as --config=configs/mnist5k.py")
    for name in required:
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing: {(flags.FLAGS[name].help or '').rstrip('.')}")
    return rest


def _check_fields(argv: Sequence[str], config: config_dict.ConfigDict) -> None:
    """Checks that the config has each `--config.FIELD`, and that it is not a group."""
    known = config_lib.field_names(config)
    for argument in argv:
        given = re.match(r"--?(?:no)?config\.([^=]*)=?(.?)", argument, re.DOTALL)
        if given is None:
            continue
        field, begin = given.groups()
        options, dot, name = field.rpartition(".options.")
        if dot and f"{options}.options" in known:
            raise UserError(
                f'options are given together: "--config.{options}.options={{{name!r}: VALUE}}"'
            )
        if field not in known:
            raise UserError(config_lib.unknown_field_message(field, known))
        group = config_lib.get_field(config, field)
        if isinstance(group, config_dict.ConfigDict) and begin != "{":
            if not group or field.endswith(".options"):
                raise UserError(
                    f"config.{field} takes a dictionary: \"--config.{field}={{'NAME': VALUE}}\""
                )
            example = "name" if "name" in group else next(iter(group))
            raise UserError(
                f"config.{field} is a group of fields; give one of them, such as "
                f"--config.{field}.{example}=VALUE"
            )


def _suggest_field(error: flags.Error) -> str | None:
    """Returns a message for hyphens in a flag, or a field of the config without `--config.`."""
    if not isinstance(error, flags.UnrecognizedFlagError) or "config" not in flags.FLAGS:
        return None
    name = error.flagname.replace("-", "_")
    if name in flags.FLAGS:
        return f"unknown flag --{error.flagname}; did you mean --{name}?"
    known = config_lib.field_names(config_lib.default_config())
    fields = [name] if name in known else [field for field in known if field.endswith(f".{name}")]
    options = " or ".join(f"--config.{field}" for field in fields)
    return f"unknown flag --{name}; did you mean {options}?" if options else None


def _fields_table(config: config_dict.ConfigDict) -> str:
    """Returns all fields of a config with their values and descriptions, as text."""
    views = {f"augmentation.{name}": view for name, view in config.augmentation.to_dict().items()}
    first = views.pop("augmentation.view_1")
    same = [name for name, view in views.items() if view == first]
    lines = []
    for name, text in config_lib.descriptions().items():
        value = config_lib.get_field(config, name)
        if isinstance(value, config_dict.ConfigDict) and not name.endswith(".options"):
            text = "as view_1" if name in same else text
            lines += ["", f"config.{name}" + (f": {text}" if text else "")]
        elif name.rpartition(".")[0] not in same:
            if isinstance(value, config_dict.ConfigDict):
                value = value.to_dict()
            given = "" if value in (None, "") else shlex.quote(str(value))
            indent = "  " if "." in name else ""
            line = f"{indent}--config.{name}={given}"
            if len(line) + len(text) + 2 <= _WIDTH:
                lines.append(f"{line}  {text}".rstrip())
            else:
                lines += [line, textwrap.indent(textwrap.fill(text, _WIDTH - 6), indent + "    ")]
    return "\n".join(lines)


def commands() -> dict[str, str]:
    """Returns a one-line summary of each command by name: the modules that call `cli.run`."""
    package = pathlib.Path(__file__).parent
    found = {}
    for file in sorted([*package.glob("*.py"), *package.glob("*/__main__.py")]):
        text = file.read_text(encoding="utf-8")
        if "\n    cli.run(" in text:
            name = file.parent.name if file.name == "__main__.py" else file.stem
            summary = text.partition('"""')[2].partition("\n")[0]
            found[name] = summary.rpartition("`: ")[2].rstrip('."')
    return dict(sorted(found.items()))


def fail(error: MusicError) -> NoReturn:
    """Prints an error as one line and exits with its code, together with the run's processes."""
    _print_error(error)
    if isinstance(error, StoppedError):  # A second signal would change the exit code.
        ignore_signals()
    sys.exit(error.exit_code)


@contextlib.contextmanager
def exit_on_closed_pipe() -> Iterator[None]:
    """Exits like a process that gets SIGPIPE, once standard output or error is closed.

    SIGPIPE itself stays ignored, which is Python's default: it would also end the process when a
    connection breaks, such as that to a bucket.
    """
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # as after `>&-` in a shell
                    stream.flush()
    except BrokenPipeError as error:
        if not _is_closed_pipe(error):
            raise
        os._exit(_PIPE_CLOSED)


def join_cluster() -> None:
    """Joins the other processes of the run, found by the flags or detected from the cluster."""
    from music_jax.distributed.cluster import join_cluster

    options = flags.FLAGS
    join_cluster(options.coordinator_address, options.num_processes, options.process_id)


def _import_modules(names: str) -> None:
    started = _has_devices()
    registry.import_modules(names)
    if _has_devices() and not started:
        raise UserError(
            f"--import={names} computes with JAX when it is imported, which chooses the devices "
            "before the command can; move this into a function"
        )


def _has_devices() -> bool:
    """Returns whether this process has started JAX's devices."""
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def begin_evaluation() -> None:
    """Prepares a command that evaluates a run."""
    from music_jax.distributed.mesh import use_cores
    from music_jax.workdir.compilation_cache import use_compilation_cache

    join_cluster()
    use_cores(batch_size=4)  # Batches are padded, so that each device gets a part of any of them.
    use_compilation_cache()


def config_overrides() -> dict[str, object]:
    """Returns the config fields given on the command line by dotted name."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def check_devices() -> None:
    """Ends the command with a one-line error if JAX finds no device."""
    import jax

    try:
        jax.devices()
    except Exception as error:
        problem, advice = "JAX finds no device", "JAX_PLATFORMS=cpu uses the CPU"
        if platforms := os.environ.get("JAX_PLATFORMS"):
            problem = f"JAX_PLATFORMS={platforms} cannot be used here"
            advice = "unset it, or install what it names"
        fail(UserError(f"{problem}: {one_line(error)}; {advice}"))


def _as_music_error(error: Exception) -> MusicError | None:
    """Returns the one-line error for an exception; None for an unexpected one."""
    if isinstance(error, MusicError):
        return error
    from music_jax.workdir.files import BucketError

    if isinstance(error, ModuleNotFoundError) and error.name in _DATA:
        return UserError(
            f"this needs {error.name}, which is not installed: {install_command('data')}"
        )
    storage = isinstance(error, OSError) and error.errno in _STORAGE_ERRORS
    if storage or isinstance(error, BucketError):
        return UserError(f"{error}; fix this and rerun the command")
    return None


def _is_closed_pipe(error: BaseException) -> bool:
    """Returns whether an error means that standard output or error is a closed pipe."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _stop_at_once() -> None:
    """Ends the process from any thread."""
    error = StoppedError("whatever was saved is intact; rerun the command to resume")
    with contextlib.suppress(OSError):  # A closed pipe.
        _print_error(error)
        sys.stdout.flush()
    os._exit(error.exit_code)


def _print_error(error: MusicError) -> None:
    name = "stopped" if isinstance(error, StoppedError) else "error"
    print(printable(f"{name}: {error}"), file=sys.stderr, flush=True)
    _end_peers(error.exit_code, str(error))


def _peers() -> ModuleType | None:
    """Returns the module that ends the run's other processes, if there are any."""
    if "jax" not in sys.modules:  # An early error, before a cluster could be joined.
        return None
    from music_jax.distributed import cluster

    return cluster if cluster.has_peers() else None


def _end_peers(exit_code: int, message: str, *, unexpected: Exception | None = None) -> None:
    """Ends the run's other processes, if there are any, and with them this one."""
    if (peers := _peers()) is None:
        return
    if unexpected:  # A collective that broke because another process failed needs no traceback.
        cause = peers.cause_of(unexpected)
        message = cause or message
        text = printable(f"error: {cause}") if cause else traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
    peers.end_run(exit_code, message)
