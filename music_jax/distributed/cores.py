"""The cores that this process may use."""

import os


def usable_cores() -> int:
    """Returns the number of cores that the process's CPU affinity allows."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1
