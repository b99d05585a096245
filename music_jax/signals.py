"""What SIGINT, SIGTERM and SIGUSR1 do: end a command at once, or stop a run between two steps."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from music_jax.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def end_on_signal(end: Callable[[], None]) -> None:
    """From now on a signal ends the process, even in the midst of a compilation.

    A thread of its own sees to it: Python's handlers wait until the main thread is back from what
    it calls. What is on disk has to be whole at any moment. To be called on the main thread.

    Args:
      end: ends the process; called on that thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _left_to_the_thread)
    threading.Thread(target=_listen, args=(reader, end), name="signals", daemon=True).start()


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass


def _listen(reader: int, end: Callable[[], None]) -> None:
    while number := os.read(reader, 1):
        if signal.getsignal(number[0]) is _left_to_the_thread:
            end()


class StopSignal:
    """A context in which the first signal asks for a stop and a second one exits at once.

    With several processes the stop must be agreed on, so there the signal is left to JAX's
    coordination service, which hears SIGTERM and tells all processes at which step to stop
    (`Checkpoints.reached_preemption`); the other signals are passed on to it as SIGTERM.
    """

    def __init__(self, *, alone: bool, grace_seconds: float):
        """Changes nothing yet.

        Args:
          alone: whether this process is the run's only one.
          grace_seconds: how long after the first signal the process ends whatever it does.
        """
        self.received = False  # whether this process, being the only one, is to stop
        self._alone = alone
        self._grace_seconds = grace_seconds
        self._grace: threading.Timer | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        return self

    def begin(self) -> None:
        """From here on a signal asks for a stop; before, it does what it did outside.

        To be called as often as one likes.
        """
        if self._previous:
            return
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        if not self._alone:
            from music_jax import peers  # with JAX, for which the commands do not wait

            peers.hear_preemption()
        for number in _SIGNALS:
            if self._alone:
                signal.signal(number, self._stop)
            elif number != signal.SIGTERM:  # that one JAX hears
                signal.signal(number, self._pass_on)

    def agreed(self) -> None:
        """To be called once it is settled that the run stops: the next signal ends this process."""
        if self._grace is None:
            self._start_grace()
            for number in _SIGNALS:
                signal.signal(number, self._end)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._grace is not None:
            self._grace.cancel()
        for number, previous in self._previous.items():
            if previous is not None:  # one that was not Python's
                signal.signal(number, previous)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.agreed()
        _say("stopping after this step; once more to stop at once")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._end)
        _say("stopping after this step; once more to stop at once")
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, number: int, frame: FrameType | None) -> None:
        _say("stopping at once; what was saved before is intact")
        os._exit(128 + number)

    def _start_grace(self) -> None:
        self._grace = threading.Timer(self._grace_seconds, self._grace_is_over)
        self._grace.daemon = True
        self._grace.start()

    def _grace_is_over(self) -> None:
        _say(
            f"stopped: not saved within checkpoint.grace_seconds = {self._grace_seconds:g}; what "
            "was saved before is intact, and the same command goes on from there"
        )
        os._exit(StoppedError.exit_code)


def _say(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")
    sys.stderr.flush()
