"""A campaign of faults against real runs, and what survived it.

    python tests/faults.py --kills=50 --stops=20 --damages=30 --full-disks=10 --topologies=6

Each fault is done to a real process or to real files; then the same command is run again until the
run is finished. A fault is survived if the final parameters, statistics and optimiser are byte
for byte those of a run that nothing happened to (on another topology: if the losses agree to 1e-5),
and lost if not. Ends with exit code 1 if anything was lost.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from processes import DIGITS, checkpoint, metrics, start

TRAIN = "music_jax.main"
EPOCHS = 4
STEPS = EPOCHS * 11
CONFIG = (
    DIGITS,
    f"--config.num_epochs={EPOCHS}",
    "--config.optimizer.warmup_epochs=1",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=4",
    "--config.linear_eval.num_epochs=2",
    "--config.linear_eval.base_learning_rates=(0.01,)",
    "--config.linear_eval.raw_pixels=False",
    "--config.linear_eval.random_init=False",
)
# For comparisons between topologies, whose sums are rounded in another order.
SLOW_LEARNING = ("--config.optimizer.base_learning_rate=1e-5",)


class Run:
    """One workdir and the command that trains in it."""

    def __init__(self, workdir: pathlib.Path, *options: str, devices: int = 1):
        self.workdir, self.options, self.devices = workdir, options, devices

    def start(self, **popen: object) -> subprocess.Popen:
        return start(
            TRAIN,
            *CONFIG,
            *self.options,
            f"--workdir={self.workdir}",
            devices=self.devices,
            **popen,
        )

    def finish(self, expected: int = 0) -> str:
        """Runs to the end; gives what it printed."""
        out, err = (process := self.start()).communicate(timeout=600)
        if process.returncode != expected:
            raise AssertionError(f"exit code {process.returncode}, not {expected}: {err[-2000:]}")
        return out + err

    def result(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in checkpoint(self.workdir, STEPS).items()}

    def losses(self) -> list[float]:
        return [line["loss"] for line in metrics(self.workdir)]


def wait_for_step(run: Run, process: subprocess.Popen, step: int) -> None:
    """Waits until a step is logged or the process has ended."""
    log = run.workdir / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and f'{{"step": {step},' in log.read_text():
            return
        time.sleep(0.02)


def logs_are_whole(run: Run) -> bool:
    """Whether the log has each step once, in order."""
    return [line["step"] for line in metrics(run.workdir)] == list(range(1, STEPS + 1))


class Campaign:
    def __init__(self, directory: pathlib.Path, seed: int):
        self.directory, self.random = directory, random.Random(seed)
        self.rows: dict[str, list[bool]] = {}
        self.count = 0
        undisturbed = self.new()
        began = time.monotonic()
        undisturbed.finish()
        self.seconds = time.monotonic() - began
        self.expected = undisturbed.result()
        print(f"an undisturbed run takes {self.seconds:.1f} s", flush=True)
        self.template = undisturbed.workdir

    def new(self, *options: str, devices: int = 1) -> Run:
        self.count += 1
        return Run(self.directory / f"run-{self.count}", *options, devices=devices)

    def note(self, fault: str, survived: bool) -> None:
        self.rows.setdefault(fault, []).append(survived)
        print(f"{fault}: {'survived' if survived else 'LOST'}", flush=True)

    def judge(self, run: Run) -> bool:
        """Runs to the end and compares with what nothing happened to."""
        try:
            run.finish()
            return run.result() == self.expected and logs_are_whole(run)
        except Exception as error:
            print(error, file=sys.stderr)
            return False

    def kills(self, times: int) -> None:
        """SIGKILL at random moments of a run, start-up, saves and evaluation included."""
        done = 0
        while done < times:
            run, in_this_run = self.new(), 0
            while done + in_this_run < times:
                process = run.start()
                try:
                    process.wait(self.random.uniform(0, 1.2 * self.seconds))
                except subprocess.TimeoutExpired:
                    process.kill()
                    in_this_run += 1
                process.communicate()
                if process.returncode == 0:
                    break
            survived = self.judge(run)
            for _ in range(in_this_run):
                self.note("SIGKILL", survived)
            done += in_this_run

    def stops(self, times: int) -> None:
        """SIGTERM or SIGINT at a random step: saved, exit code 75."""
        for i in range(times):
            run = self.new()
            process = run.start()
            wait_for_step(run, process, self.random.randrange(1, STEPS - 3))
            process.send_signal(signal.SIGTERM if i % 2 else signal.SIGINT)
            process.communicate(timeout=120)
            self.note("SIGTERM, SIGINT", process.returncode == 75 and self.judge(run))

    def damages(self, times: int) -> None:
        """The newest checkpoint of a stopped run damaged, each kind in turn."""
        kinds = list(DAMAGES)
        stopped = self.new()
        process = stopped.start()
        wait_for_step(stopped, process, STEPS // 2)
        process.terminate()
        process.communicate(timeout=120)
        for i in range(times):
            kind = kinds[i % len(kinds)]
            run = self.new()
            shutil.copytree(stopped.workdir, run.workdir)
            steps = sorted(
                int(path.name) for path in (run.workdir / "checkpoints").iterdir() if path.is_dir()
            )
            DAMAGES[kind](run.workdir / "checkpoints" / str(steps[-1]), self.random)
            self.note(f"damage: {kind}", self.judge(run))

    def full_disks(self, times: int) -> None:
        """A file system that is full at some save; then there is room again."""
        for _ in range(times):
            run = self.new()
            run.workdir.mkdir()
            size = self.random.randrange(6, 14)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(run.workdir)]
            subprocess.run(mount, check=True)
            try:
                process = run.start()
                _, err = process.communicate(timeout=300)
                clear = process.returncode == 2 and "Traceback" not in err
                remount = ["mount", "-o", "remount,size=200m", str(run.workdir)]
                subprocess.run(remount, check=True)
                self.note("full disk", clear and self.judge(run))
            finally:
                subprocess.run(["umount", str(run.workdir)], check=False)

    def topologies(self, times: int) -> None:
        """Stopped on some devices, gone on with others: the same losses to 1e-5."""
        straight = self.new(*SLOW_LEARNING)
        straight.finish()
        moves = [(1, 2), (2, 1), (1, 4), (4, 2), (2, 4), (4, 1)]
        for i in range(times):
            before, after = moves[i % len(moves)]
            run = self.new(*SLOW_LEARNING, devices=before)
            process = run.start()
            wait_for_step(run, process, self.random.randrange(2, STEPS - 24))
            process.terminate()
            process.communicate(timeout=120)
            run.devices = after
            try:
                run.finish()
                same = np.allclose(run.losses(), straight.losses(), rtol=1e-5, atol=0)
            except AssertionError as error:
                print(error, file=sys.stderr)
                same = False
            self.note(f"{before} to {after} devices", same and logs_are_whole(run))

    def table(self) -> str:
        lines = [f"{'fault':32s} {'tried':>6s} {'survived':>9s} {'lost':>5s}"]
        for fault, outcomes in self.rows.items():
            good = sum(outcomes)
            lines.append(f"{fault:32s} {len(outcomes):6d} {good:9d} {len(outcomes) - good:5d}")
        return "\n".join(lines)


def _a_file(checkpoint: pathlib.Path, random: random.Random) -> pathlib.Path:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return random.choice([path for path in files if path.name != "commit_success.txt"])


def _truncate(checkpoint: pathlib.Path, random: random.Random) -> None:
    file = _a_file(checkpoint, random)
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(len(content))])


def _flip(checkpoint: pathlib.Path, random: random.Random) -> None:
    data = [path for path in checkpoint.rglob("d/*") if path.is_file()]
    file = max(data, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    for _ in range(3):
        content[random.randrange(len(content))] ^= random.randrange(1, 256)
    file.write_bytes(content)


def _remove_a_file(checkpoint: pathlib.Path, random: random.Random) -> None:
    _a_file(checkpoint, random).unlink()


def _empty(checkpoint: pathlib.Path, random: random.Random) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _temporary(checkpoint: pathlib.Path, random: random.Random) -> None:
    _remove_a_file(checkpoint, random)
    checkpoint.rename(checkpoint.with_name(checkpoint.name + ".orbax-checkpoint-tmp"))


def _zeros(checkpoint: pathlib.Path, random: random.Random) -> None:
    file = _a_file(checkpoint, random)
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    "truncated file": _truncate,
    "flipped bytes": _flip,
    "missing file": _remove_a_file,
    "empty directory": _empty,
    "half-written temporary": _temporary,
    "file of zeros": _zeros,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("kills", "stops", "damages", "full-disks", "topologies"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        campaign = Campaign(pathlib.Path(directory), options.seed)
        campaign.kills(options.kills)
        campaign.stops(options.stops)
        campaign.damages(options.damages)
        campaign.full_disks(options.full_disks)
        campaign.topologies(options.topologies)
    print(campaign.table())
    if options.json:
        options.json.write_text(json.dumps(campaign.rows, indent=1) + "\n")
    sys.exit(any(not all(outcomes) for outcomes in campaign.rows.values()))


if __name__ == "__main__":
    main()
