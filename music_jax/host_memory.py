"""The host's memory."""

import contextlib
import ctypes


def give_back() -> None:
    """Gives memory that was freed back to the operating system.

    glibc keeps what its many threads freed, in pieces that grow with every save: without this a
    process that saves often holds several times what it uses. Elsewhere it does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
