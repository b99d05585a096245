"""Files that grow, on a disk and in a bucket whose objects cannot."""

import json
import subprocess
import sys

import pytest
from etils import epath
from memory_bucket import bucket_directory

from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.errors import UnusableDataError, UserError
from music_jax.workdir import appending, records
from music_jax.workdir.appending import open_to_append


@pytest.fixture
def bucket(monkeypatch):
    with bucket_directory(monkeypatch) as directory:
        yield directory


@pytest.fixture(params=["disk", "bucket"])
def directory(request):
    if request.param == "disk":
        return epath.Path(request.getfixturevalue("tmp_path"))
    return request.getfixturevalue("bucket")


def test_lines_are_added_to_what_is_there(directory):
    for line in ("one\n", "two\n"):
        file = open_to_append(directory / "log")
        file.write(line)
        file.close()
    assert (directory / "log").read_text() == "one\ntwo\n"


def test_what_is_flushed_is_seen_in_a_bucket_at_once_and_then_now_and_then(bucket, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(appending.time, "monotonic", lambda: now[0])
    file = open_to_append(bucket / "log")
    seen = []
    for i in range(12):
        file.write(f"{i}\n")
        file.flush()
        seen.append((bucket / "log").read_text().count("\n"))
        now[0] += 2.0
    assert seen == [1, 1, 1, 1, 1, 6, 6, 6, 6, 6, 11, 11]
    file.close()
    assert (bucket / "log").read_text().count("\n") == 12


def test_a_run_that_goes_on_keeps_what_was_logged_before(directory):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = records.MetricsLog(directory, start)
        for step in steps:
            log.write({"step": step, "start": start})
        log.close()
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    assert [(line["step"], line["start"]) for line in lines] == [(1, 0), (2, 0), (3, 2), (4, 2)]


def test_skipped_images_of_several_processes_are_joined(directory):
    source = Source("numbers", list(range(40)), "image", "label", 0)
    lists = [SkippedImages(directory, max_share=1.0, process_index=i) for i in range(2)]
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
    monkeypatch.setattr(appending.time, "monotonic", lambda: now[0])
    source = Source("numbers", list(range(40)), "image", "label", 0)
    lists = [
        SkippedImages(directory, max_share=0.1, process_index=i, num_processes=2) for i in range(2)
    ]
    for i in range(4):
        lists[i % 2].add(source, i, "broken")
        now[0] += 20.0
    with pytest.raises(UnusableDataError, match="5 of the 40") as caught:
        lists[1].add(source, 4, "broken")
    assert f"they are listed in {directory}/skipped*.jsonl. " in str(caught.value)


def test_what_is_skipped_is_soon_seen_in_a_bucket_though_nothing_more_is(bucket, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(appending.time, "monotonic", lambda: now[0])
    source = Source("numbers", list(range(40)), "image", "label", 0)
    skipped = SkippedImages(bucket, max_share=1.0)
    for i in (0, 1):
        skipped.add(source, i, "broken")
    now[0] += 20.0
    skipped.add(source, 1, "broken")  # once more
    assert (bucket / "skipped.jsonl").read_text().count("\n") == 2


def test_json_in_a_bucket_is_replaced(bucket):
    for value in (1, 2):
        records.write_json(bucket / "a.json", {"value": value})
    assert json.loads((bucket / "a.json").read_text()) == {"value": 2}


def test_a_bucket_that_cannot_be_reached_is_an_error_that_says_what_to_do():
    # Another process: what epath finds it keeps.
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from music_jax import errors\nfrom music_jax.workdir import records\n"
        "try: records.open_workdir('gs://bucket/run')\n"
        "except errors.UserError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"EPATH_USE_TF": "false", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "pip install gcsfs" in out.stdout, out.stderr
    with pytest.raises(UserError, match="ftp://somewhere/run is in no place"):
        records.open_workdir("ftp://somewhere/run")
