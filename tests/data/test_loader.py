"""The order of samples and the batches that are made of them."""

import dataclasses
import io
import json
import os
import threading
import time

import cv2
import grain
import numpy as np
import pytest
from etils import epath
from listed_records import list_source
from PIL import Image

from music_jax import distributed
from music_jax.data import loader
from music_jax.data.crops import NUMBERS_PER_BOX, Box, Crop, cut, draw_boxes
from music_jax.data.loader import evaluation_batches, loader_bytes, training_batches
from music_jax.data.order import TrainingOrder
from music_jax.data.skipped import SkippedImages
from music_jax.distributed import usable_cores
from music_jax.distributed.shares import ALL, Share
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
    return list_source("numbers", _Records(count), count)


def _batches(source, order, positions=None, *, crop=_WHOLE, num_views=2, local=None, **options):
    positions = np.arange(order.batch_size) if positions is None else positions
    views = {"images": (crop, num_views)} | ({} if local is None else {"local_images": local})
    options = {"channels": 1, "num_steps": 5} | options
    return list(training_batches(source, order, views=views, positions=positions, **options))


def test_every_epoch_takes_each_image_once_in_another_order():
    order = TrainingOrder(num_records=24, batch_size=6, seed=0)
    labels = [b["label"] for b in _batches(_source(24), order, num_steps=8)]
    first, second = np.concatenate(labels[:4]), np.concatenate(labels[4:])
    assert sorted(first) == sorted(second) == list(range(24))
    assert np.any(first != second)


def test_the_remainder_of_an_epoch_is_dropped_and_differs_between_epochs():
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


def test_sample_indices_continue_from_0_after_4_billion():
    order = TrainingOrder(num_records=4, batch_size=2, seed=0)
    (batch,) = _batches(_source(4), order, start_step=2**31, num_steps=2**31 + 1)
    assert batch["sample_index"].tolist() == [0, 1]


def test_the_seed_decides_the_order():
    labels = [
        np.concatenate([b["label"] for b in _batches(_source(), TrainingOrder(23, 5, seed))])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert np.any(labels[0] != labels[2])


def test_a_later_start_gives_the_same_batches():
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


@pytest.mark.parametrize("positions", [[0, 1, 4, 5, 6, 9], [0, 2, 4, 6, 8], [3]])
def test_the_crops_of_a_sample_do_not_depend_on_the_other_positions_that_are_read(positions):
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 1), np.uint8)
    records = [{"image": cv2.imencode(".png", image)[1].tobytes(), "label": 0}] * 20
    source, order = list_source("same", records, 1), TrainingOrder(20, 10, seed=5)
    crop = Crop(size=8, scale=(0.1, 0.6))
    whole = _batches(source, order, num_steps=2, crop=crop)
    part = _batches(source, order, np.asarray(positions), num_steps=2, crop=crop)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a["images"][positions], b["images"])


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_nothing(threads):
    order = TrainingOrder(23, 6, seed=3)
    crop = Crop(size=8, scale=(0.3, 0.9))
    expected = _batches(_source(), order, crop=crop, num_threads=2)
    found = _batches(_source(), order, crop=crop, num_threads=threads)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


@pytest.mark.parametrize("batch_size", [1, 31, 32, 33, 70])
def test_batches_of_any_size_are_filled_completely(batch_size):
    order = TrainingOrder(70, batch_size, seed=3)
    for step, batch in enumerate(_batches(_source(70), order, num_steps=3, num_threads=5)):
        indices = [order.sample_index(step, position) for position in range(batch_size)]
        labels = [order.record_key(index) for index in indices]
        assert batch["sample_index"].tolist() == indices
        assert batch["label"].tolist() == labels
        assert batch["images"][:, 1, 0, 0, 0].tolist() == labels


class _Counted(_Records):
    read = 0

    def __getitem__(self, i):
        self.read += 1
        return super().__getitem__(i % 200)


@pytest.mark.parametrize("threads", [1, 4, 64])
def test_however_many_threads_few_batches_are_read_ahead(threads):
    records = _Counted(100_000)
    order = TrainingOrder(len(records), 64, seed=0)
    source = list_source("counted", records, 200)
    batches = training_batches(
        source,
        order,
        views={"images": (_WHOLE, 2)},
        channels=1,
        positions=np.arange(64),
        num_steps=1000,
        num_threads=threads,
    )
    next(batches)
    read = -1
    while read != records.read:
        read = records.read
        time.sleep(0.2)
    assert 3 * 64 <= read <= 5 * 64


