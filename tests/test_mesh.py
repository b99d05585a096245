"""What is asked of XLA before any device is used."""

import os

import pytest

from music_jax import mesh

FLAG = "--xla_gpu_exclude_nondeterministic_ops"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{FLAG}=true"),
        ("--xla_dump_to=dump", f"--xla_dump_to=dump {FLAG}=true"),
        (f"{FLAG}=false", f"{FLAG}=false"),
        ("--xla_gpu_deterministic_ops=true", "--xla_gpu_deterministic_ops=true"),
    ],
)
def test_repeatable_operations_are_asked_for_unless_the_user_says_otherwise(
    monkeypatch, before, after
):
    monkeypatch.setenv("XLA_FLAGS", before)
    mesh.use_repeatable_gpu_operations()
    assert os.environ["XLA_FLAGS"] == after
