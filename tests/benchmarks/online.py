"""Measures the cost of the online measures, relative to training steps of the same process.

    python tests/benchmarks/online.py --config=configs/mnist5k.py --turns=10

In each turn some steps are trained, with the loader, then the backbone is measured with each set of
measures, in a random order. The share is that of the training's time with `online.every_steps` at
one epoch: the median over the turns, and its 95 % interval by bootstrap.
"""

import argparse
import json
import pathlib
import random
import runpy
import time

import jax
import numpy as np
from etils import epath

from music_jax.data import datasets
from music_jax.data.loader import TrainingOrder
from music_jax.data.skipped import UnlistedImages
from music_jax.distributed.mesh import make_data_mesh, shares_cores
from music_jax.evaluation.online import OnlineEvaluation
from music_jax.train.input import TrainingInput
from music_jax.train.recipe import make_recipe
from music_jax.train.state import init_state
from music_jax.train.step import compile_step

SETS = (("knn",), ("rankme",), ("lidar",), ("knn", "rankme"), ("knn", "rankme", "lidar"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=pathlib.Path, default="configs/mnist5k.py")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="trained in each turn")
    options = parser.parse_args()

    config = runpy.run_path(str(options.config))["get_config"]()
    datasets.prepare(config)
    source, mesh = datasets.training_source(config), make_data_mesh()
    order = TrainingOrder(len(source), config.batch_size, config.seed)
    recipe = make_recipe(config, order.steps_per_epoch)
    state = init_state(config, recipe.optimizer, mesh)
    step = compile_step(recipe, state, mesh)
    skipped = UnlistedImages(epath.Path("/nonexistent"), max_share=1.0)
    batches = TrainingInput(config, source, order, mesh, skipped).on_devices(0)
    evaluations = {}
    for measures in SETS:
        config.online.measures = measures
        evaluations[measures] = OnlineEvaluation(config, source, recipe.network, mesh, skipped)

    def train(count):
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, _ = step(state, *next(batches))
            if shares_cores(mesh):
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / count

    train(2)
    for evaluation in evaluations.values():  # which compiles
        evaluation(state.params, state.batch_stats)
    train(4)  # what the loader has read ahead in the meantime
    steps, seconds = [], {measures: [] for measures in SETS}
    for _ in range(options.turns):
        train(4)
        steps.append(train(options.steps))
        for measures in random.sample(SETS, len(SETS)):
            found = evaluations[measures](state.params, state.batch_stats)
            seconds[measures].append(found["online_seconds"])

    rng, steps = np.random.default_rng(0), np.array(steps)
    print(f"{len(source)} images, {order.steps_per_epoch} steps an epoch, {mesh.size} device(s)")
    for measures, times in seconds.items():
        in_steps = np.array(times) / steps
        shares = in_steps / (in_steps + order.steps_per_epoch)
        medians = np.median(rng.choice(shares, (2000, len(shares))), axis=1)
        record = {
            "measures": measures,
            "seconds": round(float(np.median(times)), 3),
            "in_steps": round(float(np.median(in_steps)), 2),
            "share_of_an_epoch": round(float(np.median(shares)), 4),
            "interval": [round(float(q), 4) for q in np.quantile(medians, (0.025, 0.975))],
        }
        print(json.dumps(record))


if __name__ == "__main__":
    main()
