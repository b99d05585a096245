"""Measures a training step on the local devices, and compares it with the published peaks.

    python tests/benchmarks/step.py --config=configs/imagenet.py --batch=256,512 --json=step.json

For each global batch the step that a run takes is compiled, and taken on random images that are on
the devices already, `--steps` times one after another: a time is that of all of them, over their
number. Beside it stand the memory that XLA says the compiled program needs, the peak that the
device's allocator has seen, FLOPs and bytes as `music_jax.plan` counts them in the program (each
kernel's, as if nothing were found in a cache), and, for a chip that it knows (`--chip=h100`, or by
the device's name), the least time at its published peaks and the share of them that was reached.
"""

import argparse
import json
import os
import runpy
import statistics
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import numpy as np

from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.plan import programs
from music_jax.plan.chips import CHIPS
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state, init_state
from music_jax.train.step import crop_shapes, lower_step

STEPS_PER_EPOCH = 100


def measure(config: Any, chip: str | None, steps: int, turns: int) -> dict[str, Any]:
    """Returns one row of the table."""
    mesh = make_data_mesh(fsdp=config.sharding.fsdp)
    recipe = make_recipe(config, STEPS_PER_EPOCH)
    shapes = crop_shapes(config)
    lowered = lower_step(recipe, abstract_state(config, recipe.optimizer), mesh, shapes)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    program = programs.read(compiled)
    counted = programs.work(program)
    memory = compiled.memory_analysis()

    rng = np.random.default_rng(0)
    images = jax.tree.map(lambda x: rng.integers(0, 256, x.shape, np.uint8), shapes)
    index = np.arange(config.batch_size, dtype=np.uint32)
    batch = jax.device_put((images, index), batch_sharding(mesh))
    batch = (*batch, np.uint32(recipe.seed), np.float32(recipe.base_learning_rate))
    state = init_state(config, recipe.optimizer, mesh)
    seconds, losses = [], []
    for turn in range(turns + 1):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, *batch)
        losses.append(float(metrics["loss"]))
        if turn:  # the first warms up
            seconds.append((time.perf_counter() - start) / steps)
    step_seconds = statistics.median(seconds)
    device = mesh.devices.flat[0]
    row = {
        "device": device.device_kind,
        "devices": mesh.size,
        "batch": config.batch_size,
        "dtype": config.compute_dtype,
        "compile_seconds": compile_seconds,
        "step_ms": 1e3 * step_seconds,
        "step_ms_least": 1e3 * min(seconds),
        "step_ms_most": 1e3 * max(seconds),
        "images_per_second_a_device": config.batch_size / mesh.size / step_seconds,
        "xla_needed_gb": memory.peak_memory_in_bytes / 1e9,
        "xla_temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "seen_peak_gb": ((device.memory_stats() or {}).get("peak_bytes_in_use") or 0) / 1e9,
        "tflop_counted": counted.flops / 1e12,
        "accessed_gb_counted": counted.bytes / 1e9,
        "tflop_per_second": counted.flops / step_seconds / 1e12,
        "losses": [round(loss, 3) for loss in losses],
    }
    if chip is not None:
        peaks = CHIPS[chip]
        compute = counted.flops / peaks.flops_per_second
        hbm = counted.bytes / peaks.hbm_bytes_per_second
        row |= {
            "chip": chip,
            "compute_bound_ms": 1e3 * compute,
            "hbm_bound_ms": 1e3 * hbm,
            "bound_over_measured": max(compute, hbm) / step_seconds,
        }
    return row


def chip_at_hand() -> str | None:
    """Returns the name of the local device in `plan`, or None if it is unknown."""
    kind = jax.devices()[0].device_kind.lower()
    return next((name for name in CHIPS if name in kind.replace(" ", "")), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/imagenet.py")
    parser.add_argument("--batch", default="256", help="global batches, separated by commas")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chip", choices=CHIPS, help="by default by the device's name")
    parser.add_argument("--json", help="where to write the rows too")
    arguments = parser.parse_args()
    rows = []
    for batch in arguments.batch.split(","):
        config = runpy.run_path(arguments.config)["get_config"]()
        config.batch_size = int(batch)
        rows.append(
            measure(config, arguments.chip or chip_at_hand(), arguments.steps, arguments.turns)
        )
        for name, value in rows[-1].items():
            print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
        print(flush=True)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
