"""What TensorStore still answers after a save or a restore has failed."""

import sys
from typing import Any


def ignore_late_answers() -> None:
    """From now on says nothing of answers that come once Orbax has closed its event loop.

    Of the many reads or writes of a restore or save that fails, the first to fail ends it. The
    others answer later, to a loop that is closed; Python would print a traceback for each, of which
    nobody can make anything.
    """
    usual = sys.unraisablehook
    if getattr(usual, "__module__", None) == __name__:  # it was called before
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            usual(unraisable)

    sys.unraisablehook = hook
