"""Measures the loss, the training step and determinism on one GPU; see gpu.sh.

Each part runs in a process of its own with its own time limit, and its rows are written as soon as
they are known:

- loss: `music_loss` beside its three matrix products, dense JAX and torch.compile;
- step: the ResNet-50 step of two views, without augmentations and with SGD, in JAX;
- torch_step: the same in PyTorch (channels_last, autocast to bfloat16, torch.compile);
- operations: operations of a training step, and the `imagenet` step, with XLA's defaults;
- deterministic: the same under the flag of `config.deterministic`.

`deterministic_over_default` compares the last two. `equal` is whether two calls gave the same bits.
A row that could not be measured has a `reason`.
"""

import argparse
import functools
import json
import os
import pathlib
import runpy
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# Limits of the parts in seconds, in all 470. What a part leaves over is added to the next.
PARTS = {"loss": 130, "step": 110, "torch_step": 90, "operations": 70, "deterministic": 70}
FLAG = "--xla_gpu_exclude_nondeterministic_ops=true"

Row = dict[str, Any]


def reason_for(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def loss_rows(small: bool) -> Iterator[Row]:
    import objective

    if small:
        objective.SHAPES["imagenet"] = 16, 4, 8
        objective.SHAPES["imagenet_2048"] = 32, 4, 8
    for shape in ("imagenet", "imagenet_2048"):
        for dtype in ("float32", "bfloat16"):
            measure = functools.partial(
                objective.time_shape, shape, dtype, 3 if small else 9, calls=1 if small else 20
            )
            try:
                import torch  # noqa: F401

                yield measure(with_torch=True)
            except Exception as error:
                row = measure(with_torch=False)
                yield row | {"torch_seconds": None, "reason": reason_for(error)}


def imagenet_config(small: bool, batch: int, *, plain: bool) -> Any:
    """Returns the `imagenet` config; a plain one has no augmentations and SGD."""
    from music_jax.config import set_views

    config = runpy.run_path(str(ROOT / "configs/imagenet.py"))["get_config"]()
    config.batch_size = batch
    if plain:
        fields = [f for f in config.augmentation.view_1 if f.endswith("_probability")]
        set_views(config, **dict.fromkeys(fields, 0.0))
        config.optimizer.name = "sgd"
    if small:
        config.backbone.name, config.crop.size = "small_resnet", 32
        config.projector.hidden_sizes = (32,)
        config.objective.num_segments, config.objective.units_per_segment = 4, 8
    return config


def step_rows(small: bool) -> Iterator[Row]:
    import step

    for batch in (4,) if small else (256, 512):
        config = imagenet_config(small, batch, plain=True)
        turns = (1, 1) if small else (10, 3)
        yield step.measure(config, step.chip_at_hand(), *turns)


def torch_step_rows(small: bool) -> Iterator[Row]:
    for batch in (4,) if small else (256, 512):
        try:
            yield torch_step(batch, small)
        except Exception as error:
            yield {"batch": batch, "step_ms": None, "reason": reason_for(error)}


def torch_step(batch: int, small: bool) -> Row:
    import objective
    import torch
    import torchvision

    on_gpu = torch.cuda.is_available()
    device, size = "cuda" if on_gpu else "cpu", 32 if small else 224
    segments, units, hidden = (4, 8, 32) if small else (102, 80, 8192)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    backbone = torchvision.models.resnet18() if small else torchvision.models.resnet50()
    features, backbone.fc = backbone.fc.in_features, torch.nn.Identity()
    projector = torch.nn.Sequential(
        torch.nn.Linear(features, hidden, bias=False),
        torch.nn.BatchNorm1d(hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, segments * units),
    )
    model = torch.nn.Sequential(backbone, projector).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-6)
    images = torch.randint(256, (2, batch, 3, size, size), dtype=torch.uint8, device=device)

    def loss_of(images: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            # One view after the other, since each is normalized by its own statistics.
            za, zb = (
                model(((view.float() - 120) / 60).contiguous(memory_format=torch.channels_last))
                for view in images
            )
        return objective.torch_dense_loss(za, zb, segments)

    compiled = torch.compile(loss_of, dynamic=False) if on_gpu else loss_of

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = compiled(images)
        loss.backward()
        optimizer.step()
        return loss.detach()

    seconds = seconds_of_calls(step, objective.wait, 1 if small else 10, 2 if small else 4)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "batch": batch,
        "step_ms": 1e3 * seconds,
        "images_per_second_a_device": batch / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def seconds_of_calls(
    call: Callable[[], Any], wait: Callable[[Any], None], calls: int, turns: int
) -> float:
    """Returns the median time of a call, over turns of several calls; the first turn warms up."""
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds[1:])


