"""Memory of batches that is used again."""

import gc

import jax
import numpy as np

from music_jax.data.memory import BatchMemory


def _address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_the_array_and_its_views_are_gone():
    memory = BatchMemory()
    array = memory.take((4, 100))
    first = _address(array)
    view = array[2:].reshape(10, 20)
    del array
    assert _address(memory.take((4, 100))) != first
    del view
    gc.collect()
    held = [memory.take((100, 4)) for _ in range(2)]
    assert first in {_address(array) for array in held}


def test_what_a_device_array_shares_is_not_written_over():
    memory = BatchMemory()
    kept = []
    for i in range(6):
        batch = memory.take((64, 1024))
        batch[:] = i
        kept.append(jax.device_put(batch))  # on a CPU without a copy, where it is aligned
    for i, array in enumerate(kept):
        np.testing.assert_array_equal(array, np.full((64, 1024), i, np.uint8))


def test_batches_that_come_and_go_need_no_more_memory_than_is_held_at_once():
    memory = BatchMemory()
    addresses = {_address(memory.take((1000,))) for _ in range(50)}
    assert len(addresses) == 1
