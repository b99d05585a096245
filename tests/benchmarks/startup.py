"""Measures the time from the command to the end of the first step, by stage.

    python tests/benchmarks/startup.py                    configs/digits.py
    python tests/benchmarks/startup.py --config=imagenet --flags="--config.batch_size=8"

Runs `music_jax.main` in new processes that end after their first step. The first one compiles its
programs; the others read them from the cache, and the median of each of their stages is shown.
`clock` is in seconds by the clock, `cores` in seconds of the cores, which other programs disturb
less. For imagenet, a temporary folder of 16 JPEGs takes the place of the images.
"""

import argparse
import json
import os
import pathlib
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# Durations that JAX reports, of all programs, besides the stages.
PROGRAMS = {
    "/jax/core/compile/jaxpr_trace_duration": "programs: traced",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "programs: lowered",
    "/jax/core/compile/backend_compile_duration": "programs: compiled or read",
}


def run_stages(output: str) -> None:
    """Runs the command of `sys.argv` up to its first step, and writes the end of each stage."""
    from music_jax import cli

    ends: dict[str, tuple[float, float]] = {}
    programs = dict.fromkeys(PROGRAMS.values(), 0.0)

    def end(stage: str) -> None:
        ends.setdefault(stage, (time.time(), time.process_time()))

    def before(owner: Any, name: str, stage: str) -> None:
        original = getattr(owner, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            end(stage)
            return original(*arguments, **options)

        setattr(owner, name, marked)

    def count(event: str, seconds: float, **_: Any) -> None:
        if event in PROGRAMS:
            programs[PROGRAMS[event]] += seconds

    def finish(*_: Any, **__: Any) -> None:
        end("first step")
        pathlib.Path(output).write_text(json.dumps({"ends": ends, "programs": programs}))
        os._exit(0)

    def measured(main: Any) -> Any:
        def run() -> None:
            end("interpreter, flags, config")
            import jax

            from music_jax.train import failures, loop

            end("imports")
            jax.monitoring.register_event_duration_secs_listener(count)
            before(loop, "make_recipe", "workdir, dataset")
            before(loop, "_first_state", "checkpoints, recipe")
            init = loop._first_state
            loop._first_state = lambda *given: jax.block_until_ready(init(*given))
            before(loop, "_train", "initial state")
            before(failures.CheckedStep, "__call__", "first batch")
            loop.MetricLogger.write = finish
            main()

        return run

    original = cli.run
    cli.run = lambda main, *given, **options: original(measured(main), *given, **options)
    runpy.run_module("music_jax.main", run_name="__main__", alter_sys=True)


def measure(arguments: list[str], environment: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Returns the seconds of each stage of a new process, by the clock and of the cores."""
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/stages.json"
        command = [sys.executable, __file__, "--child", output, f"--workdir={folder}/run"]
        last = time.time(), 0.0
        subprocess.run(
            [*command, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        written = json.loads(pathlib.Path(output).read_text())
    stages = {}
    for stage, (clock, cores) in written["ends"].items():
        stages[stage] = clock - last[0], cores - last[1]
        last = clock, cores
    total = tuple(map(sum, zip(*stages.values(), strict=True)))
    programs = {name: (seconds, float("nan")) for name, seconds in written["programs"].items()}
    return stages | {"total": total} | programs


def write_images(folder: pathlib.Path) -> None:
    """Writes 16 JPEGs of noise in two classes."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(16):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (375, 500, 3), np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="digits", help="name of a file in configs/")
    parser.add_argument("--flags", default="", help="further flags of the command")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--config={options.config}", *shlex.split(options.flags)]
        if options.config.startswith("imagenet"):
            images = pathlib.Path(folder, "images")
            images.mkdir()
            write_images(images)
            arguments.append(f"--config.dataset.path={images}")
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        environment["XDG_CACHE_HOME"] = f"{folder}/cache"
        compiling = measure(arguments, environment)
        runs = [measure(arguments, environment) for _ in range(options.repeats)]
    medians = {
        stage: tuple(statistics.median(run[stage][i] for run in runs) for i in (0, 1))
        for stage in compiling
    }
    print(f"{options.config:28s}    compiling        compiled before")
    print(f"{'':28s} {'clock':>7s} {'cores':>7s}   {'clock':>7s} {'cores':>7s}")
    for stage, found in medians.items():
        cells = [f"{x:7.2f}" if x == x else " " * 7 for x in (*compiling[stage], *found)]
        print(f"{stage:28s} {cells[0]} {cells[1]}   {cells[2]} {cells[3]}")
    if options.json:
        options.json.write_text(json.dumps({"compiling": compiling, "compiled": medians}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        output = sys.argv[2]
        del sys.argv[1:3]
        run_stages(output)
    else:
        main()
