"""The shell scripts, run in a copy of the repository whose pip only records its calls."""

import ast
import configparser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# As `python -m venv`, but with the pip of FAKE_PIP, which installs nothing.
FAKE_PYTHON = """#!/usr/bin/env bash
set -euo pipefail
if [[ $* != *"-m venv"* ]]; then exec "{python}" "$@"; fi
"{python}" -I -m venv --without-pip "${{!#}}"
for packages in "${{!#}}"/lib/python3*/site-packages; do cp -r "{pip}" "$packages"; done
"""
FAKE_PIP = """
import os, sys, time
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
print("what pip said")
time.sleep(float(os.environ.get("PIP_TAKES", "0")))
sys.exit(int(os.environ.get("PIP_EXITS", "0")))
"""
MAIN = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid()}))
sys.exit(int(os.environ.get("MAIN_EXITS", "0")))
"""


class Clone:
    """A copy of the scripts, with a substitute for music_jax.main that prints its arguments."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "a clone"
        self.log = tmp_path / "pip.log"
        self.python = tmp_path / "fake-python"
        for name in ["launch/environment.sh", "launch/local.sh", "tests/run.sh"]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "requirements.txt").write_text(f"jax==1 \\\n    --hash=sha256:{64 * '0'}\n")
        (self.root / "tests/requirements.txt").write_text("pytest==1\n")
        (self.root / "music_jax").mkdir()
        (self.root / "music_jax/__init__.py").touch()
        (self.root / "music_jax/main.py").write_text(MAIN)
        (tmp_path / "pip").mkdir()
        (tmp_path / "pip/__main__.py").write_text(FAKE_PIP.format(log=str(self.log)))
        self.write_script(
            self.python, FAKE_PYTHON.format(python=sys.executable, pip=tmp_path / "pip")
        )

    @staticmethod
    def write_script(path, text):
        path.write_text(text)
        path.chmod(0o755)

    @property
    def installations(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def start(self, *arguments, script="launch/local.sh", cwd=None, **variables):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
        environment |= {"PYTHON": str(self.python)} | variables
        return subprocess.Popen(
            [self.root / script, *arguments],
            cwd=cwd or self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **options):
        process = self.start(*arguments, **options)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_arguments_directory_and_exit_code_pass_through(clone, tmp_path):
    other = tmp_path / "where the user is"
    (other / "music_jax_of_another_project/music_jax").mkdir(parents=True)

    process = clone.start(
        "--workdir=my runs/1",
        "--config.seed=3",
        "",
        cwd=other,
        PYTHONPATH=str(other / "music_jax_of_another_project"),
        CDPATH="/",
        MAIN_EXITS="75",
    )
    output, errors = process.communicate(timeout=60)

    assert process.returncode == 75, errors
    called = json.loads(output)
    assert called["arguments"] == ["--workdir=my runs/1", "--config.seed=3", ""]
    assert called["cwd"] == str(other)
    # No shell is left between the user's signals and Python.
    assert called["pid"] == process.pid


def test_second_run_installs_and_prints_nothing(clone):
    first = clone.run()
    second = clone.run()

    assert (first.returncode, second.returncode) == (0, 0)
    assert "Making the Python environment" in first.stderr
    assert second.stderr == ""
    assert len(clone.installations) == 1


def test_changed_requirements_recreate_the_environment(clone):
    clone.run()
    left_over = clone.root / ".venv/left-over"
    left_over.touch()
    (clone.root / "requirements.txt").write_text("jax==2\n")

    assert clone.run().returncode == 0
    assert len(clone.installations) == 2
    assert not left_over.exists()


@pytest.mark.parametrize("accelerator", ["tpu", "cuda13"])
def test_accelerator_is_added_once_at_the_pinned_version(clone, accelerator):
    clone.run()
    for _ in range(2):
        assert clone.run(ACCELERATOR=accelerator).returncode == 0

    first, second = clone.installations
    assert first.endswith(f" --require-hashes -r {clone.root}/.venv/installing.txt")
    assert second.endswith(f" jax[{accelerator}]")


def test_unknown_accelerator_is_one_line_and_exit_2(clone):
    result = clone.run(ACCELERATOR="gpu")

    assert result.returncode == 2
    assert result.stderr == "error: ACCELERATOR is cpu, tpu, cuda12 or cuda13, not 'gpu'\n"
    assert not (clone.root / ".venv").exists()


def test_failed_installation_is_shown_and_tried_again(clone):
    failed = clone.run(PIP_EXITS="1")
    again = clone.run()

    assert failed.returncode == 1
    assert "what pip said" in failed.stderr
    assert failed.stdout == ""
    assert again.returncode == 0
    assert len(clone.installations) == 2


def test_two_first_runs_at_once_install_once(clone):
    processes = [clone.start(PIP_TAKES="0.5") for _ in range(2)]

    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(clone.installations) == 1


def test_repository_can_be_moved(clone):
    clone.run()
    clone.root = clone.root.rename(clone.root.with_name("moved"))

    moved = clone.run()

    assert moved.returncode == 0, moved.stderr
    assert len(clone.installations) == 1


def test_unsuitable_interpreter_is_one_line_and_exit_2(clone, tmp_path):
    Clone.write_script(tmp_path / "old-python", "#!/bin/sh\nexit 1\n")

    result = clone.run(PYTHON=str(tmp_path / "old-python"))

    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Python 3.11 or newer" in result.stderr
    assert "old-python" in result.stderr
    assert not (clone.root / ".venv").exists()


def test_interpreter_that_is_found_but_does_not_run_is_passed_over(clone, tmp_path):
    commands = tmp_path / "commands"
    commands.mkdir()
    Clone.write_script(commands / "python3.11", "#!/bin/sh\necho no such version >&2\nexit 127\n")
    shutil.copy(clone.python, commands / "python3.12")

    result = clone.run(PYTHON="", PATH=f"{commands}{os.pathsep}{os.environ['PATH']}")

    assert result.returncode == 0, result.stderr
    assert "no such version" not in result.stderr
    assert len(clone.installations) == 1


def test_a_foreign_environment_is_not_changed(clone):
    (clone.root / ".venv").mkdir()
    (clone.root / ".venv/pyvenv.cfg").write_text("home = elsewhere\n")

    result = clone.run()

    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert (clone.root / ".venv/pyvenv.cfg").exists()


def test_test_runner_adds_its_own_requirements(clone, tmp_path):
    (clone.root / "pytest.py").write_text("import sys; print(sys.argv[1:])")
    clone.run()

    result = clone.run("-k", "two words", script="tests/run.sh", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    arguments = ast.literal_eval(result.stdout)
    assert arguments[:2] == ["-m", "not slow and not browser"]
    assert arguments[-2:] == ["-k", "two words"]
    assert len(clone.installations) == 2

    clone.run(script="tests/run.sh")
    clone.run()
    assert len(clone.installations) == 2


def read_pins(path):
    """Each pin, such as `jax==1 ; MARKERS`, with its hashes."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace(" \\\n", "\n")
    pins, pin = {}, None
    for line in text.splitlines():
        if line.startswith("    --hash="):
            pins[pin].append(line.removeprefix("    --hash="))
        else:
            pin = line
            pins[pin] = []
    return pins


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_is_one_exact_version_with_the_hashes_of_its_files(name):
    pins = read_pins(ROOT / name)
    assert len(pins) > 100
    for pin, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [^@/]+)?", pin), pin
        assert hashes, pin
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), pin
    assert "://" not in (ROOT / name).read_text()


def test_pins_agree_with_each_other_and_with_setup_cfg():
    pins = read_pins(ROOT / "requirements.txt")
    test_pins = read_pins(ROOT / "tests/requirements.txt")
    # The tests' environment has more on Windows; the versions are the same.
    assert {pin.split(" ;")[0] for pin in pins} <= {pin.split(" ;")[0] for pin in test_pins}

    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")

    def names(requirements):
        return {
            name
            for name in re.findall(r"^([A-Za-z0-9_-]+)", requirements, flags=re.MULTILINE)
            if name != "music_jax"
        }

    extras = setup["options.extras_require"]
    pinned = {pin.split("==")[0] for pin in pins}
    assert names(setup["options"]["install_requires"]) | names(extras["data"]) <= pinned
    test_pinned = {pin.split("==")[0] for pin in test_pins}
    assert names(extras["test"]) | names(extras["tensorboard"]) <= test_pinned


@pytest.mark.slow
def test_package_builds_with_all_files(tmp_path):
    source = tmp_path / "source"
    # What others compile meanwhile would be gone when its turn comes.
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ["music_jax", "configs"]:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ["setup.cfg", "pyproject.toml", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("# music_jax\n")

    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-I", "-m", "pip", "wheel", *options, "."],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )

    (wheel,) = source.glob("music_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("music_jax/**/*.py")}
    expected |= {f"music_jax/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/*.py")}
    assert expected | {"music_jax/py.typed"} <= files
    assert not any(name.startswith(("tests/", "configs/")) for name in files)
