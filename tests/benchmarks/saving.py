"""Measures how long a save blocks the training loop, compared with a step and a copy to the host.

    python tests/benchmarks/saving.py                      configs/mnist5k.py, 2 devices
    python tests/benchmarks/saving.py --config=imagenet --batch-size=4 --image-size=64

Takes steps as training does, all in one run; every so many, a save comes after a step as in the
loop. Prints medians over the saves: the bare copy of the state (numpy), what `Checkpoints.save`
took beyond it, in parts of a step, and how long the write behind it went on.
"""

import argparse
import json
import pathlib
import runpy
import tempfile
import time

import jax
import numpy as np
from etils import epath

from music_jax.checkpoint.manager import Checkpoints
from music_jax.data.order import TrainingOrder
from music_jax.distributed.mesh import Placing, make_data_mesh
from music_jax.train.recipe import make_recipe
from music_jax.train.state import init_state, save_state
from music_jax.train.step import compile_step

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def milliseconds(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="mnist5k", help="a file in configs/")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--devices", type=int, default=2, help="of a CPU")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--steps-between", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)

    config = runpy.run_path(str(CONFIGS / f"{options.config}.py"))["get_config"]()
    config.batch_size = options.batch_size or config.batch_size
    if options.image_size:
        config.crop.size = config.crop.eval_resize = options.image_size
    mesh = make_data_mesh()
    recipe = make_recipe(config, steps_per_epoch=100)
    state = init_state(config, recipe.optimizer, mesh)
    step = compile_step(recipe, state, mesh)
    size = config.crop.size
    shape = (config.batch_size, 2, size, size, config.dataset.num_channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    placing = Placing(config.batch_size, mesh)
    batch = [placing(images), placing(np.arange(config.batch_size, dtype=np.uint32))]
    order = TrainingOrder(config.batch_size * 100, config.batch_size, 0)
    jax.block_until_ready(step(jax.tree.map(jax.numpy.copy, state), *batch))

    steps, copies, saves, writes = [], [], [], []
    number = 0
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(epath.Path(directory))
        for _ in range(options.saves + 1):
            for _ in range(options.steps_between):
                began = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, *batch))
                steps.append(milliseconds(began))
                number += 1
            began = time.perf_counter()
            jax.tree.map(np.array, state)
            copies.append(milliseconds(began))
            began = time.perf_counter()
            save_state(checkpoints, number, state, order)
            saves.append(milliseconds(began))
            checkpoints.wait()  # so that no step shares the cores with a write
            writes.append(milliseconds(began))
        checkpoints.close()
    beyond = [save - copy for save, copy in zip(saves, copies, strict=True)][1:]
    found = {
        "state_mb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
        "step_ms": float(np.median(steps[1:])),
        "copy_ms": float(np.median(copies[1:])),
        "save_ms": float(np.median(saves[1:])),
        "beyond_the_copy_ms": float(np.median(beyond)),
        "write_ms": float(np.median(writes[1:])),
    }
    found["beyond_the_copy_in_steps"] = found["beyond_the_copy_ms"] / found["step_ms"]
    for name, value in found.items():
        print(f"{name:26s} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
