"""A JAX profile of some steps."""

import logging
import os
import tempfile
from typing import Any

import jax
from etils import epath

from music_jax.distributed.mesh import is_main_process
from music_jax.errors import UserError

_logger = logging.getLogger(__name__)


def parse_steps(text: str) -> tuple[int, int]:
    """The first and the last step that `START:STOP` names.

    Raises:
      UserError: it names none.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"--profile is START:STOP, the first step, from 1, and the last, such as 20:24; got "
            f"{text!r}"
        )
    return int(first), int(last)


class Profile:
    """Records what process 0 and its devices do from one step to another, both included."""

    def __init__(self, directory: epath.Path, steps: tuple[int, int] | None, num_steps: int):
        """Names the steps.

        Args:
          directory: where the profile goes.
          steps: the first and the last; None for no profile.
          num_steps: of the whole training.

        Raises:
          UserError: the training does not have these steps.
        """
        if steps is not None and not 1 <= steps[0] <= steps[1] <= num_steps:
            raise UserError(
                f"steps {steps[0]} to {steps[1]} cannot be profiled: the training has the steps 1 "
                f"to {num_steps}"
            )
        self._directory = directory
        self._steps = steps if is_main_process() else None
        self._first: int | None = None  # while it is recorded
        self._last = 0  # that was taken
        self._local = os.fspath(directory)

    def start(self, step: int) -> None:
        """Says so if the training goes on after a step which is too late."""
        if self._steps and step >= self._steps[1]:
            _logger.info(
                f"not profiled: steps {self._steps[0]} to {self._steps[1]} were taken before, and "
                f"the training goes on after step {step}"
            )
            self._steps = None

    def before(self, step: int, state: Any) -> None:
        """Begins before the first of the steps; the state is waited for only then."""
        if self._steps is None or self._first is not None or step < self._steps[0]:
            return
        jax.block_until_ready(state)
        if "://" in self._local:
            self._local = tempfile.mkdtemp(prefix="music_jax-profile-")
        options = jax.profiler.ProfileOptions()
        # Without Python's own calls: a process that recorded them has crashed in `start_trace`.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._local, profiler_options=options)
        self._first = step

    def after(self, step: int, state: Any) -> None:
        """Ends after the last of them."""
        self._last = step
        if self._first is not None and self._steps and step >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends, if it has not, and keeps what was recorded."""
        if self._first is None:
            return
        span = f"steps {self._first} to {self._last}"
        self._first = self._steps = None
        try:
            jax.profiler.stop_trace()
            self._move()
        except Exception as error:  # a full disk: the training goes on
            _logger.info(f"the profile of {span} is not kept: {' '.join(str(error).split())[:300]}")
            return
        _logger.info(
            f"profile of {span}: {self._directory}; open its .trace.json.gz in "
            "https://ui.perfetto.dev, or the directory in TensorBoard with its profile plugin"
        )

    def _move(self) -> None:
        """Moves the files into a bucket, which JAX cannot write to."""
        if self._local == os.fspath(self._directory):
            return
        for path in epath.Path(self._local).glob("plugins/profile/*/*"):
            target = self._directory / os.path.relpath(path, self._local)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.copy(target)
        epath.Path(self._local).rmtree()
