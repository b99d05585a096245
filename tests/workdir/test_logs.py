"""Logs on a disk and in a bucket, after interruptions and on a full disk."""

import contextlib
import json
import os
import resource

import pytest
from etils import epath
from memory_bucket import out_of_reach

from music_jax.errors import UserError
from music_jax.workdir import logs
from music_jax.workdir.logs import Appender, EventsLog, MetricsLog


def test_lines_are_appended(directory):
    for line in ("one\n", "two\n"):
        file = Appender(directory / "log")
        file.append(line)
        file.close()
    assert (directory / "log").read_text() == "one\ntwo\n"


def test_a_bucket_receives_the_first_flush_and_then_one_every_ten_seconds(bucket, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    file = Appender(bucket / "log")
    seen = []
    for i in range(12):
        file.append(f"{i}\n")
        file.flush()
        seen.append((bucket / "log").read_text().count("\n"))
        now[0] += 2.0
    assert seen == [1, 1, 1, 1, 1, 6, 6, 6, 6, 6, 11, 11]
    file.close()
    assert (bucket / "log").read_text().count("\n") == 12


def test_a_resumed_run_keeps_earlier_metrics(directory):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = MetricsLog(directory, start)
        for step in steps:
            log.write({"step": step, "start": start})
        log.close()
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    assert [(line["step"], line["start"]) for line in lines] == [(1, 0), (2, 0), (3, 2), (4, 2)]


def test_a_run_that_starts_again_logs_its_initial_state_again(directory):
    for start, steps in ((0, (0, 1, 2)), (0, (0, 1)), (1, (2,))):
        log = MetricsLog(directory, start)
        for step in steps:
            log.write({"step": step, "start": start})
        log.close()
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    assert [(line["step"], line["start"]) for line in lines] == [(0, 0), (1, 0), (2, 1)]


def _line(step):
    return json.dumps({"step": step, "loss": 1.0}) + "\n"


def _log(tmp_path, content, start_step):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    log = MetricsLog(epath.Path(tmp_path), start_step)
    log.write({"step": start_step + 1})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_metrics_log_that_is_cut_off_anywhere_can_be_continued(tmp_path, cut, capsys):
    content = "".join(map(_line, range(1, 4))).encode()[:cut]
    whole = content.count(b"\n")
    assert _log(tmp_path, content, start_step=min(whole, 1)) == list(range(1, min(whole, 1) + 2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "damaged", [b"\xff\xfe{", bytes(40), b"[1]", b'{"step": "2"}', _line(1).strip().encode()]
)
def test_damaged_and_repeated_lines_are_removed_with_a_warning(tmp_path, damaged, capsys):
    content = _line(1).encode() + damaged + b"\n" + _line(3).encode()
    assert _log(tmp_path, content, start_step=3) == [1, 3, 4]
    assert "removed 1 damaged or repeated lines from " in capsys.readouterr().out


@pytest.fixture
def full_disk():
    """A context in which a file takes 9 bytes and no more: writes are short, then fail."""

    @contextlib.contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def test_a_full_disk_is_an_error_unless_failures_are_ignored(tmp_path, full_disk, capsys):
    log = MetricsLog(epath.Path(tmp_path), 0, ignore_failures=True)
    with full_disk():
        log.write({"step": 1})
        log.write({"step": 2})
    assert capsys.readouterr().out.count("is behind: [Errno 27] File too large") == 1
    log.write({"step": 3})  # there is room again
    log.close()
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    log = MetricsLog(epath.Path(tmp_path), 3)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        log.write({"step": 4})
    with full_disk(), pytest.raises(OSError, match="File too large"):
        log.close()


def test_events_on_a_full_disk_are_written_later(tmp_path, full_disk, capsys):
    events = EventsLog(epath.Path(tmp_path))
    with full_disk():
        events.write("save_failed", step=1)
        events.close()
    assert capsys.readouterr().out.count("events.jsonl is behind") == 1
    events.write("save_failed", step=2)
    assert [line["step"] for line in _lines(tmp_path / "events.jsonl")] == [1, 2]


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_logs_in_an_unreachable_bucket_are_written_later_with_a_warning(bucket, capsys):
    log = MetricsLog(bucket, 0, ignore_failures=True)
    events = EventsLog(bucket)
    with out_of_reach():
        log.write({"step": 1})
        events.write("save_failed", step=1)
        events.close()
        log.close()
    told = capsys.readouterr().out
    assert told.count("metrics.jsonl is behind: gs://bucket/run/metrics.jsonl: HttpError: 503") == 1
    assert told.count("events.jsonl is behind: gs://bucket/run/events.jsonl: HttpError: 503") == 1
    log.close()
    events.close()
    assert json.loads((bucket / "metrics.jsonl").read_text()) == {"step": 1}
    assert json.loads((bucket / "events.jsonl").read_text())["event"] == "save_failed"
    strict = MetricsLog(bucket, 1)
    with out_of_reach(), pytest.raises(OSError, match="503"):
        strict.write({"step": 2})
    strict.close()


def test_nothing_is_appended_through_a_link(outside, tmp_path):
    path = epath.Path(tmp_path / "run" / "events.jsonl")
    os.symlink(outside, path)
    with pytest.raises(UserError, match="is a link"):
        Appender(path)
    path.unlink()
    log = Appender(path)
    os.symlink(outside, path)  # made since
    log.append("line\n")
    with pytest.raises(OSError, match="symbolic links"):
        log.flush()
    path.unlink()
    log.close()
    assert path.read_text() == "line\n"


def test_a_log_with_two_hard_links_grows_under_one_name(outside, tmp_path):
    path = epath.Path(tmp_path / "run" / "events.jsonl")
    os.link(outside, path)
    log = Appender(path)
    log.append(" line\n")
    log.close()
    assert path.read_text() == "precious line\n"


def test_a_pipe_is_refused_as_a_log(tmp_path):
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(UserError, match="or not a file"):
        Appender(epath.Path(tmp_path / "events.jsonl"))
