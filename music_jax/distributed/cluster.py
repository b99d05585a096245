"""Joins the processes of a run, and propagates the failure of one to all.

After a failure all end with its message and its exit code; without this the others would wait in a
collective forever. A process that is killed or stopped cannot notify the others; JAX's heartbeats
detect this, and each of the others ends by itself.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import distributed  # The coordination service has no public name.

from music_jax.distributed.progress import printable
from music_jax.errors import UserError, one_line

_KEY = "music_jax/failure"
_POLL_SECONDS = 1.0
# Time to wait for the message of a failed process, which it publishes before its connections close.
_CAUSE_SECONDS = 5.0
_NOTICE_MILLISECONDS = 10_000  # within which all processes have read of a failure
_PROBE_SECONDS = 2.0
_HEARTBEAT_TIMEOUT_SECONDS = 50  # without a heartbeat of a process; then JAX aborts the others
# Time after which processes that do not find each other end; JAX itself would abort.
_JOIN_SECONDS = 300.0
_JOIN_TIMEOUT_SECONDS = 360
_WAITING_SECONDS = 30.0  # between two messages about what a process waits for

_LOST = (
    "another process of the run does not answer: it was killed or stopped, or its machine is lost; "
    "rerun the command to resume from the last checkpoint"
)
# Parts of the messages of a collective that lost a process: Gloo's, between CPUs, and NCCL's.
_BROKEN_COLLECTIVE = ("gloo", "remote process exited")
# Part of JAX's message where it does not detect a cluster.
_NO_CLUSTER = "coordinator_address should be defined"
# Variables by which launchers that JAX does not detect, Open MPI from version 5 and those of MPICH,
# give the number of processes. Without joining they would all write to one workdir.
_LAUNCHER_COUNTS = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE")
_ALL_THREE = "--coordinator_address, --num_processes and --process_id"

_has_joined = threading.Event()
_finished = threading.Event()
_leaving = threading.Lock()
_kept: list[Any] = []  # objects that only C code refers to
_state: Any = distributed.global_state


def join_cluster(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes of the run, if there are any; from then on they end together.

    Call it before anything uses JAX. The cluster is queried only if no argument is given. What the
    process waits for is printed to standard error, and it ends after a time limit.

    Args:
      coordinator_address: HOST:PORT of process 0; None to detect all three.
      num_processes: Number of processes in the run.
      process_id: Index of this process.

    Raises:
      UserError: Only some of the three are given, the processes do not find each other, or a
        launcher has started several of them without giving the address of process 0.
    """
    if num_processes == 1 and not process_id:
        return
    _check_flags(coordinator_address, num_processes, process_id)
    # Until there is something to save, JAX must not take SIGTERM; see `start_preemption_service`.
    jax.config.update("jax_enable_preemption_service", False)
    joined = threading.Event()
    waiting = threading.Thread(target=_report_waiting, args=(joined,), daemon=True)
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method=None if num_processes is None else "deactivate",
            initialization_timeout=_JOIN_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
        )
    except Exception as error:  # a cluster's own client may raise anything
        if (reason := _reason_of(error)) is not None:
            raise UserError(reason) from error
        return
    finally:
        joined.set()
        waiting.join()
    _has_joined.set()
    if has_peers():
        _replace_abort()
        threading.Thread(target=_watch, name="failures", daemon=True).start()


