"""skipped.jsonl: each image once, from several processes and after a resume."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils
from listed_records import list_source
from processes import ROOT

from music_jax.config import default_config
from music_jax.data import skipped
from music_jax.data.skipped import (
    SkippedImages,
    join_skipped,
    open_skipped,
    report_skipped,
)
from music_jax.distributed.shares import Share
from music_jax.errors import UnusableDataError
from music_jax.workdir import logs

_SOURCE = list_source("numbers", range(100), num_classes=2)


def _open(path, process=0, processes=1, max_share=0.5):
    return SkippedImages(epath.Path(path), max_share=max_share, share=Share(process, processes))


def _open_all(path, processes):
    """One for each process, of which all together may skip ten images."""
    return [_open(path, process, processes, max_share=0.1) for process in range(processes)]


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(skipped.time, "monotonic", lambda: now[0])
    return now


def _images(path):
    lines = (path / "skipped.jsonl").read_text().splitlines()
    return [int(json.loads(line)["image"]) for line in lines]


def test_the_lists_of_all_processes_are_joined(tmp_path):
    lists = [_open(tmp_path, process) for process in range(3)]
    for process, index in ((0, 4), (1, 4), (1, 5), (2, 6), (2, 6), (0, 7)):
        lists[process].add(_SOURCE, index, "broken")
    assert _images(tmp_path) == [4, 7]
    lists[0].merge()
    assert sorted(_images(tmp_path)) == [4, 5, 6, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]
    assert "4 of numbers" in lists[0].summary()


def test_images_listed_before_a_resume_are_not_listed_again(tmp_path):
    for process in (0, 1):
        _open(tmp_path, process).add(_SOURCE, process, "broken")
    again = [_open(tmp_path, process) for process in range(2)]
    for one in again:
        for index in range(3):
            one.add(_SOURCE, index, "broken")
    again[0].merge()
    assert sorted(_images(tmp_path)) == [0, 1, 2]


def test_a_line_that_was_cut_off_is_replaced(tmp_path):
    first = _open(tmp_path)
    first.add(_SOURCE, 1, "broken")
    first.add(_SOURCE, 2, "broken")
    text = (tmp_path / "skipped.jsonl").read_text()
    (tmp_path / "skipped.jsonl").write_text(text[:-10])
    again = _open(tmp_path)
    assert len(again) == 1
    again.add(_SOURCE, 3, "broken")
    again.add(_SOURCE, 2, "broken")
    assert _images(tmp_path) == [1, 3, 2]


def test_the_limit_is_a_share_of_the_whole_split_if_a_part_of_it_is_read(tmp_path):
    part = _SOURCE.subset(np.arange(40, 60)).subset(np.arange(10))
    noted = SkippedImages(epath.Path(tmp_path), max_share=0.05)
    noted.add(_SOURCE, 3, "broken")
    for index in range(4):
        noted.add(part, index, "broken")
    with pytest.raises(UnusableDataError, match="6 of the 100 images of numbers"):
        noted.add(part, 4, "broken")


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_limit_applies_to_what_all_processes_skip(tmp_path, clock, processes):
    lists = _open_all(tmp_path, processes)
    for index in range(10):
        lists[index % processes].add(_SOURCE, index, "broken")
        clock[0] += 10.0
    with pytest.raises(UnusableDataError, match="11 of the 100 images of numbers") as caught:
        lists[10 % processes].add(_SOURCE, 10, "broken")
    name = "skipped.jsonl" if processes == 1 else "skipped*.jsonl"
    assert f"listed in {tmp_path / name}, such as " in str(caught.value)


def test_an_image_that_two_processes_skip_counts_once(tmp_path, clock):
    lists = _open_all(tmp_path, 2)
    for index in range(10):
        for one in lists:
            one.add(_SOURCE, index, "broken")
            clock[0] += 10.0
    with pytest.raises(UnusableDataError, match="11 of the 100"):
        lists[1].add(_SOURCE, 10, "broken")


def test_the_lists_of_others_are_read_rarely_and_only_if_the_limit_may_be_exceeded(
    tmp_path, clock, monkeypatch
):
    lists = _open_all(tmp_path, 2)
    lists[0].add(_SOURCE, 0, "broken")
    read, seen = skipped._read, []

    def slow_read(path):
        seen.append(path.name)
        clock[0] += 1.0
        return read(path)

    monkeypatch.setattr(skipped, "_read", slow_read)
    for index in range(1, 6):
        lists[1].add(_SOURCE, index, "broken")
    assert seen == []
    for _ in range(30):  # a look takes a second, so that the next is twenty seconds later
        lists[1].add(_SOURCE, 6, "broken")
        clock[0] += 1.0
    assert seen == ["skipped.jsonl"] * 2


def test_a_list_that_cannot_be_read_is_read_later(tmp_path, clock, monkeypatch):
    lists = _open_all(tmp_path, 2)
    for index in range(5):
        lists[0].add(_SOURCE, index, "broken")

    def fail(path):
        raise RuntimeError("503")

    with monkeypatch.context() as failing:
        failing.setattr(skipped, "_read", fail)
        for index in range(5, 11):
            lists[1].add(_SOURCE, index, "broken")
    clock[0] += 10.0
    with pytest.raises(UnusableDataError, match="11 of the 100"):
        lists[1].add(_SOURCE, 10, "broken")


def test_an_exceeded_limit_that_no_process_noticed_is_found_by_merge(tmp_path, clock):
    lists = _open_all(tmp_path, 3)
    for index in range(11):  # the second process looks too early, the third has too few
        lists[1 if index < 8 else 2].add(_SOURCE, index, "broken")
    with pytest.raises(UnusableDataError, match="11 of the 100") as caught:
        lists[0].merge()
    assert f"listed in {tmp_path / 'skipped.jsonl'}, such as " in str(caught.value)
    assert sorted(_images(tmp_path)) == list(range(11))
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]


@pytest.mark.parametrize("processes", [1, 2, 16])
def test_a_run_resumed_on_another_number_of_processes_counts_all_lists(tmp_path, processes):
    before = _open_all(tmp_path, 4)
    for index in range(10):
        before[index % 4].add(_SOURCE, index, "broken")
    again = _open_all(tmp_path, processes)[-1]
    again.add(_SOURCE, 3, "broken")
    with pytest.raises(UnusableDataError, match="11 of the 100"):
        again.add(_SOURCE, 10, "broken")


def test_images_that_only_earlier_runs_skipped_do_not_end_a_run(tmp_path):
    before = _open(tmp_path, 1, 2, max_share=1.0)
    for index in range(20):
        before.add(_SOURCE, index, "broken")
    _open_all(tmp_path, 2)[0].merge()
    assert len(_images(tmp_path)) == 20


_PROCESS = """
import sys, time
from etils import epath
from music_jax.data import skipped
from music_jax.data.sources import Source
from music_jax.distributed.shares import Share
from music_jax.errors import UnusableDataError

