"""Running the commands as a user does: as processes, with their exit codes and files."""

import contextlib
import json
import os
import pathlib
import pty
import random
import socket
import subprocess
import sys
import termios

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"

# A run of 22 steps that still goes through everything.
SMALL = (
    "--config.num_epochs=2",
    "--config.optimizer.warmup_epochs=1",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=4",
    "--config.linear_eval.num_epochs=2",
)


def start(module, *arguments, devices=1, env=None, **popen):
    """Starts `python -m MODULE ARGUMENTS`, with more environment variables, or without (None)."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment |= env or {}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **popen,
    )


def run(module, *arguments, devices=1, timeout=900):
    """Runs a command to its end; returns exit code, standard output and standard error."""
    process = start(module, *arguments, devices=devices)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def run_in_terminal(command, *, stream="stdout", env=None, columns=0):
    """Runs a command with one of its streams on a terminal; returns exit code, and what it drew."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24 if columns else 0, columns))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {}),
        **{stream: theirs},
    )
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # Linux's way of saying that this is all
        while part := os.read(ours, 65536):
            drawn += part
    os.close(ours)
    return process.wait(timeout=60), drawn.decode()


def free_port():
    """Returns a free port for the processes of a run.

    It is below those that Linux gives to whoever asks for any: it stays free until the first of the
    processes, seconds later, listens at it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def metrics(workdir):
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoint(workdir, step):
    """Returns all arrays of a checkpoint, by their path."""
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(path, restore_args=as_arrays)  # whatever devices saved it
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
