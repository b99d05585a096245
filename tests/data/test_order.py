"""The order of the images of a training."""

import grain
import numpy as np
import pytest

from music_jax.data.order import ORDER_VERSION, TrainingOrder, evenly_spaced


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 4), (2**32 - 1, 1)])
def test_the_order_is_grains_shuffle_keyed_by_seed_and_epoch(seed, epoch):
    order = TrainingOrder(1000, 5, seed)
    key = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    shuffled = grain.MapDataset.range(1000).shuffle(seed=key)
    found = [order.record_key(epoch * 1000 + index) for index in range(1000)]
    assert found == [shuffled[index] for index in range(1000)]


def test_the_order_is_the_same_with_every_version_of_grain_and_numpy():
    assert ORDER_VERSION == 2  # to be raised with each change of the values below
    order = TrainingOrder(num_records=10, batch_size=5, seed=1)
    epochs = [[order.record_key(10 * epoch + i) for i in range(10)] for epoch in range(2)]
    assert epochs == [[8, 6, 9, 3, 0, 2, 7, 1, 5, 4], [6, 5, 7, 3, 8, 4, 9, 2, 0, 1]]


def test_substitutes_are_the_same_with_every_version_of_numpy():
    order = TrainingOrder(num_records=1000, batch_size=5, seed=1)
    found = [[order.substitute(index, attempt) for attempt in range(3)] for index in (0, 7)]
    assert found == [[332, 449, 124], [880, 341, 631]]


def test_no_two_pairs_of_seed_and_epoch_share_an_order():
    seeds = (*range(8), 2**32 - 2, 2**32 - 1)  # the last is followed by 0
    orders = np.array(
        [
            [TrainingOrder(50, 5, seed).record_key(50 * epoch + i) for i in range(50)]
            for seed in seeds
            for epoch in range(6)
        ]
    )
    same = (orders[:, None] == orders[None]).sum(axis=-1)[np.triu_indices(len(orders), 1)]
    assert same.max() < 10  # random orders have one place in common on average
    assert same.mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("num_records", "batch_size"), [(10, 4), (12, 4), (7, 7), (9, 2)])
def test_an_epoch_has_all_full_batches_and_the_indices_of_its_images(num_records, batch_size):
    order = TrainingOrder(num_records, batch_size, seed=0)
    full = num_records // batch_size
    assert order.steps_per_epoch == full
    expected = np.concatenate(
        [epoch * num_records + np.arange(full * batch_size) for epoch in range(3)]
    ).reshape(3 * full, batch_size)
    found = [
        [order.sample_index(step, position) for position in range(batch_size)]
        for step in range(3 * full)
    ]
    np.testing.assert_array_equal(found, expected)


def test_evenly_spaced_indices_include_the_first_and_the_last():
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(101, 5) == [0, 25, 50, 75, 100]
    assert evenly_spaced(3, 16) == [0, 1, 2]
