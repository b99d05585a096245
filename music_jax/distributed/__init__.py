"""Devices and processes: the mesh, joining a cluster, propagation of failures, terminal output."""

import contextlib
import ctypes
import math
import os
import pathlib

_M_ARENA_MAX = -8  # in glibc's malloc.h
# CPU time of a container and the period in which it may be used; cgroup v2, as seen from inside.
_CPU_LIMIT = pathlib.Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Returns the number of cores that the CPU affinity and the container's CPU limit allow."""
    affinity = getattr(os, "sched_getaffinity", None)  # exists on Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # there is no limit, which reads "max"
        limit, period = map(int, _CPU_LIMIT.read_text().split())
        return max(1, min(cores, math.ceil(limit / period)))
    return cores


def limit_malloc_arenas() -> None:
    """Makes all threads allocate from two pools; to be called before many threads exist.

    glibc gives each thread a pool of its own, whose freed memory other threads cannot use, so that
    a process grows with the threads of every save. Does nothing if the user has set
    MALLOC_ARENA_MAX or the C library is another one.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
