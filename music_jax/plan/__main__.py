"""`python -m music_jax.plan`: estimate what a training step costs on chips that you do not have."""

import json
import multiprocessing
import os
import pathlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_dict

from music_jax import cli
from music_jax.distributed import usable_cores
from music_jax.errors import UserError
from music_jax.plan.chips import ATTACHED, CHIPS, attached_topology, check_compilers

if TYPE_CHECKING:
    from music_jax.plan.costs import StepCost
    from music_jax.plan.report import Plan

_USAGE = """
Compiles the training step of a config for TPU slices or GPUs that you do not have and reports what
it needs: memory, FLOPs, bytes, network, the bottleneck at the chips' published peaks, and from this
an estimate of the time of a step, an epoch and the run. Needs libtpu (Linux on x86-64), for GPUs
JAX's CUDA plugin, and for ResNet-50 some minutes of two cores and 3 GB of memory per topology.
Results are cached in ~/.cache/music_jax/plan: rerun the command to resume it.

  python -m music_jax.plan --config=configs/imagenet.py --topology=v5e:4x8
  python -m music_jax.plan --config=configs/imagenet.py --topology=v5e:4x8,v4:4x4x4 --json=plan.json
  python -m music_jax.plan --config=configs/imagenet.py --topology=v5e:4x8 --slices=2
  python -m music_jax.plan --config=configs/imagenet.py --topology=h100:8 --config.batch_size=1024

Exit codes: 0 done, whether it fits or not; 2 wrong input; 75 stopped by a signal.
"""

# Images that a core decodes and crops twice in a second: JPEGs of 500 x 375 pixels and 67 kB, by
# tests/benchmarks/input.py on a cloud machine.
_DECODE_RATE = 1300.0
_FILE_BYTES, _IMAGE_BYTES = 67_000, 500 * 375 * 3
# Share of that time which each local view of 96 pixels adds, by the same script.
_LOCAL_VIEW_COST = 0.06

_SECONDS_BETWEEN_SIGNS = 1.0  # of life, while programs compile

# Sizes of training splits that are seldom prepared where a run is planned.
_NUM_IMAGES = {("imagenet2012", "train"): 1_281_167}


def main() -> None:
    """Reads the flags, compiles and reports."""
    if not flags.FLAGS.topology:
        examples = ",".join(chip.example for chip in CHIPS.values())
        raise UserError(f"--topology=NAME[,NAME...] is missing; examples: {examples}")
    named = (attached_topology() if t == ATTACHED else t for t in flags.FLAGS.topology)
    topologies = list(dict.fromkeys(named))
    check_compilers(topologies)
    output = pathlib.Path(flags.FLAGS.json).expanduser() if flags.FLAGS.json else None
    if output and (
        output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK)
    ):
        raise UserError(f"--json={output} cannot be written; name a file in an existing directory")

    from music_jax.config import validate
    from music_jax.plan import compiling

    os.environ.update(compiling.ENVIRONMENT)
    import jax

    jax.config.update("jax_platforms", "cpu")
    validate(flags.FLAGS.config)
    dataset = flags.FLAGS.config.dataset
    if not dataset.mean:  # The cost does not depend on the statistics.
        dataset.mean, dataset.std = (0.5,) * dataset.num_channels, (0.3,) * dataset.num_channels
    from music_jax.distributed import progress
    from music_jax.distributed.mesh import use_deterministic_gpu_operations
    from music_jax.plan import report

    if flags.FLAGS.config.deterministic:
        use_deterministic_gpu_operations()  # in the processes that compile, as in training
    plans = _make_plans(flags.FLAGS.config, topologies)
    progress.say_lines(f"\n{report.table(plans)}\n\n{report.notes(plans)}")
    if output:
        output.write_text(json.dumps(plans, indent=2) + "\n")


