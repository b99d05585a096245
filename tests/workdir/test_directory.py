"""Run directories: opening them, and two processes that want the same one."""

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
from small_runs import save_run, small_config

from music_jax.checkpoint.manager import Checkpoints, restore_network
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.exchange import formats
from music_jax.workdir import directory
from music_jax.workdir.directory import WorkdirLock, check_utf8, open_workdir

HOLD = """
import sys, time
from etils import epath
from music_jax.workdir.directory import WorkdirLock
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
    monkeypatch.setattr(directory, "_HEARTBEAT_SECONDS", 0.0)
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
    monkeypatch.setattr(directory, "_SILENT_SECONDS", 3.0)
    monkeypatch.setattr(directory, "_SETTLE_SECONDS", 0.1)


@pytest.fixture
def no_os_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "as some network file systems say")

    monkeypatch.setattr(directory.fcntl, "flock", flock)


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

    monkeypatch.setattr(directory, "time", clock := _Clock(beat))
    (tmp_path / "lock").write_text(_elsewhere(1))
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        WorkdirLock(epath.Path(tmp_path)).__enter__()
    assert clock.seconds == late


def test_a_holder_that_is_silent_for_forty_seconds_loses_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "time", clock := _Clock(lambda seconds: None))
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
        assert time.monotonic() - began < directory._SILENT_SECONDS


def test_a_process_that_loses_its_lock_ends(tmp_path):
    impatient = "from music_jax.workdir import directory\ndirectory._HEARTBEAT_SECONDS = 0.2\n"
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


def test_checkpoints_may_be_a_link_to_other_storage(tmp_path):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    scratch.mkdir()
    (run / "checkpoints").symlink_to(scratch)
    save_run(run, small_config())
    assert (scratch / "3").is_dir()
    assert open_workdir(str(run)) == epath.Path(run)
    for name in ("3", str(run / "checkpoints" / "3")):
        assert restore_network(epath.Path(run), small_config(), name, make_data_mesh())[0] == 3
    (scratch / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="out in the workdir is a link that leads out"):
        open_workdir(str(run))
    (scratch / "out").unlink()
    os.mkfifo(scratch / "pipe")
    with pytest.raises(UserError, match="pipe in the workdir is a pipe"):
        open_workdir(str(run))


def test_a_workdir_with_deeply_nested_folders_is_opened(tmp_path):
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("deep", dir_fd=at)
        below = os.open("deep", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert open_workdir(str(tmp_path)) == epath.Path(tmp_path)
    subprocess.run(["rm", "-r", tmp_path / "deep"], check=True)


def test_a_workdir_whose_name_is_not_utf8_is_refused_before_anything_is_written(tmp_path):
    workdir = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"caf\\udce9': it is not UTF-8.*rename the directory"):
        open_workdir(workdir)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_stays_within_a_workdir_below_a_link_is_no_error(tmp_path):
    (tmp_path / "scratch" / "run" / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "scratch" / "run" / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "runs").symlink_to("scratch")
    assert open_workdir(tmp_path / "runs" / "run").is_dir()


def test_check_utf8_refuses_other_names():
    check_utf8("/home/é")
    with pytest.raises(UserError, match=r"/home/\\xe9 is not UTF-8.*rename it"):
        check_utf8(os.fsdecode(b"/home/\xe9"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a\\b", r"a backslash \(\\\), which"),
        ("a\\b/c", "a backslash"),
        ("a\udcff", r"not UTF-8"),
        (os.path.join(*["y" * 250] * 15), "longer than 3500 bytes"),
    ],
)
def test_paths_that_cannot_hold_checkpoints_are_refused_at_once(name, why, tmp_path):
    path = os.path.join(tmp_path, name)
    with pytest.raises(UserError, match=why) as error:
        open_workdir(path)
    assert str(error.value).isprintable()  # one line, which any terminal can show
    with pytest.raises(UserError, match=why):
        Checkpoints(epath.Path(path), read_only=True)
    with pytest.raises(UserError, match=why):
        formats.write(None, "orbax", path)
    assert os.listdir(tmp_path) in ([], [name.partition("/")[0]])


@pytest.mark.parametrize("name", ["lr=[1]", "a*", "a?", "a\\b"])
def test_patterns_in_the_name_of_a_bucket_s_directory_are_refused(name):
    with pytest.raises(UserError, match="checkpoints cannot be kept in 'gs://bucket/"):
        open_workdir(f"gs://bucket/{name}")


@pytest.mark.parametrize("path", ["/hf/runs", "/gs/bucket/runs", "/s3/x"])
def test_a_directory_that_is_taken_for_a_bucket_is_refused(path):
    with pytest.raises(UserError, match=r"is taken for the bucket (hf|gs|s3)://"):
        open_workdir(path)


@pytest.mark.parametrize("path", ["foo://x", "runs/a://b"])
def test_an_unknown_kind_of_bucket_is_refused(path):
    with pytest.raises(UserError, match="is in an unknown kind of bucket"):
        open_workdir(path)


def test_a_lock_survives_a_bucket_that_is_unreachable_for_a_while(bucket, monkeypatch):
    monkeypatch.setattr(directory, "_HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(directory, "_SETTLE_SECONDS", 0.0)

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


def test_an_unreachable_bucket_is_an_error_that_says_what_to_do():
    # Another process: what epath finds it keeps.
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from music_jax import errors\nfrom music_jax.workdir.directory import open_workdir\n"
        "try: open_workdir('gs://bucket/run')\n"
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
    with pytest.raises(UserError, match="ftp://somewhere/run is in an unknown kind of bucket"):
        open_workdir("ftp://somewhere/run")


def test_temporary_files_of_killed_processes_are_removed_after_a_day(tmp_path):
    (tmp_path / "features").mkdir()
    old, new, other = (
        tmp_path / "features" / f".new-{'0' * 16}",
        tmp_path / f".new-{'1' * 16}",
        tmp_path / ".new-notes",
    )
    for path in (old, new, other):
        path.write_text("")
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    open_workdir(str(tmp_path))
    assert not old.exists()
    assert new.exists()
    assert other.exists()