def _check_flags(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    if address is None and num_processes is None and process_id is None:
        return
    if address is None or num_processes is None or process_id is None:
        raise UserError(
            f"{_ALL_THREE} go together: give all three, none if they are detected, or "
            f"--num_processes=1 alone; got {address}, {num_processes}, {process_id}"
        )
    port = re.fullmatch(r".+:(\d{1,5})", address)
    if port is None or not 1 <= int(port[1]) <= 65535:
        raise UserError(
            f"--coordinator_address must be HOST:PORT, with a port up to 65535; got {address!r}"
        )
    if num_processes < 1:
        raise UserError(f"--num_processes must be at least 1; got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id must be in [0, num_processes = {num_processes}); got {process_id}"
        )


def _reason_of(error: Exception) -> str | None:
    """Returns the message for a failure to join; None if this process is the only one."""
    message = one_line(error, named=True)
    if (address := _state.coordinator_address) is not None:
        return (
            f"cannot join the run's other processes at {address}: {message}; is process 0 running, "
            "and its port reachable?"
        )
    if _NO_CLUSTER not in message:
        return (
            f"cannot find out whether this cluster runs further processes: {message}; give "
            f"--num_processes=1 if it does not, else {_ALL_THREE}"
        )
    for name in _LAUNCHER_COUNTS:
        if int(os.environ.get(name) or 1) > 1:
            return (
                f"{name} says that there are {os.environ[name]} processes, but not where process 0 "
                f"is; give {_ALL_THREE}"
            )
    return None


def _report_waiting(joined: threading.Event) -> None:
    began = time.monotonic()
    pause = 0.1  # processes that start together find each other at once
    while not joined.wait(pause):
        waited = time.monotonic() - began
        what = "looking for the other processes of this cluster"
        if _state.client is not None:
            what = (
                f"process {_state.process_id} of {_state.num_processes} waits for the others at "
                f"{_state.coordinator_address}"
            )
        elif waited < 3:  # usually JAX soon finds that there is no cluster
            continue
        if waited > _JOIN_SECONDS:
            _exit_alone(
                f"{what}, in vain for {_JOIN_SECONDS:g} s; are all processes running, and is that "
                "port reachable?"
            )
        print(f"{what}, {waited:.0f} s so far", file=sys.stderr, flush=True)
        pause = _WAITING_SECONDS


def has_peers() -> bool:
    """Returns whether this process has joined a run of several; unlike JAX, starts no device."""
    return _has_joined.is_set() and _state.num_processes > 1


def stop_watching() -> None:
    """Stops watching for failures; call it once this process has nothing more to do."""
    _finished.set()


def start_preemption_service() -> None:
    """Passes SIGTERM to JAX's coordination service from now on, and no longer to Python."""
    if _state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        _state.initialize_preemption_sync_manager()


def cause_of(error: Exception) -> str | None:
    """Returns the failure of another process that explains an error of this one, if there is any.

    Waits some seconds for it if a collective may have raised the error.
    """
    deadline = time.monotonic() + _CAUSE_SECONDS
    may_be_collective = isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
    while not (failure := _failure_of_another()):
        if not may_be_collective or time.monotonic() > deadline:
            reason = one_line(error)
            broken = any(text in reason.lower() for text in _BROKEN_COLLECTIVE)
            return f"{_LOST} ({reason[:300]})" if broken else None
        time.sleep(_POLL_SECONDS)
    return failure["message"]


def end_run(exit_code: int, message: str) -> NoReturn:
    """Ends all processes with the message and the exit code of the first to fail."""
    failure = {"process": _state.process_id, "exit_code": exit_code, "message": message}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another failed first
        _state.client.key_value_set(_KEY, json.dumps(failure))
    _exit_with(_published() or failure)


def _published() -> dict[str, Any] | None:
    try:
        return json.loads(_state.client.key_value_try_get(_KEY))
    except jax.errors.JaxRuntimeError:
        return None


def _failure_of_another() -> dict[str, Any] | None:
    failure = _published()
    if failure is None or failure["process"] == _state.process_id:
        return None
    message = f"process {failure['process']} ended the run: {failure['message']}"
    return failure | {"message": message}


def _watch() -> None:
    while not _finished.wait(_POLL_SECONDS):
        if failure := _failure_of_another():
            print(printable(f"error: {failure['message']}"), file=sys.stderr, flush=True)
            _exit_with(failure)


def _exit_with(failure: dict[str, Any]) -> NoReturn:
    """Exits without JAX's barrier at exit, which would wait for the failed process."""
    _leaving.acquire()  # the first thread ends the process
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        # Process 0 holds the service, without which JAX would abort the others.
        _state.client.wait_at_barrier(f"{_KEY}/heard", _NOTICE_MILLISECONDS)
        if _state.process_id == 0:
            time.sleep(0.5)
    with contextlib.suppress(OSError):  # the pipe is no longer read
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(failure["exit_code"])


def _exit_alone(message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _replace_abort() -> None:
    """Ends this process with a message and exit code 1 where JAX would abort it for a lost process.

    JAX offers no callback for that. Python's own signal handlers would run too late, on the main
    thread. Any other abort continues after the tracebacks of all threads, as absl prints them.
    """
    library = ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(number: int) -> None:
        # JAX's client answers no calls while it aborts.
        probe = threading.Thread(target=_published, daemon=True)
        probe.start()
        probe.join(_PROBE_SECONDS)
        if probe.is_alive():
            _exit_alone(_LOST)
        faulthandler.dump_traceback(all_threads=True)
        library.signal(signal.SIGABRT, None)  # the default, which ends the process
        os.kill(os.getpid(), signal.SIGABRT)

    _kept.append(handle)
    library.signal(signal.SIGABRT, handle)