def test_memory_is_that_of_the_batches_files_and_images_that_are_held_at_once():
    # One part of 12 rows per batch: three of them ahead, one that is partly read, and in each
    # thread the files of a part and two images.
    found = loader_bytes(8, 100, num_threads=2, file_bytes=1000, image_bytes=5000)
    assert found == 4 * 8 * 100 + 2 * (12 * 1000 + 2 * 5000)
    # With many threads one row is a part, and there is one part more than threads ahead.
    found = loader_bytes(8, 100, num_threads=63, file_bytes=1000, image_bytes=5000)
    assert found == (64 // 8 + 1) * 8 * 100 + 63 * (1000 + 2 * 5000)


def test_several_threads_decode_one_batch():
    together = threading.Barrier(4, timeout=20)

    class Waiting(_Records):
        def __getitem__(self, i):
            together.wait()
            return super().__getitem__(i)

    source = list_source("waiting", Waiting(128), 128)
    (batch,) = _batches(source, TrainingOrder(128, 128, 0), num_steps=1, num_threads=4)
    assert sorted(batch["label"]) == list(range(128))
    (batch,) = evaluation_batches(
        source,
        size=8,
        resize_shorter_side=8,
        channels=1,
        batch_size=128,
        positions=np.arange(128),
        num_threads=4,
    )
    assert batch["label"].tolist() == list(range(128))


def test_there_are_as_many_threads_as_the_process_has_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 40}, raising=False)
    assert usable_cores() == 3
    used, options = [], grain.ReadOptions

    def read_options(**given):
        used.append(given["num_threads"])
        return options(**given)

    monkeypatch.setattr(loader.grain, "ReadOptions", read_options)
    _batches(_source(), TrainingOrder(23, 5, 0))
    _batches(_source(), TrainingOrder(23, 5, 0), num_threads=2)
    assert used == [3, 2]
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert usable_cores() == 128


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", 6),
        ("400000 100000", 4),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("900000 100000", 6),
        ("", 6),
    ],
)
def test_a_container_that_limits_the_cpu_time_has_fewer_cores(
    monkeypatch, tmp_path, limit, expected
):
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(distributed, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert usable_cores() == expected


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_a_split_and_its_padding(processes):
    parts = [
        evaluation_batches(
            _source(),
            size=8,
            resize_shorter_side=8,
            channels=1,
            batch_size=6,
            positions=positions,
            num_threads=2,
        )
        for positions in np.split(np.arange(6), processes)
    ]
    joined = [np.concatenate([part["label"] for part in same]) for same in zip(*parts, strict=True)]
    assert np.concatenate(joined).tolist() == [*range(23), -1]


def test_half_of_the_views_are_mirrored_independently():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    records = [{"image": cv2.imencode(".png", image)[1].tobytes(), "label": 0}] * 200
    source, order = list_source("same", records, 1), TrainingOrder(200, 200, 0)
    (batch,) = _batches(source, order, num_steps=1, flip=True)
    mirrored = np.all(batch["images"] == image[:, ::-1], axis=(2, 3, 4))
    assert np.all(mirrored | np.all(batch["images"] == image, axis=(2, 3, 4)))
    counts = [
        int(np.sum((mirrored[:, 0] == a) & (mirrored[:, 1] == b))) for a in (0, 1) for b in (0, 1)
    ]
    assert sum(counts) == 200
    assert min(counts) > 30  # 50 each, with a standard deviation of 6
    (batch,) = _batches(source, order, num_steps=1)
    assert np.all(batch["images"] == image)


@pytest.mark.parametrize("num_views", [1, 2])
def test_boxes_and_flips_use_fixed_positions_of_one_random_stream(num_views):
    """The last number of each view flips it, and no other does: the others place the box."""
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    records = [{"image": cv2.imencode(".png", image)[1].tobytes(), "label": 0}] * 20
    source, order = list_source("same", records, 1), TrainingOrder(20, 10, seed=5)
    crop = Crop(8, (0.1, 0.6))
    batches = _batches(
        source, order, num_steps=2, crop=crop, channels=3, num_views=num_views, flip=True
    )
    found = np.concatenate([batch["images"] for batch in batches])[..., ::-1]  # as OpenCV has it

    count = NUMBERS_PER_BOX + 1  # for each view
    length = {1: 24, 2: 48}[num_views]  # of a sample's part: the next multiple of four
    stream = np.random.Generator(np.random.Philox(key=[5, 0])).random((20, length))
    numbers = stream[:, : num_views * count].reshape(20 * num_views, count)
    sides = np.full(len(numbers), 30), np.full(len(numbers), 40)
    boxes = draw_boxes(*sides, crop, numbers[:, :NUMBERS_PER_BOX])
    expected = np.empty((len(numbers), 8, 8, 3), np.uint8)
    for view, box, row in zip(expected, boxes.tolist(), numbers, strict=True):
        cut(image, Box(*box), view)
        if row[NUMBERS_PER_BOX] < 0.5:
            view[:] = view[:, ::-1].copy()
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


def test_views_are_uint8_side_by_side_and_cut_differently():
    class Gradient(_Records):
        def __getitem__(self, i):
            image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
            return {"image": cv2.imencode(".png", image)[1].tobytes(), "label": i}

    source = list_source("gradient", Gradient(23), 23)
    batch = _batches(source, TrainingOrder(23, 5, 0), crop=Crop(8, (0.1, 0.5)), num_steps=1)[0]
    assert batch["images"].shape == (5, 2, 8, 8, 1)
    assert batch["images"].dtype == np.uint8
    assert np.any(batch["images"][:, 0] != batch["images"][:, 1])


class _PartlyBroken(_Records):
    """Every fifth image, beginning with number 2, is broken."""

    def __getitem__(self, i):
        record = super().__getitem__(i)
        return record | {"image": b"broken"} if i % 5 == 2 else record


def _partly_broken(count=40):
    return list_source("partly", _PartlyBroken(count), count)


def _skipped(path, max_share=0.5, share=ALL):
    return SkippedImages(epath.Path(path), max_share=max_share, share=share)


def test_without_a_list_an_image_that_cannot_be_decoded_is_an_error_that_names_it():
    with pytest.raises(UnusableDataError, match=r"image \d+ of partly: it is no JPEG, PNG"):
        _batches(_partly_broken(), TrainingOrder(40, 8, 0))


def test_only_broken_images_are_replaced(tmp_path):
    order = TrainingOrder(40, 8, 0)
    whole = _batches(_source(40), order)
    found = _batches(_partly_broken(), order, skipped=_skipped(tmp_path))
    expected = np.concatenate([b["label"] for b in whole])
    labels = np.concatenate([b["label"] for b in found])
    images = np.concatenate([b["images"][:, :, 0, 0, 0] for b in found])
    broken = expected % 5 == 2
    assert 0 < broken.sum() < 40
    np.testing.assert_array_equal(labels[~broken], expected[~broken])
    assert np.all(labels % 5 != 2)
    assert len(set(labels[broken])) > 1
    np.testing.assert_array_equal(images, np.stack([labels, labels], axis=1))


@pytest.mark.parametrize("parts", [2, 4])
def test_replacements_are_the_same_on_any_number_of_processes_and_after_a_resume(parts, tmp_path):
    order = TrainingOrder(40, 8, 0)
    whole = _batches(_partly_broken(), order, skipped=_skipped(tmp_path))
    rows = np.split(np.arange(8), parts)
    shares = [
        _batches(
            _partly_broken(),
            order,
            positions=rows[i],
            start_step=2,
            skipped=_skipped(tmp_path, share=Share(i, parts)),
        )
        for i in range(parts)
    ]
    for step, batch in enumerate(whole[2:]):
        for name, value in batch.items():
            joined = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(joined, value)


def test_every_broken_image_is_listed_once_by_name(tmp_path):
    skipped = _skipped(tmp_path)
    _batches(_partly_broken(), TrainingOrder(40, 8, 0), num_steps=10, skipped=skipped)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(int(line["image"]) for line in lines) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert {line["source"] for line in lines} == {"partly"}


def test_more_than_the_share_that_may_be_broken_is_an_error(tmp_path):
    with pytest.raises(
        UnusableDataError, match=r"[5-8] of the 40 images of partly.*= 0\.1;.*skipped\."
    ):
        _batches(
            _partly_broken(),
            TrainingOrder(40, 8, 0),
            num_steps=10,
            skipped=_skipped(tmp_path, max_share=0.1),
        )


def test_a_dataset_of_nothing_but_broken_images_is_an_error(tmp_path):
    class Broken(_Records):
        def __getitem__(self, i):
            return {"image": b"broken", "label": i}

    source = list_source("broken", Broken(23), 23)
    with pytest.raises(UnusableDataError, match="100 images of broken, drawn at random"):
        _batches(source, TrainingOrder(23, 5, 0), skipped=_skipped(tmp_path, max_share=1.0))


def test_a_process_reads_only_its_share():
    class Counting(_Records):
        def __getitem__(self, i):
            read.append(int(i))
            return super().__getitem__(i)

    order = TrainingOrder(40, 8, 3)
    read_by_all = []
    for positions in np.split(np.arange(8), 4):
        read = []
        _batches(list_source("numbers", Counting(40), 40), order, positions=positions)
        assert len(read) == 5 * 2
        read_by_all += read
    assert sorted(read_by_all) == list(range(40))  # an epoch: each image once, by one process


def test_a_limited_number_of_batches_is_read_ahead():
    read = []

    class Counting(_Records):
        def __getitem__(self, i):
            read.append(int(i))
            return super().__getitem__(i)

    batches = training_batches(
        list_source("numbers", Counting(200), 200),
        TrainingOrder(200, 4, 0),
        views={"images": (_WHOLE, 2)},
        channels=1,
        positions=np.arange(4),
        num_steps=50,
        num_threads=2,
    )
    next(batches)
    deadline = time.monotonic() + 20
    while len(read) < 4 * 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) >= 4 * 3
    time.sleep(0.2)
    assert len(read) <= 4 * 6


