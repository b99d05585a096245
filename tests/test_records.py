"""The files beside the checkpoints survive what can become of them."""

import json
import os

import pytest
from etils import epath

from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.records import MetricsLog, as_json, check_same_run, read_config


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


def test_full_disk_is_an_error_unless_it_is_to_be_ignored(tmp_path, capsys):
    log = _on_a_full_disk(MetricsLog(epath.Path(tmp_path), 0, ignore_failures=True))
    log.write({"step": 1})
    log.write({"step": 2})
    log.close()
    assert capsys.readouterr().out.count("will lack some steps: [Errno 28] No space") == 1
    log = _on_a_full_disk(MetricsLog(epath.Path(tmp_path), 0))
    with pytest.raises(OSError, match="No space"):
        log.write({"step": 1})
    with pytest.raises(OSError, match="No space"):
        log.close()


def _on_a_full_disk(log):
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), log._file.fileno())
    return log


@pytest.mark.parametrize("damaged", [b"", b"\xff\xfe", b"{}", b'{"config": 1}', b"[" * 9])
def test_damaged_config_is_named_with_what_to_do(tmp_path, damaged):
    (tmp_path / "config.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"cannot read \S+config.json: .*remove the file") as error:
        read_config(epath.Path(tmp_path))
    assert "\n" not in str(error.value)


def test_another_precision_goes_on_with_the_run_and_is_told(tmp_path, capsys):
    config = default_config()
    (tmp_path / "config.json").write_text(json.dumps({"config": as_json(config)}))
    check_same_run(epath.Path(tmp_path), config)
    assert capsys.readouterr().out == ""
    config.compute_dtype = "bfloat16"
    check_same_run(epath.Path(tmp_path), config)
    assert "computing in bfloat16 from here on, in float32 before" in capsys.readouterr().out
