"""The command as a user runs it."""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys

import cv2
import numpy as np
import processes
import psutil
import pytest

from music_jax.errors import UserError
from music_jax.plan import __main__ as command
from music_jax.plan.compiling import ENVIRONMENT

_DIGITS = (processes.DIGITS, "--config.batch_size=64")
_ONLY_PROGRESS = re.compile(r"(compiling: .*topology\S*\]\n)+")


def test_an_unknown_topology_is_an_error_of_one_line():
    code, _, err = processes.run("music_jax.plan", *_DIGITS, "--topology=v5e:4x8,v9:2x2")
    assert code == 2
    assert err.count("\n") == 1
    assert "unknown chip 'v9'" in err


@pytest.mark.slow
def test_an_invalid_topology_is_reported_before_the_others_are_compiled():
    code, out, err = processes.run(
        "music_jax.plan", *_DIGITS, "--num_images=1437", "--topology=v5e:2x2,v5e:3x5"
    )
    assert code == 2
    assert err.count("\n") == 1
    assert "v5e:3x5" in err
    assert "compiling" not in out


@pytest.mark.parametrize(
    ("hidden", "topology", "expected"),
    [
        ("libtpu", "v5e:2x2", "pip install libtpu"),
        ("jax_plugins.xla_cuda", "h100:8", "pip install jax-cuda13-plugin=="),
    ],
)
def test_a_missing_compiler_is_an_error_with_the_install_command(hidden, topology, expected):
    start = (
        "import importlib.util as u, runpy, sys; find = u.find_spec;"
        f"u.find_spec = lambda name, *a: None if name.startswith({hidden!r}) else find(name, *a);"
        f"sys.argv = ['plan', {processes.DIGITS!r}, '--topology={topology}'];"
        "runpy.run_module('music_jax.plan', run_name='__main__', alter_sys=True)"
    )
    found = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, cwd=processes.ROOT
    )
    assert found.returncode == 2
    assert expected in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_interrupted_plan_ends_at_once_with_all_its_processes():
    plan = processes.start("music_jax.plan", *_DIGITS, "--topology=v5e:2x2", "--num_images=1437")
    assert "compiling" in plan.stdout.readline()
    children = psutil.Process(plan.pid).children(recursive=True)
    plan.send_signal(signal.SIGINT)
    try:
        _, err = plan.communicate(timeout=60)
        assert plan.returncode == 75
        assert "rerun the command" in err
        assert not psutil.wait_procs(children, timeout=30)[1]
    finally:
        for process in (plan, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_an_installed_libtpu_does_not_make_other_commands_look_for_a_tpu():
    start = (
        "import jax; from music_jax.distributed.mesh import skip_absent_tpu;"
        "skip_absent_tpu(); print(jax.devices()[0].platform)"
    )
    unset = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_PLATFORMS", *ENVIRONMENT)
    }
    found = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, env=unset, cwd=processes.ROOT
    )
    assert (found.stdout, found.stderr) == ("cpu\n", "")


def test_the_images_of_a_folder_are_counted_there(tmp_path):
    (tmp_path / "class").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / "class" / f"{number}.png"), np.zeros((8, 8, 3), np.uint8))
    config = runpy.run_path(str(processes.ROOT / "configs" / "imagenet.py"))["get_config"]()
    assert command._num_images(config) == 1_281_167
    config.dataset.path = str(tmp_path)
    assert command._num_images(config) == 3
    config.dataset.path = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone.*--num_images=N"):
        command._num_images(config)


def test_the_number_of_images_is_required_for_an_unprepared_dataset(tmp_path):
    config = runpy.run_path(str(processes.ROOT / "configs" / "digits.py"))["get_config"]()
    config.dataset.data_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"dataset 'digits' was not prepared.*--num_images=N"):
        command._num_images(config)


def test_a_batch_larger_than_the_dataset_is_an_error_as_in_training():
    arguments = ("--num_images=60", "--topology=v5e:1x1")
    code, _, err = processes.run("music_jax.plan", *_DIGITS, *arguments)
    assert code == 2
    assert "config.batch_size = 64 is larger than the number of images, 60" in err


def test_a_config_without_images_is_an_error_that_names_the_flags():
    config = runpy.run_path(str(processes.ROOT / "configs" / "folder.py"))["get_config"]()
    with pytest.raises(UserError, match=r"--config\.dataset\.path=.*--num_images=N"):
        command._num_images(config)


@pytest.mark.slow
def test_a_small_config_is_planned_from_start_to_end(tmp_path):
    file = tmp_path / "plan.json"
    code, out, err = processes.run(
        "music_jax.plan",
        *_DIGITS,
        "--topology=v5e:2x2",
        f"--json={file}",
        "--num_images=1437",
    )
    assert code == 0, err
    assert _ONLY_PROGRESS.fullmatch(err)
    assert "bottleneck" in out
    (plan,) = json.loads(file.read_text())
    assert (plan["topology"], plan["chips"], plan["batch_size"]) == ("v5e:2x2", 4, 64)
    assert plan["fits"]
    assert 0 < plan["objective_flops"] < plan["flops"]
    assert plan["argument_bytes"] < plan["hbm_needed_bytes"] < plan["hbm_available_bytes"]
    # Each chip gets its part of the gradient, and the parts of the parameters that others hold.
    assert plan["collective_bytes"]["reduce-scatter"] > 1e5
    assert plan["collective_bytes"]["all-gather"] > 1e6


@pytest.mark.slow
def test_little_crosses_the_network_between_two_slices(tmp_path):
    file = tmp_path / "plan.json"
    code, out, err = processes.run(
        "music_jax.plan",
        *_DIGITS,
        "--topology=v5e:2x2",
        "--slices=2",
        f"--json={file}",
        "--num_images=1437",
    )
    assert code == 0, err
    assert _ONLY_PROGRESS.fullmatch(err)
    assert "2 x v5e:2x2" in out
    (plan,) = json.loads(file.read_text())
    assert (plan["slices"], plan["chips"], plan["processes"]) == (2, 8, 2)
    # Each chip exchanges its quarter of the parameters, and sums for each of the normalizations.
    assert 0 < plan["dcn_bytes"] < 0.05 * plan["hbm_traffic_bytes"]
    assert plan["dcn_bytes"] < plan["received_bytes"] / 3
    assert 20 < plan["dcn_transfers"] < 100
    assert plan["seconds_at_peak"]["dcn"] == pytest.approx(plan["dcn_bytes"] / 3.125e9)


def _has_plugin():
    try:
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13))
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _has_plugin(), reason="JAX's CUDA plugin is not installed")
def test_a_small_config_is_planned_for_gpus_that_are_not_there(tmp_path):
    file = tmp_path / "plan.json"
    code, out, err = processes.run(
        "music_jax.plan",
        processes.DIGITS,
        "--config.batch_size=64",
        "--topology=h100:4",
        f"--json={file}",
        "--num_images=1437",
    )
    assert code == 0, err
    assert _ONLY_PROGRESS.fullmatch(err)
    (plan,) = json.loads(file.read_text())
    assert plan["fits"]
    assert plan["chips"] == 4
    assert 0 < plan["objective_flops"] < plan["flops"]
    assert "~" in out
    assert "flops" in plan["estimates"]
