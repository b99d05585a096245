"""Measures the cost of the guards: a step with all, with those of the loss alone, and with none.

    python tests/benchmarks/guards.py --config=configs/mnist5k.py --pairs=40
    python tests/benchmarks/guards.py --config=configs/mnist5k.py --segments=102 --units=80

The three are compiled once, then take turns in a random order on the same batch. Ratios are of one
turn's times: their median, and its 95 % interval by bootstrap.
"""

import argparse
import json
import pathlib
import random
import runpy
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.train import guards, step
from music_jax.train.recipe import make_recipe
from music_jax.train.state import init_state
from music_jax.train.step import compile_step

STEPS_PER_EPOCH = 100


def no_watch(_, state, *__):
    """In place of `guards.watch`: every update is made."""
    return jnp.asarray(True), state


class Variant:
    """A compiled step, its state, and its times."""

    def __init__(self, config, batch, mesh, *, enabled, watched=True):
        with config.unlocked():
            config.guards.enabled = enabled
        recipe = make_recipe(config, STEPS_PER_EPOCH)
        step._jit_shared_step.cache_clear()  # Variants of one recipe would share their program.
        self.state = init_state(config, recipe.optimizer, mesh)
        self.step, self.batch = compile_step(recipe, self.state, mesh), batch
        self.seconds: list[float] = []
        watch = guards.watch if watched else no_watch
        with mock.patch.object(guards, "watch", watch):
            self.take()
        self.take()
        self.seconds.clear()

    def take(self):
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.step(self.state, *self.batch))
        self.seconds.append(time.perf_counter() - start)


def ratio(variant, base, rng):
    """Median of the paired ratios, and its 95 % interval."""
    ratios = np.array(variant.seconds) / np.array(base.seconds)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.median(ratios)), *(float(q) for q in np.quantile(medians, (0.025, 0.975)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=pathlib.Path, default="configs/mnist5k.py")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch", type=int, help="in place of the config's")
    parser.add_argument("--segments", type=int)
    parser.add_argument("--units", type=int)
    parser.add_argument("--objective", default="music")
    options = parser.parse_args()

    config = runpy.run_path(str(options.config))["get_config"]()
    config.objective.name = options.objective
    config.batch_size = options.batch or config.batch_size
    config.objective.num_segments = options.segments or config.objective.num_segments
    config.objective.units_per_segment = options.units or config.objective.units_per_segment
    mesh = make_data_mesh()
    rng, size = np.random.default_rng(0), config.crop.size
    shape = (config.batch_size, 2, size, size, config.dataset.num_channels)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    index = np.arange(config.batch_size, dtype=np.uint32)
    batch = jax.device_put((images, index), batch_sharding(mesh))

    variants = {
        "default": Variant(config, batch, mesh, enabled=True),
        "finite only": Variant(config, batch, mesh, enabled=False),
        "none": Variant(config, batch, mesh, enabled=False, watched=False),
    }
    for _ in range(options.pairs):
        for name in random.sample(list(variants), len(variants)):
            variants[name].take()
    base = variants["none"]
    dim = config.objective.num_segments * config.objective.units_per_segment
    print(f"{options.objective}, batch {config.batch_size}, embedding {dim}, {mesh.size} device(s)")
    for name, variant in variants.items():
        middle, low, high = ratio(variant, base, rng)
        record = {
            "guards": name,
            "milliseconds": round(1000 * float(np.median(variant.seconds)), 2),
            "ratio": round(middle, 4),
            "interval": [round(low, 4), round(high, 4)],
        }
        print(json.dumps(record))


if __name__ == "__main__":
    main()
