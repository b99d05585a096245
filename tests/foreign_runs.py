"""Runs the commands on run directories from untrusted sources.

    python tests/foreign_runs.py --count=1000 --seed=0
    python tests/foreign_runs.py --case=12 --seed=0    (once more, with its tracebacks)

Trains one tiny run, changes copies of it in the ways of `foreign_mutations.py`, and has each
reported, evaluated, exported, loaded and encoded with. Each must end in acceptance or in one line
of error. It fails if anything was written outside the run and the places that were named, a
process was started, a module of the run imported, the network looked for, or a place was read that
only the run's files name. Runs without a network where the system allows it.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import random
import resource
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

import tqdm

ROOT = pathlib.Path(__file__).parents[1]
HANG_SECONDS = 300  # of all commands on one run
CASES_A_PROCESS = 100  # what JAX keeps compiled grows with each
MEMORY = 4 * 2**30  # beside what a worker holds before it begins
COMMANDS = ("report", "evaluate", "export", "load", "encode")
OUTCOMES = ("accepted", "clear errors", "wrong")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate")

_events: list[str] = []


def watch(base: pathlib.Path) -> None:
    """Records forbidden actions of commands in `_events` from now on."""
    run, outside = str(base / "run"), str(base / "outside")
    allowed = [str(base / name) for name in ("run", "output", "temporary", "cache")]

    def below(path: str, folders: list[str]) -> bool:
        return any(f"{path}/".startswith(f"{folder}/") for folder in folders)

    def real(path: object, folder: int = -1) -> str | None:
        """Where a name lies, in an open folder or not; the listing tells what it leads to."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        start = os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        where, name = os.path.split(os.path.normpath(os.path.join(start, os.fsdecode(path))))
        return f"{os.path.realpath(where)}/{name}"

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith((*PROCESSES, *NETWORK)) or event == "pickle.find_class":
            _events.append(f"{event} {str(arguments)[:200]}")
        elif event == "open":
            path, _, flags = arguments
            where = real(path)
            if where is None:
                return
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not below(where, [*allowed, "/dev"]):
                _events.append(f"wrote {path!r}")
            if below(os.path.abspath(os.fsdecode(path)), [outside]):
                _events.append(f"read {path!r}")
            if below(where, [f"{run}/compilation_cache", f"{run}/compiled", f"{run}/.cache"]):
                _events.append(f"read a program {path!r}")
        elif event in ("os.listdir", "os.scandir"):
            if not isinstance(arguments[0], int | None) and below(
                os.path.abspath(os.fsdecode(arguments[0])), [outside]
            ):
                _events.append(f"listed {arguments[0]!r}")
        elif event in WRITES:
            folder = -1 if event == "os.truncate" else arguments[-1]
            # What a link leads to, which comes first, is not written.
            for path in arguments[event == "os.symlink" :]:
                where = real(path, folder)
                if where is not None and not below(where, allowed):
                    _events.append(f"{event} {path!r}")
        elif event == "exec" and below(getattr(arguments[0], "co_filename", ""), [run]):
            _events.append(f"ran {arguments[0].co_filename!r}")
        elif event == "ctypes.dlopen" and below(str(arguments[0]), [run]):
            _events.append(f"loaded {arguments[0]!r}")

    platform.uname().processor  # noqa: B018  (a library asks for it, which starts `uname` once)
    sys.addaudithook(hook)


