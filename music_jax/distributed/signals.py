"""What SIGINT, SIGTERM, SIGUSR1 and SIGHUP do: end a command, or stop a run between two steps."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType

from music_jax.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def end_on_signal(end: Callable[[], None]) -> None:
    """From now on a signal ends the process, even in the midst of a compilation.

    What is on disk has to be whole at any moment. To be called on the main thread.

    Args:
      end: ends the process; called on another thread.
    """
    _Listener(lambda number: end()).take(_SIGNALS)


def ignore_signals() -> None:
    """From now on signals do nothing: what the process is for is done, and it is about to end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Ends this process, even within a compilation, as soon as the process that started it ends.

    For the worker processes of a command. They ignore SIGINT, which a terminal sends to all.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this process was not started by multiprocessing")
    sentinel = parent.sentinel

    def wait() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, name="parent", daemon=True).start()


class _Listener:
    """A thread that acts on signals even while the main thread is in what Python cannot interrupt.

    Python's own handlers wait until the main thread is back. Each signal is heard once: by the
    listener that was the last one open when it came. Made and closed on the main thread.
    """

    def __init__(self, hear: Callable[[int], None]):
        """Starts the thread.

        Args:
          hear: called there with each signal's number.
        """
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(
            target=self._listen, args=(reader, hear), name="signals", daemon=True
        )
        self._thread.start()
        self._outer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def take(self, numbers: Iterable[signal.Signals]) -> None:
        """Has Python hear signals, whoever heard them before; not SIGHUP under `nohup`."""
        for number in numbers:
            if number != signal.SIGHUP or self._previous[number] != signal.SIG_IGN:
                signal.signal(number, _left_to_the_thread)

    def close(self) -> None:
        """Gives the signals back, and waits until all that came before are acted on."""
        for number, previous in self._previous.items():
            if previous is not None:  # one that was not Python's
                signal.signal(number, previous)
        signal.set_wakeup_fd(self._outer, warn_on_full_buffer=False)
        os.close(self._writer)
        self._thread.join()

    def _listen(self, reader: int, hear: Callable[[int], None]) -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGHUP:
                self._leave_terminals()
            if number[0] in _SIGNALS:
                hear(number[0])
        os.close(reader)

    def _leave_terminals(self) -> None:
        """Discards what is printed to a terminal that is closed, which would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for terminal in self._terminals:
            if not os.isatty(terminal):
                os.dup2(nowhere, terminal)
        os.close(nowhere)


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass


class Stop:
    """Whether a run is to stop after the present step. Handles no signals.

    Attributes:
      received: Whether it is. Set it, from any thread, to have a run of one process save and raise
        a StoppedError.
    """

    received = False

    def __enter__(self) -> "Stop":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises a StoppedError if the stop came too late for the loop to see it."""
        if self.received and error is None:
            raise StoppedError("saved at the last step; run the same command to finish")

    def begin(self) -> None:
        """Is called after each step: from the first on, there is something to save."""

    def agreed(self) -> None:
        """Is called once all processes are to stop."""
        self.received = True


class StopSignal(Stop):
    """A context in which the first signal asks for a stop and a second one exits at once.

    For commands, which own the process; to be used on the main thread.

    With several processes the stop must be agreed on, so there the signal is left to JAX's
    coordination service, which hears SIGTERM and tells all processes at which step to stop
    (`Checkpoints.reached_preemption`); the other signals are passed on to it as SIGTERM.

    Raises:
      StoppedError: at its end, if a signal came too late for the loop to see it.
    """

    def __init__(self, *, alone: bool, grace_seconds: float):
        """Changes nothing yet.

        Args:
          alone: whether this process is the run's only one.
          grace_seconds: how long after the first signal the process ends whatever it does.
        """
        self._alone = alone
        self._grace_seconds = grace_seconds
        self._grace: threading.Timer | None = None
        self._starting = threading.Lock()
        self._listener: _Listener | None = None

    def __enter__(self) -> "StopSignal":
        return self

    def begin(self) -> None:
        """From here on a signal asks for a stop; before, it does what it did outside.

        To be called as often as one likes.
        """
        if self._listener is not None:
            return
        self._listener = _Listener(self._hear)
        if self._alone:
            self._listener.take(_SIGNALS)
        else:
            from music_jax.distributed import failure_propagation

            failure_propagation.hear_preemption()
            self._listener.take((signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))

    def agreed(self) -> None:
        """To be called once it is settled that the run stops: the next signal ends this process."""
        self.received = True
        self._start_grace()
        if self._listener is not None:
            self._listener.take(_SIGNALS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._grace is not None:
            self._grace.cancel()
            if error is None:
                raise StoppedError("saved at the last step; run the same command to finish")

    def _hear(self, number: int) -> None:
        if not self._start_grace():
            if number == signal.SIGHUP:  # a shell and the kernel each send one for one terminal
                return
            _say("stopping at once; what was saved before is intact")
            os._exit(128 + number)
        if self._alone:
            self.received = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        _say("stopping after this step; once more to stop at once")

    def _start_grace(self) -> bool:
        """False if it has begun before."""
        with self._starting:
            if self._grace is not None:
                return False
            self._grace = threading.Timer(self._grace_seconds, self._grace_is_over)
            self._grace.daemon = True
            self._grace.start()
            return True

    def _grace_is_over(self) -> None:
        _say(
            f"stopped: not saved within checkpoint.grace_seconds = {self._grace_seconds:g}; what "
            "was saved before is intact, and the same command goes on from there"
        )
        os._exit(StoppedError.exit_code)


def _say(text: str) -> None:
    """To standard error past Python's buffer, whose lock another thread may hold for long."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