def operations(small: bool) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns operations of a ResNet-50 step at batch 256, and their operands, by name."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from music_jax.models import resnet
    from music_jax.objectives import music_loss

    views, side = (2, 8) if small else (512, 112)

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, dtype)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def gradient(argument: int) -> Callable[..., jax.Array]:
        def backward(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
            return jax.vjp(convolve, x, kernel)[1](cotangent)[argument]

        return backward

    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    shapes = {"3 x 3 of 128 channels": (4, 3, 128, 128), "1 x 1 of 64 to 256": (2, 1, 64, 256)}
    for name, (shrink, size, before, after) in shapes.items():
        x = normal(views, side // shrink, side // shrink, before)
        kernel, y = normal(size, size, before, after), normal(*x.shape[:3], after)
        found[f"convolution {name}"] = convolve, (x, kernel)
        found[f"its gradient for the input, {name}"] = gradient(0), (x, kernel, y)
        found[f"its gradient for the kernel, {name}"] = gradient(1), (x, kernel, y)
    x = normal(views, side, side, 64)
    y = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    found["gradient of max-pooling, by comparisons"] = resnet.max_pool_gradient, (x, y, y)
    found["gradient of max-pooling, by XLA's scatter"] = resnet._scattered, (x, y, y)
    wide = 64 if small else 8192
    found["product of the projection head"] = jnp.matmul, (normal(views, wide), normal(wide, wide))
    segments, units = (4, 8) if small else (102, 80)
    loss = jax.grad(functools.partial(music_loss, num_segments=segments), (0, 1))
    z = normal(views // 2, segments * units, dtype=jnp.float32)
    found["music_loss and its gradient"] = loss, (z, z[::-1])
    return found


def operation_rows(small: bool) -> Iterator[Row]:
    import jax
    import numpy as np
    import step

    config = imagenet_config(small, 4 if small else 256, plain=small)  # CPUs compile it slowly
    row = step.measure(config, step.chip_at_hand(), *((1, 1) if small else (10, 3)))
    yield {"operation": "imagenet step", "ms": row["step_ms"]}
    for name, (function, operands) in operations(small).items():
        try:
            call = functools.partial(jax.jit(function), *operands)
            first, second = (jax.tree.map(np.asarray, call()) for _ in range(2))
            same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, second)
            calls = (1, 2) if small else (10, 4)
            seconds = seconds_of_calls(call, jax.block_until_ready, *calls)
            yield {"operation": name, "ms": 1e3 * seconds, "equal": all(jax.tree.leaves(same))}
        except Exception as error:
            yield {"operation": name, "ms": None, "reason": reason_for(error)}


ROWS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "loss": loss_rows,
    "step": step_rows,
    "torch_step": torch_step_rows,
    "operations": operation_rows,
    "deterministic": operation_rows,
}


def run_part(part: str, small: bool, limit: float, write: Callable[[Row], None]) -> str | None:
    """Calls `write` with each row of a part; returns why the part did not finish, or None."""
    flags = [os.environ.get("XLA_FLAGS", "")]
    flags += [FLAG] if part == "deterministic" else []
    flags += ["--xla_backend_optimization_level=0"] if small else []  # compiles in half the time
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": " ".join(flags).strip(),
    }
    command = [sys.executable, __file__, f"--part={part}", *(["--small"] if small else [])]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    expired = threading.Event()

    def end() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(limit, 0), end)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("{"):
                write(json.loads(line))
        code = process.wait()
    except BaseException:  # Ctrl-C or SIGTERM, which do not reach the part's session
        end()
        raise
    finally:
        timer.cancel()
    if expired.is_set():
        return f"not finished within its {limit:.0f} s"
    return f"exit code {code}" if code else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("gpu.json"))
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--part", choices=ROWS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        for row in ROWS[given.part](given.small):
            print(json.dumps(row), flush=True)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    found: dict[str, Any] = {"small": given.small, "parts": {}}

    def save() -> None:
        found["seconds"] = round(time.monotonic() - began, 1)
        parts = (found["parts"].get(part, {"rows": []}) for part in ("operations", "deterministic"))
        default, flagged = ({row["operation"]: row["ms"] for row in p["rows"]} for p in parts)
        found["deterministic_over_default"] = {
            name: round(ms / default[name], 3)
            for name, ms in flagged.items()
            if ms and default.get(name)
        }
        partial = given.json.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(given.json)

    end = began
    for part, limit in PARTS.items():
        end += limit
        result = found["parts"][part] = {"rows": [], "reason": None}

        def write(row: Row, result: dict[str, Any] = result) -> None:
            result["rows"].append(row)
            save()

        seconds = 600 if given.small else end - time.monotonic()  # small shapes test only the code
        result["reason"] = run_part(part, given.small, seconds, write)
        save()
        print(f"{part}: {len(result['rows'])} rows, {result['reason'] or 'finished'}", flush=True)
    print(f"{given.json} after {found['seconds']} s")


if __name__ == "__main__":
    main()
