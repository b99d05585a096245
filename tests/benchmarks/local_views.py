"""Compares numbers of local views at equal compute.

    python tests/benchmarks/local_views.py --configs=shapes,mnist5k --counts=0,2,4 --seeds=3 \
        --output=local_views.jsonl

With local views a step costs more, so fewer epochs are trained: XLA's FLOPs of a step times the
number of epochs are the same in all runs of a config, to half an epoch. The warm-up is shortened
likewise; everything else is as in the config. The runs are those of `music_jax.main`. The results
are appended to a file of JSON lines; run again, the same command makes what is missing.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from ml_collections import config_dict

from music_jax.config import from_file
from music_jax.distributed.mesh import make_data_mesh
from music_jax.plan import programs
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state
from music_jax.train.step import crop_shapes, lower_step


def flops(config: config_dict.ConfigDict) -> float:
    """Returns the FLOPs of a training step, as XLA counts them."""
    recipe = make_recipe(config, steps_per_epoch=100)
    state = abstract_state(config, recipe.optimizer)
    compiled = lower_step(recipe, state, make_data_mesh(), crop_shapes(config)).compile()
    return programs.costs(compiled, programs.read(compiled))[0]


def run(name: str, overrides: dict[str, Any]) -> dict[str, float]:
    """Trains and probes in a new process, and returns the accuracies."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "music_jax.main", f"--config={name}"]
        command += [f"--workdir={folder}/run"]
        command += [f"--config.{field}={value}" for field, value in overrides.items()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        files = {"linear": "linear_eval.json", "knn": "knn.json"}
        return {
            metric: 100 * json.loads(pathlib.Path(folder, "run", file).read_text())["top1"]
            for metric, file in files.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default="shapes,mnist5k")
    parser.add_argument("--counts", default="0,2,4", help="numbers of local views, 0 first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="without local views; else the config's")
    parser.add_argument("--size", type=int, default=16, help="side of a local view in pixels")
    parser.add_argument("--scale", default="(0.2,0.5)", help="its share of the image's area")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    rows = []
    if options.output.exists():
        rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    for name in options.configs.split(","):
        cost = {}
        for count in map(int, options.counts.split(",")):
            config = from_file(name, local_views={"count": count, "size": options.size})
            cost[count] = flops(config)
            share = cost[0] / cost[count]
            epochs = round((options.epochs or config.num_epochs) * share)
            warmup = round(epochs * config.optimizer.warmup_epochs / config.num_epochs)
            overrides = {
                "local_views.count": count,
                "local_views.size": options.size,
                "local_views.scale": options.scale,
                "num_epochs": epochs,
                "optimizer.warmup_epochs": warmup,
            }
            for seed in range(options.seeds):
                wanted = {"config": name, **overrides, "seed": seed}
                if any(wanted.items() <= row.items() for row in rows):
                    continue
                row = wanted | {"gflop_per_step": cost[count] / 1e9}
                row |= run(name, {**overrides, "seed": seed})
                rows.append(row)
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
            mine = [row for row in rows if {"config": name, **overrides}.items() <= row.items()]
            for metric in ("linear", "knn"):
                found = [row[metric] for row in mine]
                spread = statistics.stdev(found) if len(found) > 1 else float("nan")
                print(
                    f"{name}, {count} local views, {epochs} epochs, {cost[count] / 1e9:.2f} GFLOP "
                    f"per step: {metric} {statistics.mean(found):.2f} ± {spread:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