def _num_images(config: config_dict.ConfigDict) -> int:
    from music_jax.data import datasets

    published = _NUM_IMAGES.get((config.dataset.name, config.dataset.train_split))
    if published and not config.dataset.path:
        return published
    try:
        return len(datasets.training_source(config))
    except UserError as error:
        raise UserError(
            f"cannot count the training images: {error}; --num_images=N gives their number"
        ) from error


def _make_plans(config: config_dict.ConfigDict, topologies: list[str]) -> list["Plan"]:
    from music_jax.distributed import progress
    from music_jax.plan import compiling, report
    from music_jax.train.input import host_bytes
    from music_jax.workdir.run_config import as_json

    options: Any = flags.FLAGS
    num_images = options.num_images or _num_images(config)
    if config.batch_size > num_images:
        raise UserError(
            f"config.batch_size = {config.batch_size} is larger than the number of images, "
            f"{num_images}; take at most {num_images}"
        )
    find_batch_size = options.find_batch_size
    decode_rate = options.decode_rate / (1 + _LOCAL_VIEW_COST * config.local_views.count)

    def input_bytes(cost: "StepCost") -> int:
        rows = cost.batch_size // cost.processes
        return host_bytes(config, rows, file_bytes=_FILE_BYTES, image_bytes=_IMAGE_BYTES)

    jobs = min(options.jobs or usable_cores(), len(topologies))
    values, spawn = as_json(config), multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs, spawn, initializer=compiling.prepare_process) as pool:
            for topology in topologies:  # before minutes are spent
                pool.submit(compiling.check, values, topology, options.slices).result()
            progress.say(
                f"compiling for {', '.join(topologies)}, {jobs} at a time ... minutes each for "
                "ResNet-50, unless cached"
            )
            running = {
                pool.submit(
                    compiling.run, values, topology, num_images, find_batch_size, options.slices
                ): topology
                for topology in topologies
            }
            waiting = set(running)
            with progress.bar(len(running), unit="topology", description="compiling") as bar:
                while waiting:
                    ended, waiting = wait(
                        waiting, timeout=_SECONDS_BETWEEN_SIGNS, return_when=FIRST_COMPLETED
                    )
                    for done in ended:
                        seconds = done.result()[0].compile_seconds
                        progress.say(f"{running[done]}: compiled in {seconds:.0f} s, now or before")
                    bar.update(len(ended))  # of 0 shows the time that has passed
    except BrokenProcessPool as error:
        raise UserError(
            f"a compilation was killed, probably because memory ran out; use --jobs=1, not {jobs}"
        ) from error
    return [
        report.make_plan(
            topology,
            *done.result(),
            num_images=num_images,
            num_epochs=config.num_epochs,
            decode_rate=decode_rate,
            host_bytes=input_bytes(done.result()[0]),
        )
        for done, topology in running.items()
    ]


if __name__ == "__main__":
    flags.DEFINE_list(
        "topology",
        None,
        "Topologies such as v3:2x2, v4:4x4x4, v5e:4x8 and h100:8; `attached` for this machine's "
        "GPUs.",
    )
    flags.DEFINE_integer(
        "slices",
        1,
        "Number of slices of each topology, with the data center network between them.",
        lower_bound=1,
    )
    flags.DEFINE_string("json", None, "JSON file to write, a list with one object per topology.")
    flags.DEFINE_boolean(
        "find_batch_size",
        False,
        "Whether to find the largest batch that fits, to within 3 %: five to ten compilations.",
    )
    flags.DEFINE_integer(
        "num_images",
        None,
        "Number of images of the training split, if the dataset is not prepared here.",
        lower_bound=1,
    )
    flags.DEFINE_float(
        "decode_rate",
        _DECODE_RATE,
        "Images per second that a core of the host decodes and cuts into two crops. Measure yours "
        "with tests/benchmarks/input.py, without local views, whose time is added; the default is "
        "for JPEGs of 500 x 375 pixels on a cloud machine.",
        lower_bound=1.0,
    )
    flags.DEFINE_integer(
        "jobs", None, "Number of topologies to compile at a time. [one per core]", lower_bound=1
    )
    cli.run(main, _USAGE, config="file")