process, directory = int(sys.argv[1]), epath.Path(sys.argv[2])
skipped._SECONDS_BETWEEN_READS = 0.05
source = Source("numbers", 1000, range(1000).__getitem__, num_classes=2)
one = skipped.SkippedImages(directory, max_share=0.1, share=Share(process, 3))
try:
    for _ in range(100):
        for index in range(process, 150, 3):
            one.add(source, index, "broken")
            time.sleep(0.01)
except UnusableDataError as error:
    print(error)
"""


def test_concurrent_processes_stop_at_the_common_limit(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(process), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for process in range(3)
    ]
    for out, err in [each.communicate(timeout=120) for each in started]:
        assert "of the 1000 images of numbers cannot be read" in out, err
        assert 100 < int(out.split()[0]) <= 150
        assert "skipped*.jsonl" in out


def test_the_images_that_processes_skip_are_counted_together(tmp_path, monkeypatch):
    config = default_config()
    config.dataset.max_skipped_share = 0.1
    source = list_source("numbers", range(40), num_classes=2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lists = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        lists.append(open_skipped(epath.Path(tmp_path), config))
    for index in range(4):
        lists[index // 2].add(source, index, "broken")
    with pytest.raises(UnusableDataError, match="5 of the 40"):
        lists[1].add(source, 4, "broken")
    waited = []
    monkeypatch.setattr(multihost_utils, "sync_global_devices", waited.append)
    report_skipped(lists[1])
    assert waited == ["skipped images noted", "skipped images joined"]
    waited.clear()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(UnusableDataError, match="5 of the 40"):
        report_skipped(lists[0])
    assert waited == ["skipped images noted"]  # the others wait on, and are told
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 5
    monkeypatch.undo()
    later = open_skipped(epath.Path(tmp_path), config)
    join_skipped(later)  # nothing was noted since
    with pytest.raises(UnusableDataError, match="5 of the 40"):
        join_skipped(later, source)


def test_skipped_images_of_several_processes_are_joined(directory):
    source = list_source("numbers", list(range(40)), 0)
    lists = [SkippedImages(directory, max_share=1.0, share=Share(i, 2)) for i in range(2)]
    for i in range(6):
        lists[i % 2].add(source, i, "broken")
    for each in lists:
        each.close()
    lists[0].merge()
    lists[0].close()
    lines = (directory / "skipped.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["image"] for line in lines) == list("012345")
    assert len(SkippedImages(directory, max_share=1.0)) == 6
    assert [path.name for path in directory.iterdir()] == ["skipped.jsonl"]


def test_skipped_images_of_all_processes_together_hold_to_the_share(directory, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    source = list_source("numbers", list(range(40)), 0)
    lists = [SkippedImages(directory, max_share=0.1, share=Share(i, 2)) for i in range(2)]
    for i in range(4):
        lists[i % 2].add(source, i, "broken")
        now[0] += 20.0
    with pytest.raises(UnusableDataError, match="5 of the 40") as caught:
        lists[1].add(source, 4, "broken")
    assert "skipped*.jsonl" in str(caught.value)


def test_skipped_images_soon_appear_in_a_bucket_even_if_no_more_follow(bucket, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    source = list_source("numbers", list(range(40)), 0)
    skipped = SkippedImages(bucket, max_share=1.0)
    for i in (0, 1):
        skipped.add(source, i, "broken")
    now[0] += 20.0
    skipped.add(source, 1, "broken")  # once more
    assert (bucket / "skipped.jsonl").read_text().count("\n") == 2
