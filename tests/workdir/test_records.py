"""The files beside the checkpoints survive what can become of them."""

import contextlib
import json
import os
import resource
import subprocess

import jax
import pytest
from etils import epath
from jax.experimental import multihost_utils
from small_runs import save_run, small_config

from music_jax.checkpoint.restore import restore_network
from music_jax.config import default_config, from_json
from music_jax.data.sources import Source
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UnusableDataError, UserError
from music_jax.workdir.records import (
    EventsLog,
    MetricsLog,
    as_json,
    check_same_run,
    join_skipped,
    open_skipped,
    open_workdir,
    read_config,
    report_skipped,
)


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
def test_log_of_a_run_that_was_cut_off_anywhere_goes_on(tmp_path, cut, capsys):
    content = "".join(map(_line, range(1, 4))).encode()[:cut]
    whole = content.count(b"\n")
    assert _log(tmp_path, content, start_step=min(whole, 1)) == list(range(1, min(whole, 1) + 2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "damaged", [b"\xff\xfe{", bytes(40), b"[1]", b'{"step": "2"}', _line(1).strip().encode()]
)
def test_damaged_and_repeated_lines_are_left_out_and_told(tmp_path, damaged, capsys):
    content = _line(1).encode() + damaged + b"\n" + _line(3).encode()
    assert _log(tmp_path, content, start_step=3) == [1, 3, 4]
    assert "1 damaged or repeated lines are left out" in capsys.readouterr().out


def test_full_disk_is_an_error_unless_it_is_to_be_ignored(tmp_path, full_disk, capsys):
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


def test_events_on_a_full_disk_are_told_later(tmp_path, full_disk, capsys):
    events = EventsLog(epath.Path(tmp_path))
    with full_disk():
        events.write("save_failed", step=1)
        events.close()
    assert capsys.readouterr().out.count("events.jsonl is behind") == 1
    events.write("save_failed", step=2)
    assert [line["step"] for line in _lines(tmp_path / "events.jsonl")] == [1, 2]


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


@pytest.mark.parametrize("damaged", [b"", b"\xff\xfe", b"{}", b'{"config": 1}', b"[" * 9])
def test_damaged_config_is_named_with_what_to_do(tmp_path, damaged):
    (tmp_path / "config.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"cannot read \S+config.json: .*remove the file") as error:
        read_config(epath.Path(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_config_that_an_editor_on_windows_has_saved(tmp_path, encoding):
    text = json.dumps({"config": {"seed": 3}}, indent=2).replace("\n", "\r\n")
    (tmp_path / "config.json").write_bytes(text.encode(encoding))
    assert read_config(epath.Path(tmp_path)) == {"seed": 3}


def _fields(config, prefix=""):
    for name, value in config.items():
        yield from (
            _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
        )


def _save_without(tmp_path, config, field):
    """Writes config.json as a version did that did not have the field yet."""
    record = as_json(config)
    part = record
    *parents, last = field.split(".")
    for name in parents:
        part = part[name]
    del part[last]
    (tmp_path / "config.json").write_text(json.dumps({"config": record}))


def test_a_field_that_is_newer_than_the_run_had_its_default(tmp_path):
    config = default_config()
    fields = list(_fields(as_json(config)))
    assert len(fields) > 100
    for field in fields:
        _save_without(tmp_path, config, field)
        check_same_run(epath.Path(tmp_path), config)
    config.optimizer.final_scale = 0.25
    _save_without(tmp_path, config, "optimizer.final_scale")
    with pytest.raises(UserError, match=r"optimizer.final_scale: 0.001 there, 0.25 now"):
        check_same_run(epath.Path(tmp_path), config)


def test_a_field_that_is_gone_is_dropped_unless_it_decides_what_is_trained(tmp_path):
    config = default_config()
    record = as_json(config)
    record["knn"]["gone"] = 1
    record["evaluation"]["gone"] = {"inner": 2}
    (tmp_path / "config.json").write_text(json.dumps({"config": record}))
    check_same_run(epath.Path(tmp_path), config)
    assert as_json(from_json(record)) == as_json(config)
    record["objective"]["gone"] = 1
    (tmp_path / "config.json").write_text(json.dumps({"config": record}))
    with pytest.raises(UserError, match=r"does not fit this version: .*gone"):
        check_same_run(epath.Path(tmp_path), config)


def test_another_precision_goes_on_with_the_run_and_is_told(tmp_path, capsys):
    config = default_config()
    (tmp_path / "config.json").write_text(json.dumps({"config": as_json(config)}))
    check_same_run(epath.Path(tmp_path), config)
    assert capsys.readouterr().out == ""
    config.compute_dtype = "bfloat16"
    check_same_run(epath.Path(tmp_path), config)
    assert "computing in bfloat16 from here on, in float32 before" in capsys.readouterr().out


def test_the_images_that_processes_skip_are_counted_together(tmp_path, monkeypatch):
    config = default_config()
    config.dataset.max_skipped_share = 0.1
    source = Source("numbers", range(40), "image", "label", num_classes=2)
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


def test_a_workdir_with_folders_nested_deeply_is_opened(tmp_path):
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
