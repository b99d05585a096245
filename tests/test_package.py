"""The installed package: light imports, a typed wheel with the configs, and layers of packages."""

import configparser
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "grain",
    "cv2",
    "clu",
    "flax",
    "orbax",
    "safetensors",
)
# Errors of pip without a network, or with one that does not answer.
_UNREACHABLE = ("NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyError")

_USE = f"""
import sys
import music_jax

assert "jax" not in sys.modules
import jax.numpy as jnp

z = jnp.eye(8)
loss = music_jax.objectives.music_loss(z, z, num_segments=2)
assert bool(jnp.isfinite(loss)), loss
music_jax.optim.lars(0.1)
loaded = [name for name in {_HEAVY} if name in sys.modules]
assert not loaded, loaded
try:
    music_jax.nothing
except AttributeError:
    print(music_jax.__file__)
"""


def test_importing_the_objectives_loads_few_packages():
    done = subprocess.run(
        [sys.executable, "-c", _USE], capture_output=True, text=True, cwd=_ROOT, check=True
    )
    assert done.stdout.strip() == str(_ROOT / "music_jax" / "__init__.py")


@pytest.mark.slow
def test_the_wheel_installs_alone_and_is_typed(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT / "music_jax", source / "music_jax", ignore=ignored)
    shutil.copytree(_ROOT / "configs", source / "configs", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, source)
    # The wheel is built from the source distribution.
    build = [sys.executable, "-m", "build", "--no-isolation", f"--outdir={tmp_path}", source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    for module in (_ROOT / "music_jax").rglob("*.py"):
        assert str(module.relative_to(_ROOT)) in packed
    assert "music_jax/py.typed" in packed
    assert {"music_jax/configs/mnist5k.py", "music_jax/configs/folder.py"} <= packed
    assert not [name for name in packed if name.startswith(("tests", "configs"))]

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    pins = tmp_path / "pins.txt"  # with hashes, pip would demand one for the wheel, too
    pins.write_text(re.sub(r" \\\n +--hash=\S+", "", (_ROOT / "requirements.txt").read_text()))
    pip = [python, "-m", "pip", "install", "--quiet", "-c", pins, wheel]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode != 0 and any(error in installed.stderr for error in _UNREACHABLE):
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    done = subprocess.run(
        [python, "-c", _USE], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert str(environment) in done.stdout

    def run(*arguments):
        command = [python, "-m", "music_jax.main", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    script = environment / "bin" / "music-jax"
    listed = subprocess.run(
        [script, "main", "--config=folder", "--helpfields"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert "--config.backbone.name=resnet18" in listed.stdout
    told = run("--help")
    assert told.returncode == 0
    assert "needs the extra `data`" in told.stdout
    config = tmp_path / "mine.py"
    config.write_text(
        "from music_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.dataset.name = 'digits'\n"
        "    return config\n"
    )
    without_data = run("--config=mine.py", "--workdir=run")
    assert without_data.returncode == 2, without_data.stderr
    assert without_data.stderr.count("\n") == 1
    assert "which is not installed: pip install 'music_jax[data]'" in without_data.stderr


def test_every_package_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    folders = [file.parent for file in (_ROOT / "music_jax").rglob("__init__.py")]
    found = {".".join(folder.relative_to(_ROOT).parts) for folder in folders}
    assert set(setup["options"]["packages"].split()) == found | {"music_jax.configs"}


def _lint_imports(directory):
    lint = [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(lint, cwd=directory, capture_output=True, text=True)
    return done.returncode, " ".join(done.stdout.split())


def test_imports_point_to_lower_layers():
    code, out = _lint_imports(_ROOT)
    assert code == 0, out


@pytest.mark.parametrize(
    ("module", "statement", "message"),
    [
        ("config/fields.py", "from music_jax import train", "music_jax.config is not allowed to"),
        (
            "workdir/directory.py",
            "import music_jax",
            "No module imports the root package, which .*BROKEN",
        ),
        ("optim.py", "from music_jax import main", "music_jax.optim is not allowed to import"),
        ("newcomer.py", "", "not listed as layers"),
    ],
)
def test_an_import_that_points_upward_breaks_the_contract(module, statement, message, tmp_path):
    shutil.copy(_ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT / "music_jax", tmp_path / "music_jax", ignore=ignored)
    with (tmp_path / "music_jax" / module).open("a") as file:
        file.write(f"\ndef _late():\n    {statement or 'pass'}\n")
    code, out = _lint_imports(tmp_path)
    assert code != 0
    assert re.search(message, out), out
