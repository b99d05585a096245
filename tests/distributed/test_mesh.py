"""The mesh of several slices, and XLA flags before devices are used."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest
from jax._src import xla_bridge
from processes import ROOT

from music_jax.distributed import mesh
from music_jax.errors import UserError

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
def test_deterministic_operations_are_requested_unless_the_user_decides(monkeypatch, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    mesh.use_deterministic_gpu_operations()
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize(
    ("backend", "flags", "warnings"), [("cpu", "", 0), ("gpu", "", 1), ("gpu", f"{FLAG}=true", 0)]
)
def test_a_request_after_the_gpu_was_used_is_a_warning(
    monkeypatch, capsys, backend, flags, warnings
):
    jax.devices()  # from here on XLA_FLAGS are not read any more
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    mesh.use_deterministic_gpu_operations()
    assert os.environ["XLA_FLAGS"] == flags
    messages = capsys.readouterr().out.splitlines()
    assert len(messages) == warnings
    for message in messages:
        assert "config.deterministic has no effect" in message
        assert FLAG in message


_TRAIN = """
import os
from music_jax.config import from_file
from music_jax.train import train_and_evaluate
config = from_file("configs/digits.py", deterministic={deterministic}, batch_size=127)
try:
    train_and_evaluate(config, "unused")
except Exception as error:
    print(os.environ.get("XLA_FLAGS"), error)
"""


@pytest.mark.parametrize(("deterministic", "expected"), [(True, f"{FLAG}=true"), (False, "None")])
def test_training_from_python_requests_deterministic_operations(deterministic, expected):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}  # which do not divide the batch
    environment.pop("XLA_FLAGS", None)
    code = _TRAIN.format(deterministic=deterministic)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.startswith(f"{expected} config.batch_size = 127 cannot"), done.stderr


@dataclasses.dataclass(frozen=True)
class _Device:
    """A device as JAX describes it, of a slice or of a machine with GPUs."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "a GPU"
    process_index: int = 0


# In the order of their numbers, which is not that of the slices.
_DEVICES = [_Device(number, slice_index=number % 2) for number in range(8)]


@pytest.mark.parametrize(
    ("fsdp", "expected"),
    [
        (None, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (2, [[0, 2], [4, 6], [1, 3], [5, 7]]),
        (1, [[0], [2], [4], [6], [1], [3], [5], [7]]),
    ],
)
def test_parameters_are_sharded_within_a_slice(fsdp, expected):
    found = mesh.make_data_mesh(devices=_DEVICES, fsdp=fsdp)
    assert found.axis_names == ("data", "fsdp")
    assert [[device.id for device in row] for row in found.devices] == expected


def test_slices_of_different_sizes_are_an_error():
    with pytest.raises(UserError, match="have 4, 3 devices; use the same number of each"):
        mesh.make_data_mesh(devices=_DEVICES[1:])


@pytest.mark.parametrize("fsdp", [3, 8])
def test_parameters_sharded_over_several_slices_are_an_error(fsdp):
    with pytest.raises(UserError, match=f"fsdp = {fsdp} .* the 4 devices of each of the 2 slices"):
        mesh.make_data_mesh(devices=_DEVICES, fsdp=fsdp)
