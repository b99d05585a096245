"""Measures the cost of the objectives: time on local devices, and programs for TPU slices.

    python tests/benchmarks/objective.py --part=time --json=time.json
    python tests/benchmarks/objective.py --part=tpu --json=tpu.json

`time` compares the value and both gradients at four shapes, for

- fused: `music_loss`;
- dense: its definition in plain JAX, with the joint matrix in memory;
- products: only the three matrix products, with probabilities and slopes given, as a lower bound;
- torch: the dense form in PyTorch, if torch is installed; on a GPU by torch.compile.

The forms alternate, so that the load of the machine affects all alike. A time is the median over
the repeats, and a ratio the median of their ratios. Temporary memory is as reported by XLA; for
torch it is the increase of the peak resident memory of a new process.

`tpu` compiles `music_loss` (sharded), its dense form and the other objectives for TPU slices
without the hardware, at ImageNet's shape with embeddings sharded along the batch, and reads the
cost per chip from the compiled program. `flops_over_products` is relative to the three products.
"""

import argparse
import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.distributed.mesh import batch_sharding
from music_jax.objectives import (
    barlow_twins_loss,
    discrete_loss,
    music_loss,
    sigreg_loss,
    simclr_loss,
    tcr_loss,
    vicreg_loss,
)
from music_jax.plan import compiling, programs

# name: batch per device, segments, units
SHAPES = {
    "imagenet": (256, 102, 80),
    "imagenet_2048": (2048, 102, 80),
    "wide_batch": (1024, 64, 64),
    "cifar10": (512, 32, 32),
    "mnist5k": (256, 32, 16),
}
# topology: global batch
TOPOLOGIES = {"v5e:4x8": 2048, "v5e:16x16": 4096, "v6e:4x4": 2048}


def dense_loss(za: jax.Array, zb: jax.Array, *, num_segments: int) -> jax.Array:
    """Computes the objective by its definition, with the whole of P in memory."""
    batch, dim = za.shape
    units = dim // num_segments
    pa, pb = (_dense_probabilities(z, num_segments) for z in (za, zb))  # [N, S, K]
    flat_a, flat_b = (p.reshape(batch, dim).astype(za.dtype) for p in (pa, pb))
    joint = jnp.matmul(flat_a.T, flat_b, preferred_element_type=jnp.float32) / batch  # [D, D]
    entropies = joint * jnp.log(joint)
    segments = jnp.arange(dim) // units
    different = segments[:, None] != segments[None, :]
    cross = jnp.sum(jnp.where(different, entropies, 0.0))
    invariance = -jnp.mean(jnp.log(jnp.sum(pa * pb, axis=-1)))
    diagonal = jnp.trace(entropies) / num_segments
    return diagonal + cross / (num_segments * (num_segments - 1)) + invariance


def _dense_probabilities(z: jax.Array, num_segments: int) -> jax.Array:
    z = z.astype(jnp.float32).reshape(z.shape[0], num_segments, -1)  # [N, S, K]
    return jnp.clip(jax.nn.softmax(z, axis=-1), min=1e-8)


def torch_dense_loss(za: Any, zb: Any, num_segments: int) -> Any:
    """Computes the dense form in PyTorch."""
    import torch

    batch, dim = za.shape
    units = dim // num_segments
    segments = torch.arange(dim, device=za.device) // units
    different = segments[:, None] != segments[None, :]
    pa, pb = (
        z.float().reshape(batch, num_segments, units).softmax(-1).clamp(min=1e-8) for z in (za, zb)
    )
    flat_a, flat_b = (p.reshape(batch, dim).to(za.dtype) for p in (pa, pb))
    joint = (flat_a.T @ flat_b).float() / batch
    entropies = joint * joint.clamp(min=1e-16).log()  # products in bfloat16 can be 0
    diagonal = entropies.diagonal().sum() / num_segments
    cross = (entropies * different).sum() / (num_segments * (num_segments - 1))
    return diagonal + cross - (pa * pb).sum(-1).log().mean()


