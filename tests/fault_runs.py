"""Runs to which the campaign of faults applies its faults."""

import copy
import itertools
import pathlib
import random
import shutil
import subprocess
import threading
import time

from processes import DIGITS, checkpoint, free_port, metrics, start

STEPS = 44
CONFIG = (
    DIGITS,
    "--config.batch_size=32",
    "--config.crop.size=8",
    "--config.crop.eval_resize=8",
    "--config.objective.num_segments=8",
    "--config.objective.units_per_segment=8",
    "--config.num_epochs=1",
    "--config.optimizer.warmup_epochs=0",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=8",
    "--config.linear_eval.num_epochs=2",
    "--config.linear_eval.base_learning_rates=(0.01,)",
    "--config.linear_eval.raw_pixels=False",
    "--config.linear_eval.random_init=False",
)
# For comparisons between topologies, whose sums are rounded in another order.
SLOW_LEARNING = "--config.optimizer.base_learning_rate=1e-6"
PATIENCE = 1200  # seconds, for a run of some: the machine may be busy with other things


class LostError(AssertionError):
    """A run did not recover from a fault."""


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise LostError(otherwise)


class Run:
    """One workdir, and the command that trains in it."""

    def __init__(self, workdir, options, programs, devices=1, processes=1):
        self.workdir, self.options = workdir, [option for option in options if option]
        self.devices, self.processes = devices, processes
        self.programs = programs  # where what was compiled is kept; None for the user's cache
        self.cache = workdir.with_name(f"{workdir.name}-cache")

    def _start(self, module: str, *arguments: str) -> subprocess.Popen:
        env: dict[str, str | None] = {
            "JAX_COMPILATION_CACHE_DIR": None,
            "XDG_CACHE_HOME": str(self.cache),
        }
        if self.programs:
            env["JAX_COMPILATION_CACHE_DIR"] = str(self.programs)
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        return start(module, *arguments, devices=self.devices, env=env)

    def start_all(self) -> list[subprocess.Popen]:
        command = [*CONFIG, *self.options, f"--workdir={self.workdir}"]
        if self.processes == 1:
            return [self._start("music_jax.main", *command)]
        address = f"127.0.0.1:{free_port()}"
        return [
            self._start(
                "music_jax.main",
                *command,
                f"--coordinator_address={address}",
                f"--num_processes={self.processes}",
                f"--process_id={i}",
            )
            for i in range(self.processes)
        ]

    def start(self) -> subprocess.Popen:
        (process,) = self.start_all()
        return process

    def _end(self, processes, expected):
        try:
            outputs = [process.communicate(timeout=PATIENCE) for process in processes]
        finally:
            for process in processes:
                process.kill()
        codes = [process.returncode for process in processes]
        expect(set(codes) == {expected}, f"exit codes {codes}: {outputs[0][1][-2000:]}")
        return outputs[0]

    def finish(self, expected: int = 0) -> tuple[str, str]:
        """Runs to the end; returns standard output and standard error."""
        return self._end(self.start_all(), expected)

    def stop_at(self, step: int) -> None:
        processes = self.start_all()
        reaches(self, processes[0], step)
        processes[-1].terminate()
        self._end(processes, 75)

    def evaluate(self) -> None:
        self._end([self._start("music_jax.linear_eval", f"--workdir={self.workdir}")], 0)

    def result(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in checkpoint(self.workdir, STEPS).items()}

    def losses(self) -> list[float]:
        return [line["loss"] for line in metrics(self.workdir)]

    def logged(self) -> list[int]:
        return [line["step"] for line in metrics(self.workdir)]


def reaches(run: Run, process: subprocess.Popen, step: int) -> bool:
    """Waits until a step is logged; returns False if the process ends before."""
    log = run.workdir / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and f'{{"step": {step},'.encode() in log.read_bytes():
            return True
        time.sleep(0.01)
    return False


