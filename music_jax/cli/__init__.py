"""What all commands share: flags, `--help`, one clear line for an error, and the exit code."""

import ast
import contextlib
import errno
import os
import pathlib
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from music_jax.cli.usage import flag_help
from music_jax.distributed.progress import printable
from music_jax.distributed.signals import end_on_signal, ignore_signals
from music_jax.errors import MusicError, StoppedError, UserError

# What the extra `data` of setup.cfg brings, by the names that are imported.
_DATA = (
    "array_record",
    "cv2",
    "dm_pix",
    "grain",
    "matplotlib",
    "mlxtend",
    "simplejpeg",
    "sklearn",
    "tensorflow_datasets",
    "threadpoolctl",
)
# Buckets are reached by gcsfs, also where TensorFlow is installed, which takes seconds to load.
os.environ.setdefault("EPATH_USE_TF", "false")

# What a file system says that is full or may not be written to.
_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

# The flags by which the processes of a run find each other.
_PROCESSES = ("coordinator_address", "num_processes", "process_id")
# What a shell gives for a process that SIGPIPE has ended.
_PIPE_CLOSED = 128 + signal.SIGPIPE


def run(
    main: Callable[[], None], usage: str, *, on_a_run: bool = True, in_processes: bool = True
) -> None:
    """Parses the command line, runs `main` and exits with the code that its outcome calls for.

    A command defines its own flags just before, and the flags that commands share are defined here,
    never at import: flags are global to the process.

    Args:
      main: the command; it reads its flags from `flags.FLAGS`.
      usage: what `--help` prints above the flags.
      on_a_run: whether it takes a workdir.
      in_processes: whether it may run in several processes at once, and takes the flags by which
        they find each other; not without a workdir.
    """
    end_on_signal(_stop_at_once)
    if on_a_run:
        flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, logs, results.")
        if in_processes:
            flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
            flags.DEFINE_integer("num_processes", None, "Number of processes in the run.")
            flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    logging.set_verbosity(logging.FATAL)  # an error is told once, by the command itself

    def guarded(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; every option starts with --")
            _prepare_jax()
            _log_to_stdout()
            main()
        except MusicError as error:
            fail(error)
        except Exception as error:
            if _is_of_output(error):
                _end_peers(_PIPE_CLOSED, "nobody reads its output any more")
                raise
            if isinstance(error, ModuleNotFoundError) and error.name in _DATA:
                fail(
                    UserError(
                        f"this needs {error.name}, which is not installed: pip install "
                        "'music_jax[data]'"
                    )
                )
            if _is_storage_failure(error):
                fail(UserError(f"{error}; fix this and rerun the command"))
            check_devices()
            _end_peers(1, f"{type(error).__name__}: {_one_line(error)}", unexpected=error)
            raise
        else:
            if _has_peers():
                from music_jax.distributed import failure_propagation

                failure_propagation.stop_watching()
            ignore_signals()

    with closed_pipe_ends():
        app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, usage))


@contextlib.contextmanager
def closed_pipe_ends() -> Iterator[None]:
    """Ends the process like SIGPIPE would, once nobody reads its standard output or error.

    SIGPIPE itself stays ignored, as Python has it: it would end the process for any connection that
    breaks, that to a bucket too.
    """
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # as where the shell has closed it
                    stream.flush()
    except BrokenPipeError as error:
        if not _is_of_output(error):
            raise
        os._exit(_PIPE_CLOSED)


def _is_of_output(error: BaseException) -> bool:
    """Whether an error is that nobody reads the standard output or error any more."""
    if not isinstance(error, BrokenPipeError):
        return False
    asked = select.poll()
    for descriptor in (1, 2):
        asked.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in asked.poll(0))


def commands() -> dict[str, str]:
    """What each command does, in a few words, by its name; a command is a module with `cli.run`."""
    package = pathlib.Path(__file__).parents[1]
    found = {}
    for file in sorted([*package.glob("*.py"), *package.glob("*/__main__.py")]):
        text = file.read_text(encoding="utf-8")
        if "\n    cli.run(" in text:
            summary = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
            name = file.parent.name if file.name == "__main__.py" else file.stem
            found[name] = summary.partition(": ")[2].rstrip(".")
    return dict(sorted(found.items()))