def torch_dense_step(
    za: np.ndarray, zb: np.ndarray, num_segments: int, dtype: str = "float32"
) -> Callable[[], Any]:
    """Returns a function for the gradients of the dense form in PyTorch."""
    import torch

    on_gpu = torch.cuda.is_available()
    options = {"dtype": getattr(torch, dtype), "device": "cuda" if on_gpu else "cpu"}
    views = [torch.tensor(z, requires_grad=True, **options) for z in (za, zb)]
    torch.set_float32_matmul_precision("high")  # TF32, as XLA's default
    loss = torch.compile(torch_dense_loss, dynamic=False) if on_gpu else torch_dense_loss

    return lambda: torch.autograd.grad(loss(*views, num_segments), views)


def embeddings(batch: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two views that agree in part, as those of a network in training."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(batch, dim))
    za, zb = (2 * (common + 0.5 * rng.normal(size=(batch, dim))) for _ in "ab")
    return za.astype(np.float32), zb.astype(np.float32)


def bare_products(pa: jax.Array, pb: jax.Array, slope: jax.Array) -> tuple[jax.Array, ...]:
    """Computes the three products that the value and both gradients require."""
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return dot(pa.T, pb), dot(pb, slope.T), dot(pa, slope)


def time_shape(
    name: str, dtype: str, repeats: int, with_torch: bool, calls: int = 1
) -> dict[str, Any]:
    """Returns the row of a shape; each time is that of some calls one after another."""
    batch, segments, units = SHAPES[name]
    arrays = embeddings(batch, segments * units)
    za, zb = (jnp.asarray(z, dtype) for z in arrays)
    steps: dict[str, Callable[[], Any]] = {}
    row: dict[str, Any] = {
        "shape": name,
        "batch": batch,
        "segments": segments,
        "units": units,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
    }
    for form, loss in (("fused", music_loss), ("dense", dense_loss)):
        function = functools.partial(loss, num_segments=segments)
        compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(za, zb).compile()
        steps[form] = functools.partial(compiled, za, zb)
        row[f"{form}_temporary_mb"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    pa, pb = (_dense_probabilities(z, segments).reshape(batch, -1).astype(dtype) for z in (za, zb))
    slope = jnp.log(jnp.maximum(pa.T @ pb, 1e-16) / batch).astype(dtype)
    steps["products"] = functools.partial(jax.jit(bare_products), pa, pb, slope)
    if with_torch:
        steps["torch"] = torch_dense_step(*arrays, segments, dtype)
        if jax.default_backend() == "cpu":
            row["torch_temporary_mb"] = torch_temporaries(name)
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for turn in range(repeats + 1):
        order = list(steps)
        first = turn % len(order)  # every form follows every other one in turn
        for form in order[first:] + order[:first]:
            step = steps[form]
            time.sleep(0.05)  # until the threads of the previous form are idle
            start = time.perf_counter()
            for _ in range(calls):
                result = step()
            wait(result)
            if turn:  # the first warms up
                seconds[form].append((time.perf_counter() - start) / calls)
    for form, times in seconds.items():
        row[f"{form}_seconds"] = statistics.median(times)
        if form != "fused":
            ratios = [a / b for a, b in zip(seconds["fused"], times, strict=True)]
            row[f"fused_over_{form}"] = statistics.median(ratios)
    return row


def wait(result: Any) -> None:
    """Waits for the arrays of JAX, or for those of torch on a GPU."""
    jax.block_until_ready(result)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.synchronize()


def torch_temporaries(name: str) -> float:
    """Returns the peak resident memory of the torch form in MB, measured in a new process."""
    out = subprocess.run(
        [sys.executable, __file__, f"--torch_memory={name}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(out.stdout)


def print_torch_memory(name: str) -> None:
    """Runs in the process that `torch_temporaries` starts."""
    batch, segments, units = SHAPES[name]
    torch_dense_step(*embeddings(2, segments * 2), segments)()  # completes lazy imports
    step = torch_dense_step(*embeddings(batch, segments * units), segments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6)


_OF_SEGMENTS = {"num_segments": SHAPES["imagenet"][1]}
FORMS: dict[str, Callable[..., jax.Array]] = {
    "sharded": functools.partial(music_loss, **_OF_SEGMENTS),
    "dense": functools.partial(dense_loss, **_OF_SEGMENTS),
    "centered": functools.partial(music_loss, center=True, **_OF_SEGMENTS),
    "barlow_twins": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "simclr": simclr_loss,
    "sigreg": lambda a, b: sigreg_loss(a, b, key=jax.random.key(0)),
    "tcr": tcr_loss,
    "discrete": discrete_loss,
}


def compile_for(topology: str, form: str, dtype: str) -> dict[str, Any]:
    """Returns the cost per chip of a TPU slice, without the hardware."""
    batch, (_, segments, units) = TOPOLOGIES[topology], SHAPES["imagenet"]
    chips = compiling.open_slice(topology)
    mesh = chips.mesh
    sharding = batch_sharding(mesh)
    dim = segments * units
    argument = jax.ShapeDtypeStruct((batch, dim), jnp.dtype(dtype), sharding=sharding)
    step = jax.jit(jax.value_and_grad(FORMS[form], (0, 1)))
    start = time.perf_counter()
    compiled = step.lower(argument, argument).compile()
    program = programs.read(compiled)
    flops, traffic = programs.costs(compiled, program)
    sent = programs.collectives(program, range(mesh.size))
    floor = 3 * 2 * batch * dim**2 / mesh.size
    return {
        "topology": topology,
        "form": form,
        "chips": mesh.size,
        "batch": batch,
        "dtype": dtype,
        "collective_mb": sum(sent.by_kind.values()) / 1e6,
        "collective_mb_by_kind": {kind: size / 1e6 for kind, size in sent.by_kind.items()},
        "received_mb": sent.received / 1e6,
        "hbm_traffic_mb": traffic / 1e6,
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "gflops": flops / 1e9,
        "flops_over_products": flops / floor,
        "compile_seconds": time.perf_counter() - start,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints one line per measure, with one column per row of `rows`."""
    for key in dict.fromkeys(key for row in rows for key in row):
        cells = (row.get(key, "") for row in rows)
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        if key != "collective_mb_by_kind":
            print(f"{key:22}" + "".join(f"{text:>14}" for text in texts))


def main() -> None:
    """Runs a part, prints its table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--part", choices=("time", "tpu"), default="time")
    shapes = ",".join(name for name in SHAPES if name != "imagenet_2048")
    parser.add_argument("--shapes", default=shapes, help="shapes of the part `time`")
    parser.add_argument(
        "--topologies", default=",".join(TOPOLOGIES), help="topologies of the part `tpu`"
    )
    parser.add_argument("--forms", default=",".join(FORMS), help="forms of the part `tpu`")
    parser.add_argument("--dtype", help="default: float32 for `time`, bfloat16 for `tpu`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_torch", action="store_true")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--torch_memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_memory:
        return print_torch_memory(arguments.torch_memory)
    if arguments.part == "tpu":
        os.environ.update(compiling.ENVIRONMENT)
        jax.config.update("jax_platforms", "cpu")
        rows = [
            compile_for(topology, form, arguments.dtype or "bfloat16")
            for topology in arguments.topologies.split(",")
            for form in arguments.forms.split(",")
        ]
    else:
        on_cpu = jax.default_backend() == "cpu"
        with_torch = on_cpu and not arguments.no_torch and bool(importlib.util.find_spec("torch"))
        rows = [
            time_shape(shape, arguments.dtype or "float32", arguments.repeats, with_torch)
            for shape in arguments.shapes.split(",")
        ]
    print_table(rows)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
