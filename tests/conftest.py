"""Settings of all tests: CPU only, four simulated devices, no implicit promotion."""

import os
import pathlib
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
# What several tests, or the processes that they start, compile is compiled once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parents[1] / "build" / "tests" / "compilation_cache"
)
# Tests leave nothing in the home of whoever runs them.
os.environ["XDG_CACHE_HOME"] = str(pathlib.Path(__file__).parents[1] / "build" / "tests" / "cache")
os.environ["XDG_STATE_HOME"] = str(pathlib.Path(__file__).parents[1] / "build" / "tests" / "state")
os.environ["HF_HOME"] = str(pathlib.Path(__file__).parents[1] / "build" / "tests" / "hugging_face")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The tests, and the processes that they start, compile more than they compute; LLVM's optimizations
# take almost half of the time.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest
from etils import epath
from memory_bucket import bucket_directory

from music_jax.distributed.progress import log_to_stdout

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


log_to_stdout()  # as the commands do: tests read messages with capsys


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored():
    """Processes inherit what is ignored, and libtpu, which some tests load, ignores SIGHUP."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.fixture
def own_compilation_cache(monkeypatch, tmp_path):
    """Sets the directory of the compilation cache of the processes that a test starts."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "music_jax" / "compiled"


@pytest.fixture
def bucket(monkeypatch):
    """A directory of a bucket in memory."""
    with bucket_directory(monkeypatch) as directory:
        yield directory


@pytest.fixture(params=["disk", "bucket"])
def directory(request):
    """A directory on disk, then one of a bucket."""
    if request.param == "disk":
        return epath.Path(request.getfixturevalue("tmp_path"))
    return request.getfixturevalue("bucket")


@pytest.fixture
def outside(tmp_path):
    """A file and a directory that nothing below `run` may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    yield tmp_path / "outside" / "file"
    assert os.listdir(tmp_path / "outside") == ["file"]
    assert (tmp_path / "outside" / "file").read_text() == "precious"
