"""When one process of a run fails, all end, with its message and its exit code.

Without this the others would wait in a collective for a process that is gone. A process that is
killed or stopped outright tells nobody: process 0 hears no more of it and ends the others. If it is
process 0, each of the others ends by itself once the coordination service, which process 0 runs, no
longer answers.
"""

import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import (
    distributed,
)  # The coordination service has no public name; Orbax does the same.

from music_jax.distributed.terminal import printable

_FAILURE = "music_jax/failure"
_ALIVE = "music_jax/alive"
_DONE = "done"  # the last sign, of one that has nothing more to do
_POLL_SECONDS = 1.0
_SILENT_SECONDS = 50.0  # after which a process that is not heard of counts as gone
_BROKEN_SECONDS = 15.0  # the same, once a collective has broken
# Between two rounds of the watch: then this process itself stood still (suspended, or its threads
# had to wait), and judges nobody by that time.
_STALLED_SECONDS = 10.0
_FAREWELL_SECONDS = 10.0  # how long the coordinator waits for all to have heard
# After which JAX itself aborts: later than all of the above, whose messages come first.
HEARTBEAT_TIMEOUT_SECONDS = 300
# The same for processes that do not find each other, which JAX would end by an abort.
_JOIN_SECONDS = 300.0
JOIN_TIMEOUT_SECONDS = 360
_WAITING_SECONDS = 30.0  # between two lines that say what a process waits for

_joined = threading.Event()
_finished = threading.Event()
_heard: dict[int, tuple[str, float]] = {}  # of each other process: its last sign, and when
_kept: list[Any] = []  # what C alone refers to


def exist() -> bool:
    """Whether this process has joined a run of several; unlike JAX's own count, wakes no device."""
    return _joined.is_set() and distributed.global_state.num_processes > 1


def coordinator() -> str | None:
    """HOST:PORT of process 0, once JAX has it from the flags or from the cluster."""
    return distributed.global_state.coordinator_address


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """Says what this process waits for while the processes find each other, on standard error.

    Ends this process if they do not.
    """
    _replace_abort()
    joined = threading.Event()
    thread = threading.Thread(target=_tell_of_waiting, args=(joined,), daemon=True)
    thread.start()
    try:
        yield
        if distributed.global_state.client is not None:
            _joined.set()
    finally:
        joined.set()
        thread.join()


def watch() -> None:
    """Starts what ends this process soon after another one has failed or fallen silent."""
    threading.Thread(target=_watch, name="peers", daemon=True).start()
    if distributed.global_state.process_id != 0:
        _heard[0] = "", time.monotonic()
        threading.Thread(target=_watch_service, name="process 0", daemon=True).start()


def stop_watching() -> None:
    """Ends the threads; to be called once this process has nothing more to do."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _give_sign(_DONE)
    _finished.set()


def hear_preemption() -> None:
    """From now on SIGTERM is heard by JAX's coordination service, and by Python no more."""
    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()


def failure_behind(error: Exception) -> str | None:
    """What another process has failed with, if that can be why this one fails.

    Args:
      error: that a collective may have raised when it broke. Then this waits until the other
        process, or its silence, has told.
    """
    broken = time.monotonic()
    may_be_a_collective = isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
    while True:
        failure = _failure_of_another()
        if failure is None and distributed.global_state.process_id == 0:
            failure = _silence(since=broken, seconds=_BROKEN_SECONDS)
        waited = time.monotonic() - broken
        if failure or not may_be_a_collective or waited > _BROKEN_SECONDS + 2 * _POLL_SECONDS:
            return failure
        time.sleep(_POLL_SECONDS)


def end_run(exit_code: int, message: str) -> NoReturn:
    """Ends this process at once, telling the others to end too; the first to fail gives the code.

    Args:
      exit_code: of all processes.
      message: what the others print.
    """
    mine = {
        "process": distributed.global_state.process_id,
        "exit_code": exit_code,
        "message": message,
    }
    # It is refused if another came first, or if the service is gone.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_FAILURE, json.dumps(mine))
    _leave(_published() or mine)


def _client() -> Any:
    return distributed.global_state.client


def _published() -> dict[str, Any] | None:
    try:
        return json.loads(_client().key_value_try_get(_FAILURE))
    except jax.errors.JaxRuntimeError:
        return None


def _failure_of_another() -> str | None:
    failure = _published()
    if failure is None or failure["process"] == distributed.global_state.process_id:
        return None
    return f"process {failure['process']} ended the run: {failure['message']}"