def paths(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder and all that lies below it, however deep; `rglob` recurses."""
    remaining = [folder]
    while remaining:
        path = remaining.pop()
        yield path
        if path.is_dir() and not path.is_symlink():
            remaining += path.iterdir()


def listing(*folders: pathlib.Path) -> dict[str, tuple]:
    """Type, size, time and content of all that lies below some folders."""
    found = {}
    for folder in folders:
        for path in paths(folder):
            status = path.lstat()
            content = ""
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


def prepare(base: pathlib.Path) -> None:
    """Trains the run `real`, and writes files of the user: `outside`, `home`, `tfds`, `images`."""
    import cv2
    import numpy as np
    from processes import DIGITS, SMALL, run

    for name in ("outside/images/a", "home", "images/a", "temporary", "cache"):
        (base / name).mkdir(parents=True)
    for folder in ("outside/images/a", "images/a"):
        for i in range(3):
            cv2.imwrite(str(base / folder / f"{i}.png"), np.full((9, 9), 40 * i, np.uint8))
    (base / "outside" / "secret").write_text("not to be read or written\n")
    code, _, err = run(
        "music_jax.main",
        *(DIGITS, *SMALL, f"--config.dataset.data_dir={base / 'tfds'}"),
        f"--workdir={base / 'real'}",
    )
    if code != 0:
        raise SystemExit(f"the run cannot be trained: {err}")
    with (base / "real" / "skipped.jsonl").open("a") as file:
        file.write('{"source": "digits:train", "image": "5", "reason": "it is broken"}\n')
    (base / "real" / "rewinds.json").write_text('{"rewinds": [{"step": 3, "skipped": [2, 3]}]}\n')


class Cases:
    """Runs cases in this process."""

    def __init__(self, base: pathlib.Path, seed: int):
        import jax
        import numpy as np

        import music_jax
        from music_jax.data.datasets import open_path
        from music_jax.distributed.progress import log_to_stdout
        from music_jax.evaluate import evaluate
        from music_jax.exchange.encoder import Encoder, load_backbone
        from music_jax.exchange.folder_encoding import encode_folder
        from music_jax.export import export
        from music_jax.report.page import write_report

        jax.config.update("jax_platforms", "cpu")
        log_to_stdout()  # as the commands do
        self._base, self._seed = base, seed
        run, output = str(base / "run"), base / "output"
        data = {"dataset.data_dir": str(base / "tfds")}

        def encode() -> None:
            encoder = Encoder(load_backbone(run))
            encode_folder(encoder, open_path(str(base / "images")), str(output / "features.npy"))

        # Half of the runs are given the place of the images, the others have to do without.
        self._commands: dict[str, Callable[[dict[str, object]], object]] = {
            "report": lambda given: write_report([run], num_images=16, overrides=given),
            "evaluate": lambda given: evaluate(
                run, protocols=("knn",), overrides=given, force=True
            ),
            "export": lambda _: export(run, form="safetensors", output=str(output / "x")),
            "load": lambda _: music_jax.load(run)(np.zeros((2, 8, 8, 1), np.uint8)),
            "encode": lambda _: encode(),
        }
        self._given = (data, {})

    def run(self, case: int | None, *, show: bool = False) -> dict:
        """The mutations of a case, each command's outcome, and what was wrong; None: unchanged."""
        from foreign_mutations import Place, mutate

        place = Place(self._base / "run", self._base / "outside")
        for name in ("run", "output"):
            remove(self._base / name)
        shutil.copytree(self._base / "real", place.run)
        (self._base / "output").mkdir()
        rng = random.Random(f"{self._seed}/{case}")
        mutations = [] if case is None else mutate(rng, place)
        given = self._given[0 if case is None else rng.randrange(2)]
        users = [self._base / name for name in ("outside", "home", "tfds", "images")]
        before, outcomes, wrong = listing(*users), {}, []
        for name, command in self._commands.items():
            _events.clear()
            outcome, told = self._outcome(command, given, show=show)
            told += [event for event in _events if case is not None]
            if listing(*users) != before:
                told.append("what is outside has changed")
                restore(self._base)
                before = listing(*users)
            outcomes[name] = "wrong" if told else outcome
            wrong += [f"{name}: {each}" for each in told]
        return {"mutations": mutations, "outcomes": outcomes, "wrong": wrong}

    def _outcome(
        self, command: Callable[[dict[str, object]], object], given: dict, *, show: bool
    ) -> tuple[str, list[str]]:
        from music_jax.distributed.progress import printable
        from music_jax.errors import MusicError

        outcome, told = "accepted", []
        with printed(self._base / "temporary" / "printed", show=show) as text:
            try:
                command(given)
            except MusicError as error:
                outcome = "clear errors"
                print(printable(f"error: {error}"), file=sys.stderr)
                if len(str(error)) > 2000:
                    told.append(f"an error of {len(str(error))} characters")
            except BaseException as error:
                told.append(f"{type(error).__name__}: {error}"[:300])
                traceback.print_exc()
        if "Traceback" in text[0] and not told:
            told.append(f"printed a traceback: {text[0].partition('Traceback')[2][:1500]}")
        if any(not (c.isprintable() or c in "\n\r\t ") for c in text[0]):
            told.append(f"printed control characters: {text[0]!r:.300}")
        return outcome, told

    def guard(self) -> None:
        """Runs every command once, then limits the memory and records forbidden actions."""
        self.run(None)
        held = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = held * os.sysconf("SC_PAGESIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        watch(self._base)


@contextlib.contextmanager
def printed(file: pathlib.Path, *, show: bool) -> Iterator[list[str]]:
    """Gives what this process, C++ included, prints within the block."""
    text = [""]
    if show:
        yield text
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(file, "w+b") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
        try:
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
            target.seek(0)
            text[0] = target.read().decode(errors="replace")


def remove(path: pathlib.Path) -> None:
    """Removes a directory however deep it is, which `shutil.rmtree` cannot."""
    subprocess.run(["rm", "-rf", path], check=True)


def restore(base: pathlib.Path) -> None:
    """Restores the files of the user."""
    for name in ("outside", "home", "tfds", "images"):
        remove(base / name)
        shutil.copytree(base / "kept" / name, base / name)


def work(base: pathlib.Path, seed: int) -> None:
    """Reads cases from standard input, a line each, and answers each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    cases = Cases(base, seed)
    cases.guard()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(cases.run(int(line))), file=answers, flush=True)


def environment(base: pathlib.Path) -> dict[str, str]:
    """That of a user to whom the run is foreign."""
    return os.environ | {
        "HOME": str(base / "home"),
        "JAX_COMPILATION_CACHE_DIR": str(base / "cache" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TMPDIR": str(base / "temporary"),
        "XDG_CACHE_HOME": str(base / "cache"),
        "XDG_STATE_HOME": str(base / "home" / "state"),
    }


class Worker:
    """A process that runs cases; it is replaced when it dies or does not answer."""

    def __init__(self, base: pathlib.Path, seed: int):
        self._base, self._seed = base, seed
        self._process: subprocess.Popen | None = None
        self._done = 0

    def run(self, case: int) -> dict:
        if self._process is None:
            self._start()
        assert self._process is not None
        self._process.stdin.write(f"{case}\n".encode())
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], HANG_SECONDS)
        line = self._process.stdout.readline() if ready else b""
        self._done += 1
        if line and self._done < CASES_A_PROCESS:
            return json.loads(line)
        self.close()
        if line:
            return json.loads(line)
        why = "the process died" if ready else f"no answer within {HANG_SECONDS} s"
        restore(self._base)
        return {"mutations": ["unknown"], "outcomes": {}, "wrong": [why]}

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"--work={self._base}", f"--seed={self._seed}"],
            cwd=ROOT,
            env=environment(self._base),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._done = 0
        if self._process.stdout.readline() != b"ready\n":
            raise SystemExit("a worker does not start; run one case with --case to see why")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def campaign(base: pathlib.Path, count: int, seed: int) -> dict[str, collections.Counter]:
    """Runs a number of cases and prints those that fail."""
    rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    worker = Worker(base, seed)
    for case in tqdm.trange(count, unit="run", mininterval=0.2 if sys.stderr.isatty() else 30):
        found = worker.run(case)
        for name in COMMANDS:
            rows[name][found["outcomes"].get(name, "wrong")] += 1
        for name in found["mutations"]:
            rows[f"({name})"]["wrong" if found["wrong"] else "accepted"] += 1
        if found["wrong"]:
            told = "; ".join(found["wrong"])[:600]
            tqdm.tqdm.write(f"{case} {found['mutations']}: {told}", file=sys.stdout)
    worker.close()
    return rows


def table(rows: dict[str, collections.Counter]) -> str:
    """Each command's outcomes, and in brackets each mutation's."""
    lines = [f"{'':18s} {'runs':>6s}" + "".join(f" {name:>13s}" for name in OUTCOMES)]
    for name, row in rows.items():
        counts = "".join(f" {row[outcome]:13d}" for outcome in OUTCOMES)
        lines.append(f"{name:18s} {sum(row.values()):6d}{counts}")
    return "\n".join(lines)


def without_network() -> None:
    """Restarts this program without network access, if the system allows it."""
    enter = ["unshare", "-n", "true"]
    if "MUSIC_JAX_OFFLINE" in os.environ or not shutil.which("unshare"):
        return
    if subprocess.run(enter, capture_output=True).returncode != 0:
        print("with a network: the system does not let this program do without", file=sys.stderr)
        return
    os.environ["MUSIC_JAX_OFFLINE"] = "1"
    os.execvp("unshare", ["unshare", "-n", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, with its tracebacks")
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        return work(options.work, options.seed)
    without_network()
    with tempfile.TemporaryDirectory(prefix="foreign-") as temporary:
        base = pathlib.Path(os.path.realpath(temporary))
        prepare(base)
        for name in ("outside", "home", "tfds", "images"):
            shutil.copytree(base / name, base / "kept" / name)
        if options.case is not None:
            os.environ.update(environment(base))
            cases = Cases(base, options.seed)
            cases.run(None)
            watch(base)
            print(json.dumps(cases.run(options.case, show=True), indent=1))
            return None
        rows = campaign(base, options.count, options.seed)
        for path in list(base.iterdir()):
            remove(path)  # The removal of a temporary directory recurses.
    print(table(rows))
    sys.exit(any(rows[name]["wrong"] for name in COMMANDS))


if __name__ == "__main__":
    main()