def _is_storage_failure(error: Exception) -> bool:
    """Whether a file system is full or may not be written to, or a bucket does not answer."""
    from music_jax.workdir.files import BucketError

    return isinstance(error, BucketError) or (
        isinstance(error, OSError) and error.errno in _OUT_OF_ROOM
    )


def join_cluster() -> None:
    """Joins the run's other processes, by the flags or by what the cluster tells."""
    from music_jax.distributed.mesh import join_cluster

    join_cluster(*(flags.FLAGS[name].value for name in _PROCESSES))


def check_devices() -> None:
    """Ends the command if JAX finds no device, which is then why something failed."""
    import jax

    try:
        jax.devices()
    except Exception as error:
        chosen = os.environ.get("JAX_PLATFORMS")
        what = f"JAX_PLATFORMS={chosen} cannot be used here" if chosen else "JAX finds no device"
        todo = "unset it, or install what it names" if chosen else "JAX_PLATFORMS=cpu uses the CPU"
        fail(UserError(f"{what}: {_one_line(error)}; {todo}"))


def _prepare_jax() -> None:
    from music_jax.distributed.mesh import check_gpu_plugins, skip_absent_tpu

    check_gpu_plugins()
    skip_absent_tpu()


def _log_to_stdout() -> None:
    from music_jax.distributed.progress import log_to_stdout  # with JAX, which takes a second

    log_to_stdout()


def fail(error: MusicError) -> None:
    """Prints the error as one line and exits with its code, all processes of the run alike."""
    _tell(error)
    if isinstance(error, StoppedError):  # another signal, while Python ends, would change the code
        ignore_signals()
    sys.exit(error.exit_code)


def _stop_at_once() -> None:
    """Ends the process from any thread."""
    error = StoppedError("nothing saved is lost; run the same command to go on")
    with contextlib.suppress(OSError):  # of a pipe that nobody reads any more
        _tell(error)
        sys.stdout.flush()
    os._exit(error.exit_code)


def _tell(error: MusicError) -> None:
    name = "stopped" if isinstance(error, StoppedError) else "error"
    print(printable(f"{name}: {error}"), file=sys.stderr, flush=True)
    _end_peers(error.exit_code, str(error))


def _has_peers() -> bool:
    if "jax" not in sys.modules:  # An error so early that there cannot be any.
        return False
    from music_jax.distributed import failure_propagation

    return failure_propagation.has_peers()


def _end_peers(exit_code: int, message: str, *, unexpected: Exception | None = None) -> None:
    """Ends the run's other processes, if there are any, and with them this one."""
    if not _has_peers():
        return
    from music_jax.distributed import failure_propagation

    if unexpected:  # A collective that breaks because another process failed needs no traceback.
        cause = failure_propagation.cause_of(unexpected)
        message = cause or message
        told = printable(f"error: {cause}") if cause else traceback.format_exc()
        print(told, file=sys.stderr, flush=True)
    failure_propagation.end_run(exit_code, message)


def _parse_flags(argv: Sequence[str], usage: str) -> list[str]:
    if {"-h", "--help", "-help", "--helpshort"} & set(argv[1:]):
        print(usage.strip() + "\n\n" + _flag_help(argv[0]))
        sys.exit(0)
    list_fields = "config" in flags.FLAGS and "--helpfields" in argv[1:]
    if list_fields:
        argv = [argument for argument in argv if argument != "--helpfields"]
    path = _config_path(argv)
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and path is not None:
            list(flags.FLAGS.config)  # raises if the file could not be loaded
            _check_config(flags.FLAGS.config, path)
        if list_fields:
            from music_jax.config import fields

            print(fields.table(flags.FLAGS.config))
            sys.exit(0)
        return rest
    except UserError as error:
        fail(error)
    except flags.Error as error:
        mistake = _config_mistake(argv) or _field_without_prefix(argv)
        fail(UserError(mistake or _one_line(error) + "; --help lists the options"))
    except BrokenPipeError:
        raise
    except OSError as error:
        if path is None or os.path.isfile(path):
            fail(UserError(_config_mistake(argv) or _one_line(error)))
        fail(UserError(f"cannot read the config file {path!r}; is the path right?"))
    except Exception as error:  # Whatever a config file raises is its author's mistake, not ours.
        fail(UserError(_config_mistake(argv) or f"{type(error).__name__}: {_one_line(error)}"))
    raise AssertionError("unreachable")


