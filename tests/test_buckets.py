"""A whole run whose workdir is a bucket: gcsfs and TensorStore against an emulator, over HTTP."""

import json
import pathlib
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
from processes import DIGITS, SMALL, metrics, run, start

_SERVER = pathlib.Path(__file__).with_name("bucket_server.py")


@pytest.fixture
def bucket():
    """The address of a bucket server, and the environment for its clients."""
    with subprocess.Popen(
        [sys.executable, _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        address = server.stdout.readline().strip()
        assert address.startswith("http://")
        yield (
            address,
            {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "NO_GCE_CHECK": "true",  # no search for credentials on the network
                "GCE_METADATA_ROOT": "127.0.0.1:1",
            },
        )
        server.kill()


def _read(address, name):
    quoted = urllib.parse.quote(name, safe="")
    with urllib.request.urlopen(f"{address}/storage/v1/b/bucket/o/{quoted}?alt=media") as answer:
        return answer.read().decode()


def _names(address, prefix):
    query = urllib.parse.urlencode({"prefix": prefix})
    with urllib.request.urlopen(f"{address}/storage/v1/b/bucket/o?{query}") as answer:
        return {item["name"] for item in json.load(answer).get("items", ())}


def _in_bucket(module, *arguments, env):
    process = start(module, *arguments, env=env)
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_after_a_kill_as_on_a_disk(bucket, tmp_path):
    address, env = bucket
    run_of_digits = (DIGITS, *SMALL, f"--config.dataset.data_dir={tmp_path / 'tfds'}")
    arguments = (*run_of_digits, "--workdir=gs://bucket/runs/digits")
    first = start("music_jax.main", *arguments, env=env)
    deadline = time.monotonic() + 900
    while not any(
        name.endswith("/commit_success.txt") and int(name.split("/")[3]) >= 8
        for name in _names(address, "runs/digits/checkpoints/")
    ):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    code, out, err = _in_bucket("music_jax.main", *arguments, env=env)
    assert code == 0, err
    assert "resuming     after step" in out + err
    found = [json.loads(line) for line in _read(address, "runs/digits/metrics.jsonl").splitlines()]

    code, _, err = run("music_jax.main", *run_of_digits, f"--workdir={tmp_path / 'disk'}")
    assert code == 0, err
    expected = metrics(tmp_path / "disk")
    assert [(line["step"], line["loss"]) for line in found] == [
        (line["step"], line["loss"]) for line in expected
    ]
    probe = json.loads(_read(address, "runs/digits/linear_eval.json"))
    on_disk = json.loads((tmp_path / "disk" / "linear_eval.json").read_text())
    assert probe["top1"] == on_disk["top1"]

    code, out, err = _in_bucket("music_jax.main", *arguments, env=env)  # nothing is left to do
    assert code == 0, err
    assert _read(address, "runs/digits/metrics.jsonl").count("\n") == len(expected)
    steps = {name.split("/")[3] for name in _names(address, "runs/digits/checkpoints/")}
    assert steps == {"20", "22"}
