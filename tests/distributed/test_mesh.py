"""XLA flags before devices are used, and the flags that name the processes of a run."""

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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", 2, None), "go together: give all three"),
        ((None, None, 0), "go together: give all three"),
        ((None, 2, 0), "go together: give all three"),
        (("host", 2, 0), "--coordinator_address must be HOST:PORT; got 'host'"),
        (("host:port", 2, 0), "--coordinator_address must be HOST:PORT; got 'host:port'"),
        (("host:1", 2, 2), r"--process_id must be in \[0, num_processes = 2\); got 2"),
        (("host:1", 2, -1), r"--process_id must be in .*; got -1"),
        (("host:1", 1, 1), r"--process_id must be in .*; got 1"),
        (("host:1", 0, 0), r"--process_id must be in .*; got 0"),
    ],
)
def test_flags_that_do_not_name_a_process_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        mesh.join_cluster(*flags)


# What the client of Kubernetes does in a pod that has no service account, and other clusters may.
_FAILING_CLIENT = """
class config:
    @staticmethod
    def load_incluster_config():
        raise {error}("no\\ntoken")
"""
_JOIN = """
from music_jax.distributed import mesh
from music_jax.errors import UserError
try:
    mesh.join_cluster({flags})
    print("alone")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        (
            "None, None, None",
            "type('Own', (Exception,), {})",
            "cannot find out whether this cluster",
        ),
        ("None, None, None", "KeyError", "cannot find out whether this cluster runs further"),
        ("None, 1, None", "OSError", "alone"),
        ("'127.0.0.1:1', 1, 0", "OSError", "alone"),
    ],
)
def test_a_cluster_client_that_fails_is_an_error_unless_flags_replace_it(
    flags, error, expected, tmp_path
):
    (tmp_path / "kubernetes.py").write_text(_FAILING_CLIENT.format(error=error))
    environment = os.environ | {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    done = subprocess.run(
        [sys.executable, "-c", _JOIN.format(flags=flags)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.startswith(expected), done.stderr
    assert done.stdout.count("\n") == 1
    if expected != "alone":
        assert "token" in done.stdout
        assert "--num_processes=1 if it does not" in done.stdout
