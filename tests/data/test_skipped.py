"""skipped.jsonl: each image once, from several processes and after a resume."""

import json

import numpy as np
import pytest
from etils import epath

from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.errors import UnusableDataError

_SOURCE = Source("numbers", range(100), "image", "label", num_classes=2)


def _open(path, process=0):
    return SkippedImages(epath.Path(path), max_share=0.5, process_index=process)


def _images(path):
    lines = (path / "skipped.jsonl").read_text().splitlines()
    return [int(json.loads(line)["image"]) for line in lines]


def test_processes_note_apart_and_the_first_joins_what_they_noted(tmp_path):
    lists = [_open(tmp_path, process) for process in range(3)]
    for process, index in ((0, 4), (1, 4), (1, 5), (2, 6), (2, 6), (0, 7)):
        lists[process].add(_SOURCE, index, "broken")
    assert _images(tmp_path) == [4, 7]
    lists[0].merge()
    assert sorted(_images(tmp_path)) == [4, 5, 6, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]
    assert "4 of numbers" in lists[0].summary()


def test_what_was_noted_before_a_resume_is_not_noted_again(tmp_path):
    for process in (0, 1):
        _open(tmp_path, process).add(_SOURCE, process, "broken")
    again = [_open(tmp_path, process) for process in range(2)]
    for one in again:
        for index in range(3):
            one.add(_SOURCE, index, "broken")
    again[0].merge()
    assert sorted(_images(tmp_path)) == [0, 1, 2]


def test_a_line_that_was_cut_off_is_written_anew(tmp_path):
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


def test_the_share_is_one_of_the_whole_split_also_where_a_part_of_it_is_read(tmp_path):
    part = _SOURCE.subset(np.arange(40, 60)).subset(np.arange(10))
    noted = SkippedImages(epath.Path(tmp_path), max_share=0.05)
    noted.add(_SOURCE, 3, "broken")
    for index in range(4):
        noted.add(part, index, "broken")
    with pytest.raises(UnusableDataError, match="6 of the 100 images of numbers"):
        noted.add(part, 4, "broken")
