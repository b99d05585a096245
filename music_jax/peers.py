"""When one process of a run fails, all end, with its message and its exit code.

Without this the others would wait in a collective for a process that is gone: on a CPU until the
connection breaks, on a TPU until JAX's heartbeat of 100 s runs out, and then abort with a code that
says nothing. A process that is killed outright can tell nobody, and is still left to those two.
"""

import contextlib
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

_FAILURE = "music_jax/failure"
_POLL_SECONDS = 1.0
_FAREWELL_SECONDS = 10.0  # how long the coordinator waits for all to have heard

_finished = threading.Event()


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


def failure_of_another() -> str | None:
    """What another process has failed with, if one has."""
    failure = _published()
    if failure is None or failure["process"] == distributed.global_state.process_id:
        return None
    return f"process {failure['process']} ended the run: {failure['message']}"


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


def _watch() -> None:
    while not _finished.wait(_POLL_SECONDS):
        message = failure_of_another()
        if message is not None:
            print(f"error: {message}", file=sys.stderr, flush=True)
            _leave(_published() or {"exit_code": 1})


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
