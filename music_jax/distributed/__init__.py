"""Devices and processes: the mesh, joining a cluster, propagation of failures, terminal output."""

import contextlib
import ctypes
import os

_M_ARENA_MAX = -8  # in glibc's malloc.h


def usable_cores() -> int:
    """Returns the number of cores that the process's CPU affinity allows."""
    affinity = getattr(os, "sched_getaffinity", None)  # exists on Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def limit_malloc_arenas() -> None:
    """Makes all threads allocate from two pools; to be called before many threads exist.

    glibc gives each thread a pool of its own, whose freed memory other threads cannot use, so that
    a process grows with the threads of every save. Does nothing if the user has set
    MALLOC_ARENA_MAX or the C library is another one.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
