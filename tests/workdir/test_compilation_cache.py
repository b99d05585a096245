"""Compiled programs are found by another process, and damaged files are replaced."""

import os
import subprocess
import sys

import jax
import pytest

from music_jax.workdir import compilation_cache
from music_jax.workdir.compilation_cache import use_compilation_cache
from tests.processes import ROOT

# Compiles one program, and says what it gave and how often the cache had it.
_PROGRAM = """
import collections
import jax, numpy as np
from music_jax.distributed.progress import log_to_stdout
from music_jax.workdir import compilation_cache
log_to_stdout()
compilation_cache._MIN_COMPILE_SECONDS = 0.0
compilation_cache.use_compilation_cache()
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))

@jax.jit
def program(x):
    return (x @ x.T).sum()

print(float(program(np.arange(6, dtype=np.float32).reshape(2, 3))))
print(events["cache_hits"], events["cache_misses"])
"""


def _run(**environment):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
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
def cached(own_compilation_cache):
    assert _run() == ([], "83.0", (0, 1)), "the first process compiles"
    (file,) = own_compilation_cache.glob("jit_program-*")
    return file


def test_the_second_process_compiles_nothing(cached):
    assert _run() == ([], "83.0", (1, 0))


def test_a_damaged_file_is_replaced_with_one_warning(cached):
    whole = cached.read_bytes()
    for damage in (whole[:50], b"", whole[:200] + bytes(50) + whole[250:]):
        cached.write_bytes(damage)
        said, value, counts = _run()
        assert (value, counts) == ("83.0", (0, 1))
        assert len(said) == 1
        assert "compiled failed: compiling again" in said[0]
        assert _run() == ([], "83.0", (1, 0))


def test_a_directory_that_others_can_write_to_is_not_used(own_compilation_cache):
    own_compilation_cache.mkdir(parents=True)
    own_compilation_cache.chmod(0o777)
    said, value, counts = _run()
    assert (value, counts) == ("83.0", (0, 0))
    assert said == [
        f"compiled programs are not cached: others can write to {own_compilation_cache}; "
        "chmod go-w "
        f"{own_compilation_cache}"
    ]
    assert not list(own_compilation_cache.iterdir())


def test_a_cache_that_cannot_be_created_is_not_used(own_compilation_cache):
    own_compilation_cache.parents[1].write_text("a file where the directory would be")
    said, value, counts = _run()
    assert (value, counts) == ("83.0", (0, 0))
    assert len(said) == 1
    assert "compiled programs are not cached" in said[0]


def test_several_processes_of_a_run_use_no_cache(own_compilation_cache, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert not own_compilation_cache.exists()


def test_the_users_cache_directory_is_respected(own_compilation_cache, tmp_path):
    own = tmp_path / "own"
    _run(JAX_COMPILATION_CACHE_DIR=str(own))
    assert own.is_dir()
    assert not own_compilation_cache.exists()


def test_the_oldest_programs_are_removed_beyond_the_limit(own_compilation_cache, monkeypatch):
    own_compilation_cache.mkdir(parents=True, mode=0o700)
    for age in range(4):
        path = own_compilation_cache / f"{age}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compilation_cache, "_MAX_CACHE_BYTES", 250)
    compilation_cache._remove_oldest(own_compilation_cache)
    assert sorted(os.listdir(own_compilation_cache)) == ["0-cache", "1-cache"]