@pytest.mark.parametrize(("height", "width"), [(1200, 900), (700, 2000)])
def test_views_of_a_jpeg_decoded_smaller_match_those_of_the_full_size(height, width):
    noise = np.random.default_rng(0).random((height // 50, width // 50, 3))
    smooth = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    image = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    suffixes = ((".jpg", [cv2.IMWRITE_JPEG_QUALITY, 98]), (".bmp", []))
    jpeg, bmp = (cv2.imencode(suffix, image, options)[1].tobytes() for suffix, options in suffixes)

    def views(encoded):
        class One(_Records):
            def __getitem__(self, i):
                return {"image": encoded, "label": 0}

        source = list_source("one", One(4), 1)
        crop = Crop(128, (0.3, 1.0))
        return _batches(source, TrainingOrder(4, 4, 0), num_steps=1, crop=crop, channels=3)[0]

    difference = views(jpeg)["images"].astype(int) - views(bmp)["images"]
    assert np.abs(difference).mean() < 3
    assert np.abs(difference).max() < 30


def _coordinates(count=4, height=200, width=250):
    """Images that show at each pixel its column, its row, and their own number."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]

    class Numbered(_Records):
        def __getitem__(self, i):
            numbered = image.copy()  # several threads read
            numbered[..., 2] = 10 * i
            return {"image": cv2.imencode(".png", numbered[..., ::-1])[1].tobytes(), "label": i}

    return list_source("coordinates", Numbered(count), count)


def test_local_views_are_cut_from_the_same_decoded_image_within_their_range_of_areas(monkeypatch):
    decoded = []
    decode = loader.decode
    monkeypatch.setattr(
        loader, "decode", lambda *given, **options: decoded.append(1) or decode(*given, **options)
    )
    options = {"crop": Crop(64), "channels": 3, "num_steps": 6}
    order = TrainingOrder(4, 4, 0)
    batches = _batches(_coordinates(), order, local=(Crop(32, (0.05, 0.3)), 5), **options)
    assert len(decoded) == 24
    local = np.concatenate([batch["local_images"] for batch in batches]).astype(float)
    assert local.shape == (24, 5, 32, 32, 3)
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.all(local[..., 2] == 10 * labels[:, None, None, None])
    # From the coordinates of the first and the last pixel, whose centers are 31 / 32 of a side
    # apart.
    widths, heights = np.moveaxis(local[:, :, -1, -1, :2] - local[:, :, 0, 0, :2], -1, 0) * 32 / 31
    shares = widths * heights / (200 * 250)
    assert 0.04 < shares.min() < 0.1 < 0.25 < shares.max() < 0.33
    assert np.all((widths / heights > 0.65) & (widths / heights < 1.5))
    assert len(np.unique(local[:, :, 0, 0, :2].reshape(-1, 2), axis=0)) > 110  # of 120


def test_local_views_change_neither_the_other_crops_nor_with_the_process_or_the_first_step():
    order = TrainingOrder(4, 4, 0)
    options = {"crop": Crop(64), "channels": 3, "num_steps": 3}
    without = _batches(_coordinates(), order, **options)
    local = Crop(32, (0.05, 0.3)), 5
    found = _batches(_coordinates(), order, local=local, **options)
    assert "local_images" not in without[0]
    for a, b in zip(without, found, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    options |= {"local": local, "positions": np.array([1, 3]), "start_step": 2}
    (part,) = _batches(_coordinates(), order, **options)
    for name in ("images", "local_images"):
        np.testing.assert_array_equal(part[name], found[2][name][[1, 3]])


def test_a_jpeg_is_decoded_large_enough_for_its_local_views(monkeypatch):
    jpeg = cv2.imencode(".jpg", np.zeros((1024, 1024, 3), np.uint8))[1].tobytes()

    class One(_Records):
        def __getitem__(self, i):
            return {"image": jpeg, "label": 0}

    cuts = []

    def record(image, box, out, *, reduction):
        cuts.append((box, len(out), reduction))

    monkeypatch.setattr(loader, "cut", record)
    source, order = list_source("one", One(4), 1), TrainingOrder(4, 4, 0)
    options = {"crop": Crop(64, (1.0, 1.0), (1.0, 1.0)), "channels": 3, "num_steps": 1}
    options["num_threads"] = 1
    _batches(source, order, **options)
    without, cuts = cuts, []
    _batches(source, order, local=(Crop(32, (0.02, 0.1)), 3), **options)
    assert {reduction for *_, reduction in without} == {8}
    assert [cut[:2] for cut in cuts if cut[1] == 64] == [cut[:2] for cut in without]
    for sample in range(4):
        found = cuts[5 * sample : 5 * (sample + 1)]
        smallest = min(min(box.height, box.width) / size for box, size, _ in found)
        (reduction,) = {reduction for *_, reduction in found}
        assert reduction <= smallest < 2 * reduction
        assert reduction < 8


def test_views_of_a_rotated_png_are_cut_after_the_rotation():
    file = io.BytesIO()
    wide = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (20, 1)))  # brighter to the right
    exif = wide.getexif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    wide.save(file, "PNG", exif=exif)

    class One(_Records):
        def __getitem__(self, i):
            return {"image": file.getvalue(), "label": 0}

    source = list_source("one", One(4), 1)
    crop = Crop(8, (0.1, 0.2))
    views = _batches(source, TrainingOrder(4, 4, 0), num_steps=4, crop=crop)
    images = np.concatenate([batch["images"] for batch in views]).astype(int)
    assert np.all(np.diff(images, axis=2) >= 0)  # brighter downwards
    assert np.ptp(images.mean(axis=(2, 3, 4))) > 30  # from anywhere in it


def test_evaluation_gives_a_black_image_without_a_label_for_a_broken_one(tmp_path):
    skipped = _skipped(tmp_path)
    batches = evaluation_batches(
        _partly_broken(10),
        size=8,
        resize_shorter_side=8,
        channels=1,
        batch_size=10,
        positions=np.arange(10),
        skipped=skipped,
    )
    (batch,) = list(batches)
    np.testing.assert_array_equal(batch["label"], [0, 1, -1, 3, 4, 5, 6, -1, 8, 9])
    np.testing.assert_array_equal(batch["decoded"], batch["label"] >= 0)
    assert not np.any(batch["images"][[2, 7]])
    assert len(skipped) == 2


def test_evaluation_takes_every_image_once_in_order_and_marks_the_padding():
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
