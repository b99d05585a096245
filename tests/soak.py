"""A long training with many checkpoints, watched: do its memory and its open files stay flat?

    python tests/soak.py --minutes=60 --output=soak

A real process trains on the digits and saves every --every-steps, by default about once a minute,
until a SIGTERM ends it. (Each save leaves some 50 kB to TensorStore, see docs/troubleshooting.md.)
Resident memory, open files, threads and children of it and all below it are sampled and written
to OUTPUT/samples.csv as they come; OUTPUT/result.json has the verdict, OUTPUT/log.txt what the run
printed. Ends with exit code 1 if anything grew:

- memory, if the line through its samples after the warm-up (Theil and Sen's, which no outlier
  bends) rises by more than --tolerance of their median from its begin to its end;
- open files, threads, children and entries of the workdir, if fewer of them were ever there at once
  in the first quarter after the warm-up than in the last: what leaks never goes away again.
"""

import argparse
import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import tqdm
from processes import DIGITS, ROOT, metrics

COUNTED = ("open_files", "threads", "children", "workdir_entries")
CONFIG = (
    DIGITS,
    "--config.num_epochs=1000000",
    "--config.log_every_steps=1",
    "--config.batch_size=32",
    "--config.crop.size=8",
    "--config.crop.eval_resize=8",
    "--config.objective.num_segments=8",
    "--config.objective.units_per_segment=8",
    "--config.optimizer.base_learning_rate=1e-5",
)


def start(output: pathlib.Path, every_steps: int, core: int | None) -> subprocess.Popen:
    """The run, on one core if its number is given, with all that it prints in a file."""
    command = [sys.executable, "-m", "music_jax.main", *CONFIG]
    command += [f"--config.checkpoint.every_steps={every_steps}", f"--workdir={output / 'run'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with (output / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    if core is not None:
        os.sched_setaffinity(process.pid, [core])
    return process


def sample(process: psutil.Process, workdir: pathlib.Path) -> dict[str, int]:
    """Returns the current memory, open files and threads of a process and its children."""
    children = process.children(recursive=True)
    found = {"rss": 0, "open_files": 0, "threads": 0, "children": len(children)}
    for each in (process, *children):
        try:
            with each.oneshot():
                values = each.memory_info().rss, each.num_fds(), each.num_threads()
        except psutil.NoSuchProcess:
            continue
        for name, value in zip(("rss", "open_files", "threads"), values, strict=True):
            found[name] += value
    found["workdir_entries"] = _entries(workdir)
    found["step"] = last_step(workdir)
    return found


def _entries(workdir: pathlib.Path) -> int:
    """Files and folders of the workdir, each checkpoint as one: how many it has inside varies."""
    checkpoints = workdir / "checkpoints"
    return sum(
        len(folders) + len(files)
        for at, folders, files in os.walk(workdir)
        if checkpoints not in pathlib.Path(at).parents
    )


def last_step(workdir: pathlib.Path) -> int:
    """Returns the last logged step; reads only the end of the file."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return 0


def judge(samples: list[dict], warm_up: float, tolerance: float) -> dict[str, dict]:
    """Returns the growth of each quantity after the warm-up, and whether it is flat.

    Args:
      samples: with `seconds` and the quantities.
      warm_up: samples from before this second do not count.
      tolerance: by how much of its median memory may rise from begin to end.
    """
    kept = [each for each in samples if each["seconds"] >= warm_up]
    if len(kept) < 8:
        raise SystemExit(f"only {len(kept)} samples after the warm-up; soak for longer")
    seconds = np.array([each["seconds"] for each in kept])
    memory = np.array([each["rss"] for each in kept], float)
    first, second = np.triu_indices(len(kept), 1)
    slope = float(np.median((memory[second] - memory[first]) / (seconds[second] - seconds[first])))
    share = slope * float(seconds[-1] - seconds[0]) / float(np.median(memory))
    found = {
        "rss": {
            "median_mib": float(np.median(memory)) / 2**20,
            "mib_per_hour": slope * 3600 / 2**20,
            "growth_share": share,
            "flat": bool(share <= tolerance),
        }
    }
    quarter = len(kept) // 4
    for name in COUNTED:
        before = min(each[name] for each in kept[:quarter])
        after = min(each[name] for each in kept[-quarter:])
        found[name] = {"before": before, "after": after, "flat": after <= before}
    return found


def table(result: dict[str, dict]) -> str:
    rss = result["rss"]
    memory = f"{rss['median_mib']:.1f} MiB, {rss['mib_per_hour']:+.2f} MiB an hour"
    rows = [("rss", f"{memory}, {rss['growth_share']:+.2%} in all", rss["flat"])]
    for name in COUNTED:
        row = result[name]
        rows.append((name, f"{row['before']} at least, then {row['after']}", row["flat"]))
    return "\n".join(f"{n:15s} {t:58s} {'flat' if ok else 'GROWS'}" for n, t, ok in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--warm-up-minutes", type=float, help="by default a sixth of all")
    parser.add_argument("--every-steps", type=int, default=1000, help="steps between two saves")
    parser.add_argument("--sample-seconds", type=float, default=5)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--core", type=int, help="the only core that the run may use")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    output = options.output.resolve()
    warm_up = options.warm_up_minutes
    warm_up = 60 * (options.minutes / 6 if warm_up is None else warm_up)

    samples = []
    process = start(output, options.every_steps, options.core)
    bar = tqdm.tqdm(
        total=round(60 * options.minutes),
        unit="s",
        desc="soaking",
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
    try:
        watched = psutil.Process(process.pid)
        with (output / "samples.csv").open("w", newline="") as file, bar:
            began = time.monotonic()
            writer = None
            while (elapsed := time.monotonic() - began) < 60 * options.minutes:
                if process.poll() is not None:
                    raise SystemExit(f"the run ended: {(output / 'log.txt').read_text()[-2000:]}")
                now = {"seconds": round(elapsed, 1)} | sample(watched, output / "run")
                samples.append(now)
                writer = writer or csv.DictWriter(file, now)
                if len(samples) == 1:
                    writer.writeheader()
                writer.writerow(now)
                file.flush()
                bar.set_postfix(step=now["step"], mib=now["rss"] >> 20, refresh=False)
                bar.update(round(elapsed) - bar.n)
                time.sleep(options.sample_seconds)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=300)
    finally:
        process.kill()
    steps = [line["step"] for line in metrics(output / "run")]
    result = {
        "minutes": options.minutes,
        "warm_up_minutes": warm_up / 60,
        "samples": len(samples),
        "steps": steps[-1],
        "checkpoints": steps[-1] // options.every_steps,
        "exit_code": code,
        **judge(samples, warm_up, options.tolerance),
    }
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['steps']} steps and {result['checkpoints']} checkpoints in {options.minutes} min"
    )
    print(table(result))
    flat = all(result[name]["flat"] for name in ("rss", *COUNTED))
    sys.exit(not (flat and code == 75 and steps == list(range(1, steps[-1] + 1))))


if __name__ == "__main__":
    main()
