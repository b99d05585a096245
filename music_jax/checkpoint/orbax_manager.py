"""Orbax's manager of checkpoints, as one thread saves while another takes the steps."""

import orbax.checkpoint as ocp


class Manager(ocp.CheckpointManager):
    """Saves on another thread than the one that takes the steps.

    So Orbax must not ask at which step a preemption stops the run: it would ask for a step that is
    past, and the processes would never agree on one. `reached_preemption_at` is for the loop.

    Attributes:
      failure: what a write failed with; told at once, whereas Orbax first waits for the other
        processes, for up to 20 minutes.
    """

    failure: Exception | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise

    def reached_preemption(self, step: int) -> bool:
        """False: what Orbax asks from its own thread."""
        return False

    def reached_preemption_at(self, step: int) -> bool:
        """Whether a preemption stops the run at a step; for the loop, in all processes."""
        return bool(super().reached_preemption(step))
