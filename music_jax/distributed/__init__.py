"""Devices and processes: the mesh, joining a cluster, propagation of failures, terminal output."""

import os


def usable_cores() -> int:
    """Returns the number of cores that the process's CPU affinity allows."""
    affinity = getattr(os, "sched_getaffinity", None)  # exists on Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1
