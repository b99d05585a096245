"""When one process of a run fails, all end, with its message and its exit code.

Without this the others would wait in a collective for a process that is gone. One that is killed
outright can tell nobody: process 0 misses its sign of life and ends the others. If process 0 itself
is killed, JAX aborts the others at once, since the coordination service went with it.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import (
    distributed,
)  # The coordination service has no public name; Orbax does the same.

from music_jax.terminal import printable

_FAILURE = "music_jax/failure"
_ALIVE = "music_jax/alive"
_DONE = "done"  # in place of a sign of life, from one that has nothing more to do
_POLL_SECONDS = 1.0
_SILENT_SECONDS = 60.0  # without a sign of life, after which a process counts as gone
_BROKEN_SECONDS = 15.0  # the same, once a collective has broken
_FAREWELL_SECONDS = 10.0  # how long the coordinator waits for all to have heard

_finished = threading.Event()
_heard: dict[int, tuple[str, float]] = {}  # of each other process: its last sign of life, and when


def exist() -> bool:
    """Whether this process has joined a run of several; unlike JAX's own count, wakes no device."""
    return (
        distributed.global_state.client is not None and distributed.global_state.num_processes > 1
    )


def watch() -> None:
    """Starts a thread that ends this process within seconds of the failure of another one."""
    threading.Thread(target=_watch, name="peers", daemon=True).start()


def stop_watching() -> None:
    """Ends the thread; to be called once this process has nothing more to do."""
    _finished.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _give_sign(_DONE)


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
    stop_watching()
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
    began = time.monotonic()
    for count in itertools.count():
        message = _failure_of_another()
        if message is not None:
            print(printable(f"error: {message}"), file=sys.stderr, flush=True)
            _leave(_published() or {"exit_code": 1})
        if distributed.global_state.process_id == 0:
            message = _silence(since=began, seconds=_SILENT_SECONDS)
            if message is not None:
                print(printable(f"error: {message}"), file=sys.stderr, flush=True)
                end_run(1, message)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _give_sign(str(count))
        if _finished.wait(_POLL_SECONDS):
            return


def _give_sign(sign: str) -> None:
    key = f"{_ALIVE}/{distributed.global_state.process_id}"
    _client().key_value_set(key, sign, allow_overwrite=True)


def _silence(since: float, seconds: float) -> str | None:
    """Says which other processes have given no sign for so long, if any; for process 0."""
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
    return (
        f"no sign of life from process {', '.join(silent)} for {seconds:g} s: killed, or its "
        "machine is lost; run the same command again to go on from the last checkpoint"
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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure["exit_code"])
