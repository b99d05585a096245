"""What is compiled is found again by another process, and a damaged file harms nothing."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures("own_compilation_cache")

# Compiles one program, and says what it gave and how often the cache had it.
_PROGRAM = """
import collections, sys
import jax, numpy as np
from music_jax import compilation_cache
compilation_cache._MIN_COMPILE_SECONDS = 0.0
compilation_cache.use_compilation_cache(sys.argv[1])
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))

@jax.jit
def program(x):
    return (x @ x.T).sum()

print(float(program(np.arange(6, dtype=np.float32).reshape(2, 3))))
print(events["cache_hits"], events["cache_misses"])
"""


def _run(workdir, **environment):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(workdir)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert done.stderr == ""
    *said, value, counts = done.stdout.splitlines()
    return said, value, tuple(map(int, counts.split()))


@pytest.fixture
def cached(tmp_path):
    assert _run(tmp_path) == ([], "83.0", (0, 1)), "the first process compiles"
    (file,) = (tmp_path / "compilation_cache").glob("jit_program-*")
    return tmp_path, file


def test_the_second_process_compiles_nothing(cached):
    assert _run(cached[0]) == ([], "83.0", (1, 0))


def test_a_damaged_file_is_told_of_once_and_replaced(cached):
    workdir, file = cached
    whole = file.read_bytes()
    for damage in (whole[:50], b"", whole[:200] + bytes(50) + whole[250:]):
        file.write_bytes(damage)
        said, value, counts = _run(workdir)
        assert (value, counts) == ("83.0", (0, 1))
        assert len(said) == 1
        assert "compilation_cache failed: compiling anew" in said[0]
        assert _run(workdir) == ([], "83.0", (1, 0))


def test_a_cache_that_cannot_be_written_harms_nothing(tmp_path):
    (tmp_path / "compilation_cache").write_text("a file where the directory would be")
    said, value, _ = _run(tmp_path)
    assert value == "83.0"
    assert said
    assert all("compilation_cache failed" in line for line in said)


def test_the_users_own_choice_stays(tmp_path):
    own = tmp_path / "own"
    _run(tmp_path / "run", JAX_COMPILATION_CACHE_DIR=str(own))
    assert own.is_dir()
    assert not (tmp_path / "run").exists()
