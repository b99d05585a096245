"""The order of samples and the batches that are made of them."""

import dataclasses

import cv2
import numpy as np
import pytest

from music_jax.data.crops import Crop
from music_jax.data.loader import TrainingOrder, evaluation_batches, training_batches
from music_jax.data.sources import Source
from music_jax.errors import UnusableDataError

_WHOLE = Crop(size=8, scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))


@dataclasses.dataclass
class _Records:
    """Images whose every pixel is their index, which is also their label."""

    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        png = cv2.imencode(".png", np.full((8, 8, 1), i, np.uint8))[1].tobytes()
        return {"image": png, "label": i}


def _source(count=23):
    return Source("numbers", _Records(count), "image", "label", num_classes=count)


def _batches(source, order, positions=None, num_steps=5, **kwargs):
    positions = np.arange(order.batch_size) if positions is None else positions
    kwargs = {"crop": _WHOLE, "channels": 1} | kwargs
    return list(training_batches(source, order, positions=positions, num_steps=num_steps, **kwargs))


def test_every_epoch_takes_each_image_once_in_another_order():
    order = TrainingOrder(num_records=24, batch_size=6, seed=0)
    labels = [b["label"] for b in _batches(_source(24), order, num_steps=8)]
    first, second = np.concatenate(labels[:4]), np.concatenate(labels[4:])
    assert sorted(first) == sorted(second) == list(range(24))
    assert np.any(first != second)


def test_the_remainder_of_an_epoch_is_left_out_and_differs_between_epochs():
    order = TrainingOrder(num_records=23, batch_size=5, seed=0)
    assert order.steps_per_epoch == 4
    labels = [b["label"] for b in _batches(_source(), order, num_steps=40)]
    left_out = []
    for epoch in range(10):
        seen = np.concatenate(labels[4 * epoch : 4 * epoch + 4])
        assert len(set(seen)) == 20
        left_out.append(frozenset(range(23)) - set(seen))
    assert len(set(left_out)) > 5


def test_sample_indices_are_never_repeated():
    order = TrainingOrder(num_records=23, batch_size=5, seed=0)
    indices = np.concatenate([b["sample_index"] for b in _batches(_source(), order, num_steps=12)])
    assert len(set(indices)) == 60


def test_the_seed_decides_the_order():
    labels = [
        np.concatenate([b["label"] for b in _batches(_source(), TrainingOrder(23, 5, seed))])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert np.any(labels[0] != labels[2])


def test_starting_later_gives_what_would_have_come():
    order = TrainingOrder(23, 5, seed=3)
    crop = Crop(size=8, scale=(0.3, 0.9))
    whole = _batches(_source(), order, num_steps=9, crop=crop)
    rest = _batches(_source(), order, num_steps=9, crop=crop, start_step=6)
    assert len(rest) == 3
    for a, b in zip(whole[6:], rest, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_the_same_global_batches(processes):
    order = TrainingOrder(23, 6, seed=3)
    whole = _batches(_source(), order)
    parts = [
        _batches(_source(), order, positions=rows) for rows in np.split(np.arange(6), processes)
    ]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, value)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_nothing(threads):
    order = TrainingOrder(23, 6, seed=3)
    crop = Crop(size=8, scale=(0.3, 0.9))
    expected = _batches(_source(), order, crop=crop, num_threads=2)
    found = _batches(_source(), order, crop=crop, num_threads=threads)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


def test_views_are_uint8_side_by_side_and_cut_differently():
    class Gradient(_Records):
        def __getitem__(self, i):
            image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
            return {"image": cv2.imencode(".png", image)[1].tobytes(), "label": i}

    source = Source("gradient", Gradient(23), "image", "label", 23)
    batch = _batches(source, TrainingOrder(23, 5, 0), crop=Crop(8, (0.1, 0.5)), num_steps=1)[0]
    assert batch["images"].shape == (5, 2, 8, 8, 1)
    assert batch["images"].dtype == np.uint8
    assert np.any(batch["images"][:, 0] != batch["images"][:, 1])


def test_an_image_that_cannot_be_decoded_is_named():
    class Broken(_Records):
        def __getitem__(self, i):
            return {"image": b"broken", "label": i}

    source = Source("broken", Broken(23), "image", "label", 23)
    with pytest.raises(UnusableDataError, match=r"image \d+ of broken"):
        _batches(source, TrainingOrder(23, 5, 0))


def test_evaluation_takes_every_image_once_in_order_and_marks_the_filling():
    batches = list(
        evaluation_batches(
            _source(23),
            size=8,
            resize_shorter_side=8,
            channels=1,
            batch_size=10,
            positions=np.arange(10),
        )
    )
    labels = np.concatenate([b["label"] for b in batches])
    np.testing.assert_array_equal(labels, [*range(23), *[-1] * 7])
    images = np.concatenate([b["images"] for b in batches])
    np.testing.assert_array_equal(images[:23, 0, 0, 0], np.arange(23))
