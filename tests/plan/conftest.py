"""Loads libtpu once, only to compile; it warns on standard error that there is no TPU."""

import os

import jax
import pytest

from music_jax.plan import compiling

pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86-64 alone")
os.environ.update(
    {name: value for name, value in compiling.ENVIRONMENT.items() if name != "JAX_PLATFORMS"}
)


@pytest.fixture(scope="session")
def four_chips():
    """Four absent TPU v5e chips."""
    return compiling.open_slice("v5e:2x2", fsdp=1)


@pytest.fixture(autouse=True)
def _nothing_is_remembered(tmp_path, monkeypatch):
    """Nor by JAX's own cache, from which no program for chips that you do not have can be read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