def _flag_help(program: str) -> str:
    by_module = flags.FLAGS.flags_by_module_dict()
    of_all = by_module.get(__name__, [])
    processes = [flag for flag in of_all if flag.name in _PROCESSES]
    own = [flag for flag in of_all if flag.name not in _PROCESSES]
    own += [flag for module in ("__main__", program) for flag in by_module.get(module, [])]
    return flag_help(own, processes)


def _one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def define_config_fields(meaning: str) -> None:
    """Defines `--config.FIELD=VALUE` for a command that takes no config file.

    Args:
      meaning: what `--help` says of it.
    """
    from music_jax.config import default_config

    try:
        config_flags.DEFINE_config_dict("config", default_config(), meaning)
    except Exception as error:  # The fields on the command line are looked up at once.
        fail(UserError(_config_mistake(sys.argv) or _one_line(error)))


def _config_path(argv: Sequence[str]) -> str | None:
    """What `--config=FILE` or `--config FILE` names, the last of them."""
    path = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = value if equals else following
    return path


def _check_config(config: object, path: str) -> None:
    """Checks that what a config file gave has every field."""
    from music_jax.config import default_config, from_file
    from music_jax.config.values import check_values

    if not isinstance(config, config_dict.ConfigDict):
        from_file(path)  # says what it is
    else:
        check_values(config, default_config())


def _config_mistake(argv: Sequence[str]) -> str | None:
    """What is wrong with the config file, or with the first `--config.FIELD` that it has not."""
    from music_jax.config import default_config, from_file
    from music_jax.config.values import field_names, unknown_field_message

    if "config" not in flags.FLAGS and not any(a.startswith("--config.") for a in argv):
        return None
    path, config = _config_path(argv), default_config()
    takes_file = "config" in flags.FLAGS and flags.FLAGS["config"].default is None
    if path is not None and not takes_file:
        return "this command takes no config file, only fields of one: --config.FIELD=VALUE"
    if path is None and takes_file:
        return None
    try:
        config = config if path is None else from_file(path)
    except UserError as error:
        return str(error)
    known = field_names(config)
    for argument in argv:
        if not argument.startswith("--config."):
            continue
        field, _, value = argument[len("--config.") :].partition("=")
        if field not in known:
            return unknown_field_message(field, known)
        inner = [name for name in known if name.startswith(field + ".")]
        if inner and not value.startswith("{"):
            example = f"{field}.name" if f"{field}.name" in inner else inner[0]
            return (
                f"config.{field} is a group of fields; give one of them, such as "
                f"--config.{example}=VALUE"
            )
    return None


def _field_without_prefix(argv: Sequence[str]) -> str | None:
    """What is meant by a flag that is no flag, but ends the name of a config's field."""
    from music_jax.config import default_config
    from music_jax.config.values import field_names

    if "config" not in flags.FLAGS:
        return None
    known = field_names(default_config())
    for argument in argv[1:]:
        name = argument.partition("=")[0].lstrip("-").replace("-", "_")
        if not argument.startswith("-") or name in flags.FLAGS:
            continue
        meant = [field for field in known if field.endswith(f".{name}")]
        if name in known:
            meant = [name]
        if meant:
            options = " or ".join(f"--config.{field}" for field in meant)
            return f"unknown flag --{name}; did you mean {options}?"
    return None
