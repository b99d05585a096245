"""Functions for tests of the launchers: running one, and reading the output of its dry run."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
AWKWARD = '--workdir=gs://bucket/it\'s a $(run) of "$HOME"'


def launch(script, *arguments, **environment):
    command = [ROOT / "launch" / script, *arguments]
    if not os.access(command[0], os.X_OK):
        command.insert(0, "bash")
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def commands(output):
    """The commands of a dry run, as a shell would read them."""
    return [line for line in map(list, _logical_lines(output)) if line]


def _logical_lines(output):
    for line in output.splitlines():
        yield subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
