"""Handles SIGINT, SIGTERM, SIGUSR1 and SIGHUP: ends a command, or stops a run after a step."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

from music_jax.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def end_on_signal(end: Callable[[], None]) -> None:
    """Ends the process upon a signal from now on, even during a compilation.

    The files on disk must be valid at any time. Call it on the main thread.

    Args:
      end: Function that ends the process; called on another thread.
    """
    _Listener(lambda number: end()).take(_SIGNALS)


def ignore_signals() -> None:
    """Ignores signals from now on; call it once the work is done and the process will end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Ends this process, even within a compilation, as soon as the process that started it ends.

    For the worker processes of a command. They ignore SIGINT, which a terminal sends to all.
    """

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


class _Listener:
    """A thread that handles signals even while the main thread runs code outside Python.

    Python's own handlers wait until the main thread returns. Each signal is handled once, by the
    listener that was opened last. Open and close it on the main thread.
    """

    def __init__(self, handle: Callable[[int], None]):
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._listen, args=(reader, handle), daemon=True)
        self._thread.start()
        self._outer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def take(self, numbers: Iterable[signal.Signals]) -> None:
        """Handles signals from now on; not SIGHUP if the process runs under `nohup`."""
        for number in numbers:
            if number != signal.SIGHUP or self._previous[number] != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)  # the thread handles it

    def close(self) -> None:
        """Waits until all earlier signals are handled; later ones are ignored until `restore`."""
        ignore_signals()
        # Another thread may still be about to write a signal that came before.
        signal.set_wakeup_fd(-1)
        os.close(self._writer)
        self._thread.join()

    def restore(self) -> None:
        """Restores the previous handlers."""
        signal.set_wakeup_fd(self._outer, warn_on_full_buffer=False)
        for number, previous in self._previous.items():
            # None: it was not installed from Python.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _listen(self, reader: int, handle: Callable[[int], None]) -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGHUP:
                with open(os.devnull, "wb") as null:
                    for terminal in self._terminals:
                        if not os.isatty(terminal):  # it is closed: printing would be an error
                            os.dup2(null.fileno(), terminal)
            if number[0] in _SIGNALS:
                handle(number[0])
        os.close(reader)


class Stop:
    """A context that stops a run after the current step once `received` is set.

    It handles no signals.

    Attributes:
      received: Whether to stop. Set it from any thread: a run of one process then saves and raises
        a StoppedError.

    Raises:
      StoppedError: At its end, if the stop came too late for the loop to see it.
    """

    received = False

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self.received and kind is None:
            raise StoppedError("saved at the last step; rerun the command to finish")

    def begin(self) -> None:
        """Notes that there is something to save; called after each step."""

    def agreed(self) -> None:
        """Notes that all processes are going to stop."""
        self.received = True


class StopSignal(Stop):
    """A context in which the first signal requests a stop and a second one exits at once.

    For commands, which own the process; use it on the main thread. After a stop, signals are
    ignored: the process is about to exit.

    Several processes must agree on a stop. There the signal is left to JAX's coordination service,
    which receives SIGTERM and sends all processes the step at which to stop
    (`Checkpoints.reached_preemption`); the other signals are passed on to it as SIGTERM.

    Args:
      alone: Whether this process is the only one of the run.
      grace_seconds: Time after the first signal after which the process ends in any case.

    Raises:
      StoppedError: At its end, if a signal came too late for the loop to see it.
    """

    def __init__(self, *, alone: bool, grace_seconds: float):
        self._alone = alone
        self._grace_seconds = grace_seconds
        self._grace: threading.Timer | None = None
        self._starting = threading.Lock()
        self._listener: _Listener | None = None

    def begin(self) -> None:
        """Requests a stop upon a signal from now on; may be called repeatedly."""
        if self._listener is not None:
            return
        self._listener = _Listener(self._handle)
        if self._alone:
            self._listener.take(_SIGNALS)
        else:
            from music_jax.distributed.cluster import start_preemption_service

            start_preemption_service()
            self._listener.take((signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))

    def agreed(self) -> None:
        """Notes that all processes are going to stop: the next signal ends this process."""
        self.received = True
        self._start_grace()
        if self._listener is not None:
            self._listener.take(_SIGNALS)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self._listener is not None:
            self._listener.close()
            if self._grace is None:  # After a stop, a signal would change the exit code.
                self._listener.restore()
        if self._grace is not None:
            self._grace.cancel()
            self.received = True
        super().__exit__(kind, *rest)

    def _handle(self, number: int) -> None:
        if not self._start_grace():
            if number == signal.SIGHUP:  # a shell and the kernel each send one for one terminal
                return
            _print("stopping at once; what was saved before is intact")
            os._exit(128 + number)
        if self._alone:
            self.received = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        _print("stopping after this step; send the signal again to stop at once")

    def _start_grace(self) -> bool:
        """Starts the grace period; returns False if it has begun before."""
        with self._starting:
            if self._grace is not None:
                return False
            self._grace = threading.Timer(self._grace_seconds, self._end_grace)
            self._grace.daemon = True
            self._grace.start()
            return True

    def _end_grace(self) -> None:
        _print(
            f"stopped: not saved within checkpoint.grace_seconds = {self._grace_seconds:g}; what "
            "was saved before is intact: rerun the command to resume from there"
        )
        os._exit(StoppedError.exit_code)


def _print(text: str) -> None:
    """Writes to standard error, past Python's buffer, which another thread may have locked."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
