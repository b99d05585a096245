"""Injects faults into real runs and reports which runs recovered.

    python tests/faults.py --kills=50 --seed=0

Each fault is done to real processes and real files; then the same command is run again to the end.
A fault is survived if the final parameters, statistics and optimizer are byte for byte those of a
run that nothing happened to (on another topology: if the losses agree to 1e-5) and metrics.jsonl
has each step once. Ends with exit code 1 if anything was lost. With --directory=DIR a campaign that
was cut off goes on where it was.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import tqdm
from damages import CHECKPOINT_DAMAGES, FILE_DAMAGES, newest_checkpoint
from fault_runs import PATIENCE, STEPS, LostError, Workshop, expect, reaches

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOMENTS = ("start-up", "step", "save", "any", "evaluation")
TOPOLOGIES = (  # devices, processes, before and after
    ((1, 1), (2, 1)),
    ((1, 1), (4, 1)),
    ((4, 1), (1, 1)),
    ((1, 2), (1, 1)),
    ((1, 1), (1, 2)),
    ("bfloat16", "float32"),
)


def kills(shop: Workshop, index: int, rng: random.Random) -> list[str]:
    """Kills one run with SIGKILL at each moment in turn, then resumes it to the end."""
    run, survived = shop.new(), []
    for moment in MOMENTS[: shop.counts["kills"] - index * len(MOMENTS)]:
        process = run.start()
        while not shop.wait_for(run, process, moment, rng):
            process.communicate()
            shop.judge(run)  # it came to its end before
            run = shop.new()
            process = run.start()
        process.kill()
        process.communicate()
        survived.append(f"SIGKILL, {moment}")
    shop.judge(run)
    return survived


def stops(shop: Workshop, index: int, rng: random.Random) -> list[str]:
    """A signal at any moment ends the run with 75, saved; a second one ends it at once."""
    moments = ("start-up", "step", "save", "last save", "evaluation")
    moment, number = moments[index % len(moments)], SIGNALS[index % len(SIGNALS)]
    twice = index % 4 == 3
    while True:
        run = shop.new()
        process = run.start()
        alive = shop.wait_for(run, process, moment, rng)
        process.send_signal(number)
        if twice:
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(number)
        began = time.monotonic()
        _, err = process.communicate(timeout=PATIENCE)
        if process.returncode != 0 or (alive and moment != "evaluation"):
            break
        shop.judge(run)  # it came to its end before
    codes = (75, 128 + number) if twice else (75,)
    expect(process.returncode in codes, f"{moment}: exit code {process.returncode}: {err[-800:]}")
    shop.waited = time.monotonic() - began
    shop.judge(run)
    return [f"{number.name}{' twice' if twice else ''}, {moment}"]


def damages(shop: Workshop, index: int, rng: random.Random) -> list[str]:
    """Damages the newest checkpoint in each way: it is detected, reported and quarantined."""
    kind = list(CHECKPOINT_DAMAGES)[index % len(CHECKPOINT_DAMAGES)]
    run = shop.copy_of(shop.stopped())
    newest = newest_checkpoint(run.workdir)
    CHECKPOINT_DAMAGES[kind](newest, rng)
    out = shop.judge(run)
    said = f"the checkpoint of step {newest.name} is damaged"
    if "temporary" in kind:
        said = "which an interrupted run left unfinished"
    else:
        expect((run.workdir / "damaged" / newest.name).is_dir(), "not quarantined")
    expect(said in out, f"nothing said of it: {out[-800:]}")
    return [f"damage: {kind}"]


def files(shop: Workshop, index: int, rng: random.Random) -> list[str]:
    """Damages another file of the workdir, or every checkpoint."""
    names = ("lock", "metrics.jsonl", "linear_eval.json", "all checkpoints", "compilation_cache")
    name = names[index % len(names)]
    kind = list(FILE_DAMAGES)[index % len(FILE_DAMAGES)]
    run = shop.copy_of(shop.undisturbed if name == "linear_eval.json" else shop.stopped())
    if name == "all checkpoints":
        run.workdir.joinpath("kept").mkdir()
        for step in [p for p in (run.workdir / "checkpoints").iterdir() if p.name.isdigit()]:
            shutil.copytree(step, run.workdir / "kept" / step.name)
            CHECKPOINT_DAMAGES["flipped bytes"](step, rng)
        _, err = run.finish(expected=2)
        expect("no checkpoint in" in err and "Traceback" not in err, err[-800:])
        shutil.rmtree(run.workdir / "checkpoints")
        (run.workdir / "kept").rename(run.workdir / "checkpoints")
        shop.judge(run)
    elif name == "compilation_cache":
        run = shop.new()
        run.programs = None
        run.stop_at(STEPS // 2)
        for path in (run.cache / "music_jax" / "compiled").iterdir():
            FILE_DAMAGES[kind](path, rng)
        expect("compiling again" in shop.judge(run), "nothing said of it")
    elif name == "metrics.jsonl":
        lines = (run.workdir / name).read_bytes().splitlines(keepends=True)
        lines[3] = b"\xff{" + lines[3][2:]
        (run.workdir / name).write_bytes(b"".join(lines))
        expect("1 damaged" in shop.judge(run, missing_steps={4}), "nothing said of it")
    else:
        (run.workdir / name).write_bytes(rng.randbytes(100))
        shop.judge(run)
    return [f"damage: {name}"]


def full_disks(shop: Workshop, index: int, rng: random.Random) -> list[str]:
    """Fills the disk at some step, and frees it later."""
    goes_on = index % 2 == 1
    run = shop.new("--config.checkpoint.ignore_failed_saves" if goes_on else "")
    run.workdir.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(run.workdir)]
    subprocess.run(mount, check=True)
    try:
        process = run.start()
        reaches(run, process, rng.randrange(9, STEPS - 20))
        filler = run.workdir / "filler"
        fill(filler)
        said = ""
        while goes_on and "could not save" not in said and (line := process.stdout.readline()):
            said += line
        if goes_on:
            filler.unlink()
        out, err = process.communicate(timeout=PATIENCE)
        said += out + err
        expect(process.returncode == (0 if goes_on else 2), f"{process.returncode}: {said[-800:]}")
        expect("Traceback" not in said and "No space left" in said, said[-800:])
        filler.unlink(missing_ok=True)
        shop.judge(run, missing_steps=set(range(1, STEPS)) if goes_on else set())
    finally:
        subprocess.run(["umount", "-l", str(run.workdir)], check=False)
    return [f"full disk, {'going on' if goes_on else 'stopping'}"]


def fill(filler: pathlib.Path) -> None:
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 20)):
                pass
        except OSError:
            pass


def topologies(shop: Workshop, index: int, rng: random.Random) -> list[str]:
    """Stops a run and resumes it on other devices and processes: the losses agree to 1e-5."""
    before, after = TOPOLOGIES[index % len(TOPOLOGIES)]
    stop = rng.randrange(2, STEPS - 24)
    if before == "bfloat16":
        run = shop.new("--config.compute_dtype=bfloat16", slow=True)
        run.stop_at(stop)
        other = shop.copy_of(run, devices=2)
        run.options = other.options = [o for o in run.options if "compute_dtype" not in o]
        run.finish()
        expected, name = run.losses(), "bfloat16 to float32"
        run = other
    else:
        run = shop.new(slow=True, devices=before[0], processes=before[1])
        run.stop_at(stop)
        run.devices, run.processes = after
        expected = shop.straight().losses()
        name = "{} x {} to {} x {} devices x processes".format(*before, *after)
    run.finish()
    expect(run.logged() == list(range(1, STEPS + 1)), f"steps {run.logged()}")
    difference = np.max(np.abs(np.divide(run.losses(), expected) - 1))
    expect(difference <= 1e-5, f"losses differ by {difference:.1e}")
    if before == (1, 2):  # what several processes have saved, on one CPU
        run.evaluate()
    return [name]


def peers(shop: Workshop, index: int, rng: random.Random) -> list[str]:
    """Kills one of two processes: the other ends within two minutes, and both resume."""
    victim = index % 2
    run = shop.new(processes=2)
    processes = run.start_all()
    reaches(run, processes[0], rng.randrange(2, STEPS - 4))
    processes[victim].kill()
    began = time.monotonic()
    other = processes[1 - victim]
    try:
        _, err = other.communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    shop.waited = time.monotonic() - began
    expect(other.returncode == 1, f"exit code {other.returncode}: {err[-800:]}")
    told = "another process of the run does not answer"
    expect(told in err, f"nothing said of it: {err[-2000:]}")
    shop.judge(run)
    return [f"process {victim} of 2 killed"]


FAULTS = {
    "kills": kills,
    "stops": stops,
    "damages": damages,
    "files": files,
    "full_disks": full_disks,
    "topologies": topologies,
    "peers": peers,
}
COUNTS = {
    "kills": 50,
    "stops": 20,
    "damages": 30,
    "files": 5,
    "full_disks": 10,
    "topologies": 6,
    "peers": 4,
}


def table(results: list[dict]) -> str:
    """Returns a table of the faults: tried, recovered, lost, and the longest wait for an end."""
    rows: dict[str, list[dict]] = {}
    for result in results:
        rows.setdefault(result["fault"], []).append(result)
    lines = [f"{'fault':44s} {'tried':>5s} {'survived':>8s} {'lost':>4s} {'ended within':>12s}"]
    for fault, tried in [*sorted(rows.items()), ("all", results)]:
        good = sum(result["survived"] for result in tried)
        waits = [result["seconds_to_end"] for result in tried if result["seconds_to_end"]]
        wait = f"{max(waits):.1f} s" if waits else ""
        lines.append(f"{fault:44s} {len(tried):5d} {good:8d} {len(tried) - good:4d} {wait:>12s}")
    return "\n".join(lines)


def try_fault(shop: Workshop, seed: int, kind: str, index: int) -> list[dict]:
    """Applies one fault, or several to one run; returns the outcomes."""
    shop, why = shop.bench(), ""
    try:
        faults = FAULTS[kind](shop, index, random.Random(f"{seed}/{kind}/{index}"))
    except (LostError, OSError, ValueError, subprocess.SubprocessError) as error:
        faults, why = [kind], f"{type(error).__name__}: {error}"
        tqdm.tqdm.write(f"LOST {kind} {index}: {why}")
    shop.tidy()
    outcome = {"kind": kind, "index": index, "survived": not why, "why": why}
    return [outcome | {"seconds_to_end": shop.waited, "fault": fault} for fault in faults]


def run_campaign(
    directory: pathlib.Path, seed: int, counts: dict[str, int], jobs: int = 1
) -> list[dict]:
    """Applies the missing faults and returns the results of all."""
    file = directory / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(result["kind"], result["index"]) for result in results}
    trials = {kind: range(count) for kind, count in counts.items()}
    trials["kills"] = range(-(-counts["kills"] // len(MOMENTS)))
    todo = [(kind, i) for kind, indices in trials.items() for i in indices]
    todo = [trial for trial in todo if trial not in done]
    if not todo:
        return results
    random.Random(seed).shuffle(todo)  # so that the time left is told well
    shop = Workshop(directory, counts)
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        tqdm.tqdm(total=len(todo) + len(done), initial=len(done)) as bar,
        open(file, "a") as log,
    ):
        trying = [pool.submit(try_fault, shop, seed, *trial) for trial in todo]
        for future in concurrent.futures.as_completed(trying):
            new = future.result()
            results += new
            log.write("".join(json.dumps(result) + "\n" for result in new))
            log.flush()
            bar.update()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=count, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--directory", type=pathlib.Path, help="of the campaign; kept")
    parser.add_argument("--json", type=pathlib.Path, help="where to write each fault's outcome")
    options = parser.parse_args()
    counts = {name: getattr(options, name) for name in COUNTS}
    if counts["full_disks"] and os.geteuid() != 0:
        print("no full disks: mounting a tmpfs needs root", file=sys.stderr)
        counts["full_disks"] = 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or pathlib.Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        results = run_campaign(directory.resolve(), options.seed, counts, options.jobs)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(not all(result["survived"] for result in results))


if __name__ == "__main__":
    main()
