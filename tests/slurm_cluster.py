"""A Slurm of two nodes on this machine, for tests of the launcher."""

import contextlib
import os
import re
import shutil
import subprocess
import time

import psutil
from processes import ROOT

_NAMESPACES = ("--mount", "--uts", "--net", "--pid")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")


def missing():
    """Returns what this machine lacks for a Slurm, or an empty string."""
    if os.geteuid() != 0:
        return "only root can start it"
    if absent := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(absent)} not installed; on Debian, .ci/run installs slurm-wlm"
    probe = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"]
    made = subprocess.run(probe, capture_output=True, text=True, check=False)
    return "" if made.returncode == 0 else f"cannot create namespaces: {made.stderr.strip()}"


class Slurm:
    """Slurm's commands on a cluster of the nodes n1 and n2, each of two cores.

    Jobs of the partition `high` preempt those of `low`, the default, with a minute of grace.
    """

    def __init__(self, directory, first):
        self._directory = directory
        self._first = first

    def run(self, *command, directory=ROOT, **environment):
        """Runs a command on the head of the cluster, and returns its output."""
        enter = ["nsenter", f"--target={self._first}", *_NAMESPACES, f"--wd={directory}"]
        environment |= {"SLURM_CONF": str(self._directory / "slurm.conf")}
        done = subprocess.run(
            [*enter, *map(str, command)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments, **options):
        """Submits a job, and returns its number; options are those of `run`."""
        return self.run("sbatch", "--parsable", *arguments, **options).strip()

    def job(self, number):
        """Returns what Slurm says about a job: JobState, ExitCode, Restarts, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait_for(self, number, *states, timeout=300):
        """Waits until a job is in one of some states, and returns what Slurm says about it."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"not {states} within {timeout} s: {job}"
            time.sleep(0.3)
        return job

    @contextlib.contextmanager
    def without_power(self, node):
        """Kills all processes of a node at once, and starts it again at the end of the block."""
        off = self._directory / f"{node}.off"
        off.touch()
        self.run("kill", "-KILL", (self._directory / f"{node}.pid").read_text().strip())
        yield
        off.unlink()


@contextlib.contextmanager
def slurm_cluster(directory):
    """A running cluster, whose files are in an empty directory; ends all of its processes."""
    command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(
        [*command, "bash", ROOT / "tests" / "slurm.sh", directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        (first,) = psutil.Process(process.pid).children()
        yield Slurm(directory, first.pid)
    finally:
        process.communicate()
