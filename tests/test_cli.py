"""What all commands share: clear errors, the list of fields, closed pipes, and no global state."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from processes import DIGITS, ROOT, run, start

import music_jax

_FIELDS = "this command takes no config file, only fields of one"
_EMPTY = "from ml_collections.config_dict import ConfigDict as get_config"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("main", ("--config={file}",), "{file}' is not a config file, such as configs/digits.py"),
        ("main", ("--config", "nowhere.py"), "there is no config file 'nowhere.py'"),
        ("main", ("--config=mnist",), "one of the names cifar10, cifar100, digits, fashion_mnist"),
        ("main", ("--config={nothing}",), "must return a config"),
        ("main", ("--config={empty}",), "the config lacks the field 'accumulation_steps'"),
        ("main", ("--config={typo}",), 'Did you mean "batch_size" instead of "batchsize"?'),
        (
            "main",
            ("--config=configs/digits.py", "--config.objectve.name=vicreg"),
            "no field 'objectve.name'; the nearest known one is 'objective.name'",
        ),
        (
            "main",
            ("--config=configs/digits.py", "--config.objective=vicreg"),
            "config.objective is a group of fields; give one of them, such as "
            "--config.objective.name=VALUE",
        ),
        ("evaluate", ("--config.knn.kk=3",), "no field 'knn.kk'; the nearest known one is 'knn.k'"),
        ("linear_eval", ("--config.knnn.k=3",), "the nearest known one is 'knn.k'"),
        ("import_weights", ("--config.dataset.nam=x",), "the nearest known one is 'dataset.name'"),
        ("evaluate", ("--config=configs/digits.py",), _FIELDS),
        ("evaluate", ("--config=configs/digits.py", "--config.knn.k=3"), _FIELDS),
    ],
)
def test_a_wrong_config_or_field_is_one_clear_line(command, arguments, message, tmp_path):
    files = {
        "file": "",
        "nothing": "def get_config(): pass",
        "empty": _EMPTY,
        "typo": "from music_jax.config import *\ndef get_config(): default_config().batchsize = 3",
    }
    paths = {name: str(tmp_path / f"{name}.py") for name in files}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    arguments = [argument.format(**paths) for argument in arguments]
    code, out, err = run(f"music_jax.{command}", f"--workdir={tmp_path}", *arguments)
    assert code == 2, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert message.format(**paths) in err
    assert not out


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("main", "--batch_size=12", "unknown flag --batch_size; did you mean --config.batch_size?"),
        ("main", "--num-segments=4", "did you mean --config.objective.num_segments?"),
        ("main", "--optimizer.name=sgd", "did you mean --config.optimizer.name?"),
        ("evaluate", "--shots=1", "did you mean --config.few_shot.shots?"),
        ("plan", "--num-images=9", "unknown flag --num-images; did you mean --num_images?"),
        ("export", "--batch_size=12", "Unknown command line flag 'batch_size'"),
    ],
)
def test_a_field_without_its_prefix_is_suggested(command, flag, message):
    code, out, err = run(f"music_jax.{command}", flag)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_all_fields_of_a_name_are_suggested():
    code, _, err = run("music_jax.main", "--momentum=0")
    assert code == 2
    fields = ("finetune", "linear_eval", "online_probe", "optimizer", "semi_supervised")
    meant = " or ".join(f"--config.{field}.momentum" for field in fields)
    assert err == f"error: unknown flag --momentum; did you mean {meant}?\n"


def _listed(*arguments):
    code, out, err = run("music_jax.main", *arguments, "--helpfields")
    assert (code, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    return dict(line.split()[0].split("=") for line in lines if line.startswith("--config."))


def test_the_listed_fields_have_the_values_of_the_config_file_and_the_command_line():
    default, digits = _listed(), _listed(DIGITS, "--config.objective.num_segments=9")
    assert default["--config.batch_size"] == "256"
    assert digits["--config.batch_size"] == "128"
    assert digits["--config.dataset.name"] == "digits"
    assert digits["--config.objective.num_segments"] == "9"
    # Views that are the same are listed once.
    for view in ("view_2", "local"):
        assert not any(name.startswith(f"--config.augmentation.{view}.") for name in default)
    assert _listed("--config=digits") == _listed(DIGITS)


def test_views_that_differ_are_both_listed(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from music_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.augmentation.view_2.blur_probability = 0.125\n"
        "    return config\n"
    )
    fields = _listed(f"--config={tmp_path / 'mine.py'}")
    assert fields["--config.augmentation.view_1.blur_probability"] != "0.125"
    assert fields["--config.augmentation.view_2.blur_probability"] == "0.125"
    assert "--config.augmentation.local.blur_probability" not in fields


def test_a_missing_config_file_has_no_fields_to_list():
    code, out, err = run("music_jax.main", "--config=nowhere.py", "--helpfields")
    assert (code, out) == (2, "")
    assert "there is no config file 'nowhere.py'" in err


@pytest.mark.parametrize(
    ("command", "platforms"),
    [("main", "nosuch"), ("claims", "cpu,nosuch"), ("export", "cuda"), ("pack", "cuda,cpu")],
)
def test_a_platform_that_is_not_installed_is_one_clear_line(command, platforms, tmp_path):
    arguments = {
        "main": (DIGITS, f"--workdir={tmp_path}/run"),
        "claims": (DIGITS, f"--output={tmp_path}/claims"),
        "export": (f"--workdir={tmp_path}", "--format=onnx", f"--output={tmp_path}/x.onnx"),
        "pack": (f"--source={tmp_path}", f"--output={tmp_path}/packed"),
    }[command]
    process = start(f"music_jax.{command}", *arguments, env={"JAX_PLATFORMS": platforms})
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"error: JAX_PLATFORMS={platforms} cannot be used here: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "prints_to"),
    [
        ("music_jax", (), "stdout"),
        ("music_jax.main", ("--help",), "stdout"),
        ("music_jax.evaluate", ("--helpfields",), "stdout"),
        ("music_jax.export", (), "stderr"),  # the error that an option is missing
    ],
)
def test_a_closed_pipe_ends_a_command_without_a_message(module, arguments, prints_to):
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {prints_to: writer}
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, **streams)
    os.close(writer)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 141  # what a shell gives for a process that SIGPIPE has ended
    assert not out
    assert not err


_LOOK = """
import importlib, os, pkgutil, signal, sys
from absl import flags
import music_jax
before = {n: signal.getsignal(n) for n in signal.valid_signals()}
for module in pkgutil.walk_packages(music_jax.__path__, "music_jax."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert not error.name.startswith("music_jax"), error
after = {n: signal.getsignal(n) for n in signal.valid_signals()}
ours = {m for m, found in flags.FLAGS.flags_by_module_dict().items() if found and "music" in m}
print(ours, before == after, signal.set_wakeup_fd(-1))
flags.DEFINE_string("workdir", "theirs", "A flag of a program that uses the library.")
import music_jax.evaluate, music_jax.export, music_jax.linear_eval
print(flags.FLAGS["workdir"].default)
"""


def test_importing_the_library_defines_no_flag_and_installs_no_handler():
    done = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set() True -1\ntheirs\n", done.stderr


def test_each_command_is_listed_in_one_line():
    code, out, err = run("music_jax")
    assert (code, err) == (0, "")
    listed = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert listed["main"] == "Pre-trains a backbone, then evaluates it"
    package = pathlib.Path(music_jax.__file__).parent
    for name in listed:
        assert (package / f"{name}.py").exists() or (package / name / "__main__.py").exists()
    assert {"evaluate", "report", "plan", "claims", "import_weights"} <= listed.keys()
    assert "cli" not in listed


def test_version():
    assert run("music_jax", "--version") == (0, f"music_jax {music_jax.__version__}\n", "")


def test_the_console_script_runs_a_command():
    expected = run("music_jax.export", "--help")
    assert run("music_jax", "export", "--help") == expected
    code, out, err = run("music_jax", "evaluate", "--config.knn.kk=3")
    assert (code, out) == (2, "")
    assert err.startswith("error: the config has no field 'knn.kk'")


@pytest.mark.parametrize(
    ("argument", "message"),
    [("evalute", "did you mean evaluate?"), ("--x", "expected channel_statistics, claims, ")],
)
def test_an_unknown_command_is_one_clear_line(argument, message):
    code, out, err = run("music_jax", argument)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: unknown command {argument!r}; {message}")
    assert err.count("\n") == 1


_HELP = """
import runpy, sys
sys.argv = ["main", "--help"]
try:
    runpy.run_module("music_jax.main", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0, end.code
assert "jax" not in sys.modules
"""


def test_help_lists_the_commands_own_flags_without_importing_jax():
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  --(?:\[no\])?(\w+):", done.stdout, re.MULTILINE)
    processes = ["coordinator_address", "num_processes", "process_id"]
    own = ["config", "helpfields", "import", "profile", "verbose", "workdir"]
    assert listed == sorted([*own, *processes])
