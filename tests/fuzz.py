"""A campaign of hostile inputs: images, folders, archives, configs, checkpoints, logs, results.

    python tests/fuzz.py --cases=100000 --seed=0
    python tests/fuzz.py --target=images --case=1234 --seed=0   (once more, with its traceback)

Each case is read as the package reads it, in a worker process with a limit on its memory. It must
end in acceptance or in one of the package's errors. The table counts what is neither: crashes (an
exception of another kind, more memory than any image needs, an unpickled object, or the death of
the worker), hangs and writes outside the case's directory. Ends with exit code 1 if there are any.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import traceback

import tqdm

HANG_SECONDS = 60
# Beside what a worker holds before it begins. The largest image, decoded from a progressive JPEG.
MEMORY = 3 * 2**30
ROOT = pathlib.Path(__file__).parents[1]
OUTCOMES = ("clear errors", "accepted", "crashes", "hangs", "writes outside")

_events: list[str] = []
_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate"}


def _audit(inside: str) -> None:
    """Notes unpickling, started processes, and what is written other than below a directory."""

    def is_outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        where, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        real = os.path.realpath(where)
        return not f"{real}/{name}/".startswith(f"{inside}/") and real != "/dev"

    def hook(event: str, arguments: tuple) -> None:
        if event == "pickle.find_class" or event in ("os.system", "subprocess.Popen", "os.exec"):
            _events.append(f"crashes: {event} {arguments}")
        elif event == "open":
            path, mode, flag = arguments
            writes = isinstance(flag, int) and flag & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not isinstance(path, int) and is_outside(path):
                _events.append(f"writes outside: opened {path!r} with {mode!r}")
        elif event in _WRITES and any(map(is_outside, _paths(event, arguments))):
            _events.append(f"writes outside: {event} {arguments}")

    sys.addaudithook(hook)


def _paths(event: str, arguments: tuple) -> tuple:
    """The paths that are written to, one that is relative to an open directory as a whole."""
    if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
        return (os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), arguments[0]),)
    return arguments[event == "os.symlink" :]


class Cases:
    """Runs cases in this process, each in an empty directory beside a secret."""

    def __init__(self, seed: int):
        os.environ["JAX_PLATFORMS"] = "cpu"
        from hostile_files import SECRET, TARGETS

        from music_jax.errors import MusicError

        self._targets, self._secret, self._error = TARGETS, SECRET, MusicError
        self._seed = seed
        self._met: set[str] = set()
        self._guarded = False
        self._base = pathlib.Path(os.path.realpath(tempfile.mkdtemp(prefix="fuzz-")))
        self._outside = self._base / "outside"
        self._outside.mkdir()
        (self._outside / "secret.png").write_bytes(SECRET)

    def run(self, target: str, case: int, *, show: bool = False) -> tuple[str, str]:
        """Returns the outcome and a message about it."""
        if self._guarded and target not in self._met:
            self._met.add(target)
            self.run(target, -1)  # imports, and makes what is kept
            self._limit_memory()
        directory = self._base / "case"
        directory.mkdir()
        rng = random.Random(f"{self._seed}/{target}/{case}")
        _events.clear()
        outcome, told = "accepted", ""
        try:
            self._targets[target](rng, directory)
        except self._error as error:
            outcome, told = "clear errors", str(error)
            if "memory" in told.lower() and "alloc" in told.lower():
                outcome = "crashes"
        except BaseException as error:
            outcome, told = "crashes", f"{type(error).__name__}: {error}"
        if show and outcome == "crashes":
            traceback.print_exc()
        if not self._nothing_written():
            outcome, told = "writes outside", f"{sorted(self._base.rglob('*'))[:9]}"
        if _events:
            outcome, _, told = _events[0].partition(": ")
        if not show:
            shutil.rmtree(directory)
        return outcome, told

    def _nothing_written(self) -> bool:
        return (
            os.listdir(self._outside) == ["secret.png"]
            and len(os.listdir(self._base)) == 2
            and (self._outside / "secret.png").read_bytes() == self._secret
        )

    def guard(self) -> None:
        """Limits the memory and watches files from now on."""
        self._guarded = True
        _audit(str(self._base / "case"))

    def _limit_memory(self) -> None:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        held = pages * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))

    def close(self) -> None:
        shutil.rmtree(self._base)


def work(seed: int) -> None:
    """Reads cases from standard input, a line each, and answers each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    cases = Cases(seed)
    cases.guard()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        target, case = json.loads(line)
        print(json.dumps(cases.run(target, case)), file=answers, flush=True)
    cases.close()


class Worker:
    """A process that runs cases; it is replaced when it dies or does not answer."""

    def __init__(self, seed: int):
        self._seed = seed
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", f"--seed={self._seed}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": _TEMPORARY},
        )
        if self._process.stdout.readline() != b"ready\n":
            raise SystemExit("a worker does not start; run one case with --case to see why")

    def run(self, target: str, case: int) -> tuple[str, str]:
        self._process.stdin.write(json.dumps([target, case]).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], HANG_SECONDS)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return tuple(json.loads(line))
        self._process.kill()
        code = self._process.wait()
        self._start()
        return ("crashes", f"the worker ended with {code}") if ready else ("hangs", "no answer")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


_TEMPORARY = tempfile.gettempdir()


def campaign(cases: int, seed: int, targets: list[str]) -> dict[str, collections.Counter]:
    """Runs a number of cases, divided among the targets, and prints those that fail."""
    from hostile_files import SHARES

    whole = sum(SHARES[target] for target in targets)
    rows = {target: collections.Counter() for target in targets}
    worker = Worker(seed)
    with tqdm.tqdm(total=cases, unit="case", mininterval=0.2 if sys.stderr.isatty() else 30) as bar:
        for target in targets:
            bar.set_description(target)
            for case in range(-int(-cases * SHARES[target] // whole)):
                outcome, told = worker.run(target, case)
                rows[target][outcome] += 1
                if outcome not in OUTCOMES[:2]:
                    bar.write(f"{target} {case}: {outcome}: {told[:300]}", file=sys.stdout)
                bar.update(1)
    worker.close()
    return rows


def table(rows: dict[str, collections.Counter]) -> str:
    lines = [f"{'target':14s} {'cases':>7s}" + "".join(f" {name:>14s}" for name in OUTCOMES)]
    for target, row in {**rows, "all": sum(rows.values(), collections.Counter())}.items():
        counts = "".join(f" {row[name]:14d}" for name in OUTCOMES)
        lines.append(f"{target:14s} {sum(row.values()):7d}{counts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="of these alone, separated by commas")
    parser.add_argument("--case", type=int, help="this one case of one target, with its traceback")
    parser.add_argument("--json", type=pathlib.Path, help="where the counts go, too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.seed)
    if options.case is not None:
        return print(*Cases(options.seed).run(options.target, options.case, show=True))
    from hostile_files import TARGETS

    targets = options.target.split(",") if options.target else list(TARGETS)
    rows = campaign(options.cases, options.seed, targets)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row[name] for row in rows.values() for name in OUTCOMES[2:]))


if __name__ == "__main__":
    main()
