"""Memory of batches, used again once nobody holds a batch any more."""

import collections
import ctypes
import math
import weakref

import numpy as np


class BatchMemory:
    """Gives arrays for batches of one size, from any thread.

    The system takes the memory of large arrays back as soon as they are freed, and fills it with
    zeros, page by page, when it is asked for again. Here it is kept: an array's memory is free once
    the array, its views and all that shares their memory (such as a `jax.Array` on a CPU) are gone.
    """

    def __init__(self) -> None:
        """No memory is held yet."""
        self._free: collections.deque[np.ndarray] = collections.deque()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array of any content; every call must be for the same number of bytes."""
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(math.prod(shape), np.uint8)
        # Every array made of it holds this object, whose end is the sign that all of them are gone.
        held = (ctypes.c_uint8 * block.size).from_buffer(block.data)
        weakref.finalize(held, self._free.append, block).atexit = False
        return np.frombuffer(memoryview(held), np.uint8).reshape(shape)
