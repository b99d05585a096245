"""The host's memory."""

import contextlib
import ctypes
import os

_M_ARENA_MAX = -8  # of glibc's malloc.h


def use_few_arenas() -> None:
    """Lets all threads allocate from two pools; to be called before there are many threads.

    glibc gives each new thread a pool of its own, and what one of them frees the others cannot use:
    with the many short-lived threads of a save the process grew for as long as it ran. Does nothing
    where the user has set MALLOC_ARENA_MAX, or where the C library is another one.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def give_back() -> None:
    """Gives memory that was freed back to the operating system.

    glibc keeps what its many threads freed, in pieces that grow with every save: without this a
    process that saves often holds several times what it uses. Elsewhere it does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
