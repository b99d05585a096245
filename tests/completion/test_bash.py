"""Completion in a real bash, by the script that the commands themselves make."""

import fcntl
import os
import pathlib
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from processes import ROOT

from music_jax import config_fields
from music_jax.completion import bash, fish, zsh
from music_jax.completion.commands import all_commands
from music_jax.exchange import formats

# Sets the line's words as bash does, which cuts at = and : too, and prints what it would offer.
_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_music_jax python
((${#COMPREPLY[@]} == 0)) || printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def made():
    return all_commands(), config_fields.fields()


@pytest.fixture(scope="module")
def script(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "music_jax.bash"
    path.write_text(bash.script(*made))
    return path


def _offers(script, *words):
    arguments = ["bash", "--norc", "-c", _ASK, "bash", str(script), *words]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


def test_all_commands_are_there(made):
    by_name = {command.name: command for command in made[0]}
    assert {"main", "linear_eval", "evaluate", "plan", "pack", "export", "claims"} <= set(by_name)
    assert "objective.num_segments" in {field.name for field in made[1]}
    assert by_name["main"].has_fields
    assert not by_name["export"].has_fields


def test_commands_and_flags(script):
    assert _offers(script, "python", "-m", "music_jax.ma") == ["music_jax.main"]
    assert "music_jax.export" in _offers(script, "python", "-m", "music_jax.")
    flags = _offers(script, "python", "-m", "music_jax.export", "--")
    assert {"--workdir=", "--format=", "--help"} <= set(flags)
    assert "--config." not in flags
    formats_offered = _offers(script, "python", "-m", "music_jax.export", "--format", "=")
    assert formats_offered == list(formats.FORMATS)
    assert _offers(script, "launch/local.sh", "--work") == ["--workdir="]


def test_values(script):
    main = ("python", "-m", "music_jax.main")
    assert _offers(script, *main, "--config", "=", "configs/mn") == ["configs/mnist5k.py"]
    assert _offers(script, *main, "--config=configs/mn") == ["--config=configs/mnist5k.py"]
    assert _offers(script, *main, "--config", "configs/mn") == ["configs/mnist5k.py"]
    assert _offers(script, *main, "--workdir", "=", "confi") == ["configs"]
    assert _offers(script, *main[:2], "music_jax.export", "--format", "=", "o") == ["onnx", "orbax"]
    assert _offers(script, *main, "--config.objective.name", "=", "v") == ["vicreg"]
    assert _offers(script, *main, "--config.knn.enabled", "=") == ["true", "false"]


def test_fields_a_group_at_a_time(script):
    main = ("python", "-m", "music_jax.main")
    groups = _offers(script, *main, "--config.")
    assert "--config.objective." in groups
    assert "--config.seed=" in groups
    assert "--config.objective.name=" not in groups
    one = _offers(script, *main, "--config.objective.num_s")
    assert one == ["--config.objective.num_segments="]


def test_other_uses_of_python_complete_as_before(script, tmp_path):
    other = tmp_path / "other.bash"
    other.write_text(f"_python() {{ COMPREPLY=(theirs); }}\nsource {script}\n")
    assert _offers(other, "python", "x") == ["theirs"]


def test_a_key_completes_in_an_interactive_shell(script):
    terminal, inner = pty.openpty()
    bash = subprocess.Popen(
        ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"],
        cwd=ROOT,
        stdin=inner,
        stdout=inner,
        stderr=inner,
    )
    os.close(inner)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 300, 0, 0))  # wraps nothing
    try:
        os.write(terminal, f"bind 'set enable-bracketed-paste off'; source {script}\n".encode())
        os.write(terminal, b"python -m music_jax.main --config=configs/mnis\t --config.knn.tem\t")
        seen, deadline = b"", time.monotonic() + 20
        while b"knn.temperature=" not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096)
    finally:
        bash.kill()
        bash.wait()
        os.close(terminal)
    assert b"configs/mnist5k.py  --config.knn.temperature=" in seen, seen


@pytest.mark.parametrize(("shell", "module"), [("zsh", zsh), ("fish", fish)])
def test_the_other_shells_can_read_theirs(made, tmp_path, shell, module):
    text = module.script(*made)
    assert "import_weights" in text
    assert "config.objective.num_segments" in text
    path = tmp_path / f"script.{shell}"
    path.write_text(text)
    try:
        subprocess.run([shell, "-n", path], check=True)
    except FileNotFoundError:
        pytest.skip(f"{shell} is not installed")


def test_the_command_prints_the_script(script):
    asked = [sys.executable, "-m", "music_jax.completion", "--shell=bash"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == pathlib.Path(script).read_text()