def _watch() -> None:
    began = last = time.monotonic()
    for count in itertools.count():
        message = _failure_of_another()
        if message is not None:
            print(printable(f"error: {message}"), file=sys.stderr, flush=True)
            _leave(_published() or {"exit_code": 1})
        if distributed.global_state.process_id == 0:
            now = time.monotonic()
            if now - last > _STALLED_SECONDS:
                began = now
            last = now
            message = _silence(since=began, seconds=_SILENT_SECONDS)
            if message is not None:
                print(printable(f"error: {message}"), file=sys.stderr, flush=True)
                end_run(1, message)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _give_sign(str(count))
            _heard[0] = "", time.monotonic()
        if _finished.wait(_POLL_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _give_sign(_DONE)  # again: the last count may have come after the first
            return


def _watch_service() -> None:
    """Ends this process when the service of process 0 has not answered `_watch` for long.

    A call to a service that is stopped does not return, hence a thread of its own.
    """
    last = time.monotonic()
    while not _finished.wait(_POLL_SECONDS):
        now = time.monotonic()
        if now - last > _STALLED_SECONDS:
            _heard[0] = "", now
        last = now
        if time.monotonic() - _heard[0][1] > _SILENT_SECONDS:
            _end_alone(1, _gone("0", _SILENT_SECONDS))


def _end_alone(exit_code: int, message: str) -> NoReturn:
    """Ends this process without a word to the others, which find out likewise."""
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(exit_code)


def _replace_abort() -> None:
    """Has our message and exit code end this process where JAX would abort it.

    JAX's client aborts at once when its connection to process 0 breaks, and lets nobody be asked
    first. Python's own signal handlers would run too late, on the main thread. Any other abort goes
    on, with the threads' tracebacks as absl prints them.
    """
    library = ctypes.CDLL(None)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(number: int) -> None:
        if exist() and distributed.global_state.process_id != 0 and not _service_is_there():
            _end_alone(1, _gone("0", 0))
        faulthandler.dump_traceback(all_threads=True)
        library.signal(signal.SIGABRT, None)  # the default, which ends the process
        os.kill(os.getpid(), signal.SIGABRT)

    _kept.append(handle)
    library.signal(signal.SIGABRT, handle)


def _service_is_there() -> bool:
    host, _, port = (coordinator() or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _tell_of_waiting(joined: threading.Event) -> None:
    began = time.monotonic()
    due = began + 0.1  # processes that start together find each other at once
    while not joined.wait(max(0.0, due - time.monotonic())):
        state, now = distributed.global_state, time.monotonic()
        what = "looking for the other processes of this cluster"
        if state.client is not None:
            what = (
                f"process {state.process_id} of {state.num_processes} waits for the others at "
                f"{state.coordinator_address}"
            )
        elif now - began < 3:  # most often there is no cluster, which is soon found out
            due = now + 0.1
            continue
        if now - began > _JOIN_SECONDS:
            _end_alone(
                1,
                f"{what}, in vain for {_JOIN_SECONDS:g} s; are all processes running, and is that "
                "port reachable?",
            )
        print(f"{what}, {now - began:.0f} s so far", file=sys.stderr, flush=True)
        due = now + _WAITING_SECONDS


def _give_sign(sign: str) -> None:
    key = f"{_ALIVE}/{distributed.global_state.process_id}"
    _client().key_value_set(key, sign, allow_overwrite=True)


def _silence(since: float, seconds: float) -> str | None:
    """Says which other processes were not heard of for so long, if any; for process 0."""
    now = time.monotonic()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        for key, sign in _client().key_value_dir_get(_ALIVE):
            process = int(key.rpartition("/")[2])
            if _heard.get(process, ("", 0.0))[0] != sign:
                _heard[process] = sign, now
    silent = []
    for process in range(1, distributed.global_state.num_processes):
        sign, last = _heard.get(process, ("", since))
        if sign != _DONE and now - max(last, since) > seconds:
            silent.append(str(process))
    if not silent:
        return None
    return _gone(", ".join(silent), seconds)


def _gone(processes: str, seconds: float) -> str:
    since = f" for {seconds:g} s" if seconds else ""
    return (
        f"no answer from process {processes}{since}: killed or stopped, or its machine is lost; "
        "rerun the command to resume from the last checkpoint"
    )


def _leave(failure: dict[str, Any]) -> NoReturn:
    """Exits without JAX's barrier at exit, which would wait for the failed process."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client = _client()
        client.key_value_set(f"{_FAILURE}/heard/{distributed.global_state.process_id}", "")
        if (
            distributed.global_state.process_id == 0
        ):  # It holds the service, whose loss would abort the others.
            deadline = time.monotonic() + _FAREWELL_SECONDS
            for process in range(1, distributed.global_state.num_processes):
                left = max(1, int(1000 * (deadline - time.monotonic())))
                client.blocking_key_value_get(f"{_FAILURE}/heard/{process}", left)
            time.sleep(0.5)
    with contextlib.suppress(OSError):  # of a pipe that nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(failure["exit_code"])