def catches_signals(process: subprocess.Popen) -> bool:
    """Returns whether the command has installed its own signal handlers."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> 9 & 1)  # SIGUSR1, which Python leaves alone


class Workshop:
    """Makes runs that share a prepared dataset and compiled programs."""

    def __init__(self, directory: pathlib.Path, counts: dict[str, int]):
        self.directory, self.counts = directory, counts
        self._numbers = itertools.count()
        self._data = f"--config.dataset.data_dir={directory / 'data'}"
        self._programs = directory / "programs"
        shutil.rmtree(directory / "runs", ignore_errors=True)
        self.waited: float | None = None  # seconds from the last signal to the process's end
        self._mine: list[pathlib.Path] = []
        self._lock = threading.RLock()
        self._made: dict[str, Run] = {}
        self._results: dict[int, dict[str, bytes]] = {}
        self.undisturbed = self._once("undisturbed")
        began = time.monotonic()
        again = self.new()
        process = again.start()  # with all compiled, which tells how long a run takes
        reaches(again, process, 1)
        self._seconds_to_start = time.monotonic() - began
        process.communicate()
        self._seconds = time.monotonic() - began
        self._results[1] = self.undisturbed.result()
        expect(again.result() == self._results[1], "two undisturbed runs differ")

    def _once(self, name: str, *options: str, **where) -> Run:
        """Returns a run that is made once per campaign and cached."""
        with self._lock:
            if name not in self._made:
                options = (self._data, *options)
                run = Run(self.directory / name, options, self._programs, **where)
                run.finish()
                self._made[name] = run
            return self._made[name]

    def straight(self) -> Run:
        return self._once("straight", SLOW_LEARNING)

    def stopped(self) -> Run:
        """Returns a run that was stopped in the middle."""
        with self._lock:
            if "stopped" not in self._made:
                run = Run(self.directory / "stopped", [self._data], self._programs)
                shutil.rmtree(run.workdir, ignore_errors=True)
                run.stop_at(STEPS // 2)
                self._made["stopped"] = run
            return self._made["stopped"]

    def bench(self) -> "Workshop":
        """Returns the workshop for one of several concurrent faults."""
        mine = copy.copy(self)
        mine._mine, mine.waited = [], None
        return mine

    def _workdir(self) -> pathlib.Path:
        workdir = self.directory / "runs" / str(next(self._numbers))
        self._mine.append(workdir)
        return workdir

    def new(self, *options: str, slow: bool = False, **where) -> Run:
        options = (self._data, *([SLOW_LEARNING] if slow else []), *options)
        return Run(self._workdir(), options, self._programs, **where)

    def copy_of(self, run: Run, devices: int = 1) -> Run:
        another = Run(self._workdir(), run.options, self._programs, devices)
        shutil.copytree(run.workdir, another.workdir)
        return another

    def tidy(self) -> None:
        """Removes the runs that were made here."""
        for workdir in self._mine:
            shutil.rmtree(workdir, ignore_errors=True)

    def judge(self, run: Run, missing_steps: set[int] = frozenset()) -> str:
        """Runs to the end, compares with an undisturbed run and returns the output."""
        out, err = run.finish()
        name = f"{run.processes} processes"
        if run.processes not in self._results:
            undisturbed = self._once(name, processes=run.processes)
            self._results[run.processes] = undisturbed.result()
        expect(run.result() == self._results[run.processes], "other parameters at the end")
        logged = run.logged()
        expect(logged == sorted(set(logged)), f"steps logged: {logged}")
        expect(set(range(1, STEPS + 1)) - set(logged) <= missing_steps, f"steps logged: {logged}")
        expect((run.workdir / "linear_eval.json").exists(), "no evaluation")
        return out + err

    def wait_for(self, run: Run, process, moment: str, rng: random.Random) -> bool:
        """Waits for a moment of a run; returns whether the process is still running."""
        delay = 0.0
        if moment == "start-up":
            while process.poll() is None and not catches_signals(process):
                time.sleep(0.005)
            delay = rng.uniform(0, 0.8 * self._seconds_to_start)
        elif moment == "any":
            delay = rng.uniform(0, self._seconds)
        elif moment == "step":
            log = run.workdir / "metrics.jsonl"
            first = (log.read_bytes().count(b"\n") if log.exists() else 0) + 1
            reaches(run, process, rng.randrange(first, max(first + 1, STEPS - 4)))
            delay = rng.uniform(0, 0.1)
        elif moment == "evaluation":
            reaches(run, process, STEPS)
            while process.poll() is None and not (run.workdir / f"checkpoints/{STEPS}").exists():
                time.sleep(0.005)
            delay = rng.uniform(0, 0.2 * (self._seconds - self._seconds_to_start))
        else:
            if moment == "last save":
                reaches(run, process, STEPS)
            while process.poll() is None and not self._saving(run):
                time.sleep(0.001)
            delay = rng.uniform(0, 0.3)
        time.sleep(delay)
        return process.poll() is None

    def _saving(self, run: Run) -> bool:
        checkpoints = run.workdir / "checkpoints"
        return checkpoints.exists() and any(".orbax" in path.name for path in checkpoints.iterdir())
