"""Turning SIGINT and SIGTERM into a stop between two steps."""

import os
import signal
import sys
from types import FrameType, TracebackType

import jax


class StopSignal:
    """A context in which the first signal asks for a stop and a second one exits at once.

    With several processes the stop must be agreed on, so there the signal is left to JAX's
    coordination service, which hears SIGTERM and tells all processes at which step to stop
    (`Checkpoints.reached_preemption`); SIGINT is passed on to it as SIGTERM.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[int, object] = {}

    @property
    def received(self) -> bool:
        """Whether this process, being the only one, is to stop."""
        return self._received and jax.process_count() == 1

    def __enter__(self) -> "StopSignal":
        alone = jax.process_count() == 1
        for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
        if jax.process_count() > 1:
            # Nothing asks the service for a step any more; SIGTERM goes to Python's handler again.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            sys.stderr.write("\nstopping at once; what was saved before is intact\n")
            sys.stderr.flush()
            os._exit(128 + number)
        self._received = True
        sys.stderr.write("\nstopping after this step; once more to stop at once\n")
        sys.stderr.flush()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
