"""Locks of workdirs: two processes that want the same one, on one host or on two."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from memory_bucket import out_of_reach

from music_jax.errors import UserError
from music_jax.workdir import lock
from music_jax.workdir.lock import WorkdirLock

HOLD = """
import sys, time
from etils import epath
from music_jax.workdir.lock import WorkdirLock
with WorkdirLock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_locked_workdir_is_refused_until_its_holder_is_killed(tmp_path, holder):
    with pytest.raises(UserError, match=rf"process {holder.pid} on \S+, since 2"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with WorkdirLock(epath.Path(tmp_path)):
        pass


def test_a_released_or_damaged_lock_can_be_taken(tmp_path):
    with WorkdirLock(epath.Path(tmp_path)):
        pass
    (tmp_path / "lock").write_bytes(b"\xff garbage")
    with WorkdirLock(epath.Path(tmp_path)):
        pass


def test_a_lock_that_is_a_hard_link_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", tmp_path / "run" / "lock")
    with pytest.raises(UserError, match="lock is another file too, by a hard link; remove it"):
        WorkdirLock(epath.Path(tmp_path / "run")).__enter__()
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "run" / "lock").unlink()
    with WorkdirLock(epath.Path(tmp_path / "run")):
        pass


def test_a_lock_record_is_never_read_partially_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_HEARTBEAT_SECONDS", 0.0)
    (tmp_path / "lock").write_bytes(b" " * 4000 + b"garbage")
    with WorkdirLock(epath.Path(tmp_path)):
        counts = {json.loads((tmp_path / "lock").read_text())["count"] for _ in range(5000)}
        assert max(counts) > 50  # it was written meanwhile
    assert (tmp_path / "lock").read_text() == ""


def _elsewhere(count):
    return json.dumps({"host": "elsewhere", "pid": 7, "started": "2026-01-01", "count": count})


def _beat_elsewhere(directory, count):
    """Replaces the record in one step, so that who reads it meanwhile never finds it empty."""
    (directory / "beat").write_text(_elsewhere(count))
    (directory / "beat").replace(directory / "lock")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 3.0)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.1)


@pytest.fixture
def no_os_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "as some network file systems say")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_a_silent_holder_on_another_host_loses_the_lock(tmp_path, impatient, capsys):
    (tmp_path / "lock").write_text(_elsewhere(1))
    with WorkdirLock(epath.Path(tmp_path)):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "last written to by process 7 on elsewhere" in capsys.readouterr().out
    assert (tmp_path / "lock").read_text() == ""


def test_a_live_holder_on_another_host_keeps_the_lock(tmp_path):
    (tmp_path / "lock").write_text(_elsewhere(1))
    beat = threading.Timer(1.5, _beat_elsewhere, [tmp_path, 2])
    beat.start()
    with pytest.raises(UserError, match="process 7 on elsewhere, since 2026"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()
    beat.join()


class _Clock:
    """A clock that `sleep` advances; each advance calls a function."""

    def __init__(self, each_second):
        self.seconds, self._each_second = 0.0, each_second

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds
        self._each_second(self.seconds)


@pytest.mark.parametrize("late", [10, 30])
def test_a_holder_that_misses_two_heartbeats_keeps_the_lock(tmp_path, monkeypatch, late):
    """A holder writes every ten seconds; a busy machine or a slow disk may delay it."""

    def beat(seconds):
        if seconds >= late:
            _beat_elsewhere(tmp_path, 2)

    monkeypatch.setattr(lock, "time", clock := _Clock(beat))
    (tmp_path / "lock").write_text(_elsewhere(1))
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()
    assert clock.seconds == late


def test_a_holder_that_is_silent_for_forty_seconds_loses_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "time", clock := _Clock(lambda seconds: None))
    (tmp_path / "lock").write_text(_elsewhere(1))
    with WorkdirLock(epath.Path(tmp_path)):
        assert clock.seconds == 40


def test_a_holder_sends_a_heartbeat_every_ten_seconds(tmp_path, monkeypatch):
    waits = []

    class Released(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return len(waits) == 3  # two beats

    with WorkdirLock(epath.Path(tmp_path)) as held:
        pass
    held._released, held._count = Released(), 0
    held._send_heartbeats()
    assert waits == [10, 10, 10]
    assert json.loads((tmp_path / "lock").read_text())["count"] == 2


def test_without_file_system_locks_the_record_decides(tmp_path, holder, impatient, no_os_locks):
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with WorkdirLock(epath.Path(tmp_path)):
        assert time.monotonic() - began < lock._SILENT_SECONDS


def test_a_process_that_loses_its_lock_ends(tmp_path):
    impatient = "from music_jax.workdir import lock\nlock._HEARTBEAT_SECONDS = 0.2\n"
    process = subprocess.Popen(
        [sys.executable, "-c", impatient + HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    for count in range(60):  # more than once: a beat of its own may come over one of these
        _beat_elsewhere(tmp_path, count)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
            break
    process.kill()
    _, err = process.communicate()
    assert process.returncode == 2
    assert "was taken over by process 7 on elsewhere" in err


def test_a_process_that_has_lost_its_lock_leaves_it_to_the_new_holder(tmp_path):
    with WorkdirLock(epath.Path(tmp_path)):
        _beat_elsewhere(tmp_path, 1)
        record = (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == record
    (tmp_path / "other").mkdir()
    with WorkdirLock(epath.Path(tmp_path / "other")):
        pass
    assert (tmp_path / "other/lock").read_text() == ""


def test_a_lock_survives_a_bucket_that_is_unreachable_for_a_while(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.0)

    def count():
        return json.loads((bucket / "lock").read_text())["count"]

    with WorkdirLock(bucket) as held:
        with out_of_reach():
            time.sleep(0.2)
        assert held._heartbeats.is_alive()
        before, deadline = count(), time.monotonic() + 10
        while count() == before:  # it beats again
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (bucket / "lock").read_text() == ""


def test_a_lock_in_an_unreachable_bucket_is_not_taken(bucket):
    with out_of_reach(), pytest.raises(UserError, match=r"cannot lock gs://bucket/run: .*503"):
        WorkdirLock(bucket).__enter__()
    with contextlib.suppress(FileNotFoundError):
        assert (bucket / "lock").read_text() == ""
