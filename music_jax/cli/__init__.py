"""Runs commands: flags, `--help`, one-line errors and exit codes."""

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
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from music_jax import registry
from music_jax.cli import command_line
from music_jax.distributed.progress import printable
from music_jax.distributed.signals import end_on_signal, ignore_signals
from music_jax.errors import MusicError, StoppedError, UserError

flags.disclaim_key_flags()

# Modules that the extra `data` installs.
_DATA = (
    *("array_record", "cv2", "dm_pix", "grain", "matplotlib", "mlxtend", "simplejpeg", "sklearn"),
    *("tensorflow_datasets", "threadpoolctl"),
)
# Buckets are reached by gcsfs, even where TensorFlow is installed, which takes seconds to load.
os.environ.setdefault("EPATH_USE_TF", "false")

# Errors of a file system that is full or cannot be written to.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_PIPE_CLOSED = 128 + signal.SIGPIPE  # exit code that a shell reports after SIGPIPE


def run(
    main: Callable[[], None],
    usage: str | None,
    *,
    workdir: bool = False,
    processes: bool = False,
    config: command_line.ConfigUse | None = None,
    required: Sequence[str] = (),
) -> None:
    """Parses the command line, runs a command and exits with the code for its outcome.

    Flags are global to the process, so a command defines its own just before it calls this, and
    not on import.

    Args:
      main: The command; it reads its flags from `flags.FLAGS`.
      usage: The module's docstring, which `--help` prints above the flags.
      workdir: Whether to define `--workdir`.
      processes: Whether to define the flags by which the processes of a run find each other.
      config: `file` to define `--config=FILE` and `--config.FIELD=VALUE`, `fields` for only the
        latter. `FLAGS.config` is then a config.
      required: Names of the flags that have to be given.
    """
    end_on_signal(_stop_at_once)
    command_line.define_shared(workdir=workdir, processes=processes, config=config)
    logging.set_verbosity(logging.FATAL)  # The command itself reports errors, once.

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return command_line.parse(argv, usage or "", config, required)
        except UserError as error:
            fail(error)

    def guarded(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; every option starts with --")
            _prepare()
            registry.import_modules(flags.FLAGS["import"].value or "")
            main()
        except Exception as error:
            if _is_closed_pipe(error):
                _end_peers(_PIPE_CLOSED, "its output is closed")
                raise
            expected = _as_music_error(error)
            if expected is not None:
                fail(expected)
            check_devices()
            message = f"{type(error).__name__}: {command_line.one_line(error)}"
            _end_peers(1, message, unexpected=error)
            raise
        if _has_peers():
            from music_jax.distributed import failure_propagation

            failure_propagation.stop_watching()
        ignore_signals()

    with exit_on_closed_pipe():
        app.run(guarded, flags_parser=parse)


def commands() -> dict[str, str]:
    """Returns a one-line summary of each command by name: the modules that call `cli.run`."""
    package = pathlib.Path(__file__).parents[1]
    found = {}
    for file in sorted([*package.glob("*.py"), *package.glob("*/__main__.py")]):
        text = file.read_text(encoding="utf-8")
        if "\n    cli.run(" in text:
            summary = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
            name = file.parent.name if file.name == "__main__.py" else file.stem
            found[name] = summary.rpartition("`: ")[2].rstrip(".")
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
    from music_jax.distributed.mesh import join_cluster

    join_cluster(*command_line.process_flags())


def begin_evaluation() -> tuple[str, dict[str, object]]:
    """Prepares a command that evaluates a run.

    Returns:
      The workdir, and the config fields given on the command line by dotted name.

    Raises:
      UserError: The workdir cannot be reached.
    """
    workdir = flags.FLAGS.workdir
    from music_jax.distributed.mesh import use_cores
    from music_jax.workdir.directory import absolute_path, use_compilation_cache

    join_cluster()
    use_cores(batch_size=4)  # Batches are padded, so that each device gets a part of any of them.
    absolute_path(workdir)  # checks it
    use_compilation_cache()
    return workdir, config_overrides()


def config_overrides() -> dict[str, object]:
    """Returns the config fields given on the command line by dotted name."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def check_devices() -> None:
    """Ends the command with a one-line error if JAX finds no device."""
    import jax

    try:
        jax.devices()
    except Exception as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms:
            problem = f"JAX_PLATFORMS={platforms} cannot be used here"
            advice = "unset it, or install what it names"
        else:
            problem, advice = "JAX finds no device", "JAX_PLATFORMS=cpu uses the CPU"
        fail(UserError(f"{problem}: {command_line.one_line(error)}; {advice}"))


def _prepare() -> None:
    from music_jax.distributed.mesh import check_gpu_plugins, skip_absent_tpu
    from music_jax.distributed.progress import log_to_stdout

    check_gpu_plugins()
    skip_absent_tpu()
    log_to_stdout()


def _as_music_error(error: Exception) -> MusicError | None:
    """Returns the one-line error for an exception; None for an unexpected one."""
    if isinstance(error, MusicError):
        return error
    from music_jax.workdir.files import BucketError

    if isinstance(error, ModuleNotFoundError) and error.name in _DATA:
        return UserError(
            f"this needs {error.name}, which is not installed: pip install 'music_jax[data]'"
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
    error = StoppedError("everything that was saved is intact; rerun the command to resume")
    with contextlib.suppress(OSError):  # A closed pipe.
        _print_error(error)
        sys.stdout.flush()
    os._exit(error.exit_code)


def _print_error(error: MusicError) -> None:
    name = "stopped" if isinstance(error, StoppedError) else "error"
    print(printable(f"{name}: {error}"), file=sys.stderr, flush=True)
    _end_peers(error.exit_code, str(error))


def _has_peers() -> bool:
    if "jax" not in sys.modules:  # An early error, before a cluster could be joined.
        return False
    from music_jax.distributed import failure_propagation

    return failure_propagation.has_peers()


def _end_peers(exit_code: int, message: str, *, unexpected: Exception | None = None) -> None:
    """Ends the run's other processes, if there are any, and with them this one."""
    if not _has_peers():
        return
    from music_jax.distributed import failure_propagation

    if unexpected:  # A collective that broke because another process failed needs no traceback.
        cause = failure_propagation.cause_of(unexpected)
        message = cause or message
        text = printable(f"error: {cause}") if cause else traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
    failure_propagation.end_run(exit_code, message)
