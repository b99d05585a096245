"""Records a JAX profile of some steps."""

import logging
import os
import tempfile
from typing import Any

import jax
from etils import epath

from music_jax.distributed.mesh import is_main_process
from music_jax.errors import UserError, one_line
from music_jax.workdir.files import in_bucket

_logger = logging.getLogger(__name__)


def parse_steps(text: str) -> tuple[int, int]:
    """Parses `START:STOP`, the first and the last step of a profile.

    Raises:
      UserError: The text is not of this form.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"--profile={text} must be START:STOP, the first and the last step (the first of the "
            "run is 1), such as 20:24"
        )
    return int(first), int(last)


class Profile:
    """Profiles process 0 and its devices from one step to another, both included."""

    def __init__(self, directory: epath.Path, steps: tuple[int, int] | None, num_steps: int):
        """Chooses the first and the last step; None for no profile.

        Raises:
          UserError: The training does not have these steps.
        """
        if steps is not None and not 1 <= steps[0] <= steps[1] <= num_steps:
            raise UserError(
                f"cannot profile steps {steps[0]} to {steps[1]}: the training has steps 1 to "
                f"{num_steps}"
            )
        self._directory = directory
        self._steps = steps if is_main_process() else None
        self._local: epath.Path | None = None  # where the profile is recorded, while it is

    def before(self, step: int, state: Any) -> None:
        """Starts the profile before the first of the steps, once the previous step is done."""
        if not self._steps or self._local or step < self._steps[0]:
            return
        if step > self._steps[1]:
            _logger.warning(
                f"not profiled: the training resumes after step {step - 1}, and steps "
                f"{self._steps[0]} to {self._steps[1]} were taken before"
            )
            self._steps = None
            return
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # `start_trace` has crashed while tracing Python's calls
        self._local = self._directory
        if in_bucket(self._directory):  # to which JAX cannot write
            self._local = epath.Path(tempfile.mkdtemp(prefix="music_jax-profile-"))
        jax.profiler.start_trace(os.fspath(self._local), profiler_options=options)

    def after(self, step: int, state: Any) -> None:
        """Ends the profile after the last of the steps."""
        if self._steps and step >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the profile if it is being recorded, and saves what was recorded."""
        if self._local is None:
            return
        local, self._local, self._steps = self._local, None, None
        try:
            jax.profiler.stop_trace()
            if local != self._directory:
                for path in local.glob("plugins/profile/*/*"):
                    target = self._directory / path.relative_to(local)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.copy(target)
                local.rmtree()
        except Exception as error:  # for example a full disk: the training continues
            _logger.warning(f"the profile could not be saved: {one_line(error, 300)}")
            return
        _logger.info(
            f"saved the profile in {self._directory}; open its .trace.json.gz in "
            "https://ui.perfetto.dev, or the directory in TensorBoard with its profile plugin"
        )
