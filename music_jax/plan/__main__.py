"""`python -m music_jax.plan`: estimate what a training step costs on chips that are not at hand."""

import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_dict

from music_jax import cli
from music_jax.distributed import usable_cores
from music_jax.errors import UserError
from music_jax.plan.chips import ATTACHED, CHIPS, attached_topology, check_plugin, chip_of

if TYPE_CHECKING:
    from music_jax.plan import worker
    from music_jax.plan.report import Plan

_USAGE = """
Compiles the training step of a config for TPU slices or GPUs that are not at hand and reports what
it needs: memory, FLOPs, bytes, network, the bottleneck at the chips' published peaks, and from this
an estimate of the time of a step, an epoch and the run. Needs libtpu (Linux on x86-64), for GPUs
JAX's CUDA plugin, and for ResNet-50 some minutes of two cores and 3 GB of memory per topology.
Results are cached in ~/.cache/music_jax/plan: rerun the command to resume it.

  python -m music_jax.plan --config=configs/imagenet.py --topology=v5e:4x8
  python -m music_jax.plan --config=configs/imagenet.py --topology=v5e:4x8,v4:4x4x4 --json=plan.json
  python -m music_jax.plan --config=configs/imagenet.py --topology=h100:8 --config.batch_size=1024

Exit codes: 0 done, whether it fits or not; 2 wrong input; 75 stopped by a signal.
"""

# Images that a core decodes and crops twice in a second: JPEGs of 500 x 375 pixels and 67 kB, by
# tests/benchmarks/input.py on a cloud machine.
_DECODE_RATE = 1043.0

# Sizes of training splits that are seldom prepared where a run is planned.
_NUM_IMAGES = {("imagenet2012", "train"): 1_281_167}


def main() -> None:
    """Reads the flags, compiles and reports."""
    config, topologies = flags.FLAGS.config, _topologies()
    _check_compilers(topologies)
    for name in ("num-images", "decode-rate", "jobs"):
        value = flags.FLAGS[name].value
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be positive; got {value}")
    output = _output()

    from music_jax.config import validate
    from music_jax.plan import compiling

    os.environ.update(compiling.ENVIRONMENT)
    import jax

    jax.config.update("jax_platforms", "cpu")
    validate(config)
    num_images = flags.FLAGS["num-images"].value or _num_images(config)
    from music_jax.distributed import progress
    from music_jax.plan import report

    plans = _make_plans(config, topologies, num_images)
    progress.say("")
    progress.say_lines(report.table(plans))
    progress.say("")
    progress.say_lines(report.notes(plans))
    if output is not None:
        output.write_text(json.dumps([plan.as_json() for plan in plans], indent=2) + "\n")


def _topologies() -> list[str]:
    topologies = flags.FLAGS.topology
    if not topologies:
        examples = ",".join(chip.example for chip in CHIPS.values())
        raise UserError(f"--topology=NAME[,NAME...] is missing; examples: {examples}")
    topologies = [attached_topology() if t == ATTACHED else t for t in topologies]
    for topology in topologies:
        chip_of(topology)
    return list(dict.fromkeys(topologies))


def _check_compilers(topologies: list[str]) -> None:
    chips = [chip_of(topology) for topology in topologies]
    if any(chip.gpu is not None for chip in chips):
        check_plugin()
    if any(chip.gpu is None for chip in chips) and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs needs libtpu, their compiler; on Linux and x86-64: "
            "pip install libtpu"
        )


def _output() -> pathlib.Path | None:
    """Returns the file for the JSON after checking that it can be written."""
    if not flags.FLAGS.json:
        return None
    path = pathlib.Path(flags.FLAGS.json).expanduser()
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--json={path} cannot be written; name a file in a directory that exists")
    return path


def _num_images(config: config_dict.ConfigDict) -> int:
    from music_jax.data import datasets

    dataset = config.dataset
    published = _NUM_IMAGES.get((dataset.name, dataset.train_split))
    if published and not dataset.path:
        return published
    if not (dataset.name or dataset.path):
        raise UserError(
            "the number of images is unknown, because the config names none; give them with "
            "--config.dataset.path=DIR or --config.dataset.name=NAME, or their number with "
            "--num-images=N"
        )
    try:
        return len(datasets.training_source(config))
    except UserError as error:
        name = dataset.path or f"{dataset.name}:{dataset.train_split}"
        raise UserError(
            f"the number of images of {name} is unknown, because it cannot be opened here; give it "
            f"with --num-images=N ({error})"
        ) from error


def _make_plans(
    config: config_dict.ConfigDict, topologies: list[str], num_images: int
) -> list["Plan"]:
    from music_jax.plan import worker

    options: Any = flags.FLAGS
    jobs = min(options.jobs or usable_cores(), len(topologies))
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=worker.begin
    )
    tasks = [
        worker.Task(
            config=config.to_json(),
            topology=topology,
            num_images=num_images,
            decode_rate=options["decode-rate"].value,
            find_batch_size=options["find-batch-size"].value,
        )
        for topology in topologies
    ]
    try:
        with pool:
            return _compile(pool, tasks, jobs)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            f"a compilation was killed, probably because memory ran out; use --jobs=1, not {jobs}"
        ) from error


def _compile(
    pool: concurrent.futures.Executor, tasks: list["worker.Task"], jobs: int
) -> list["Plan"]:
    from music_jax.distributed import progress
    from music_jax.plan import worker

    names = ", ".join(task.topology for task in tasks)
    for task in tasks:  # before minutes are spent
        pool.submit(worker.check, task).result()
    progress.say(
        f"compiling for {names}, {jobs} at a time ... minutes each for ResNet-50, unless cached"
    )
    running = {pool.submit(worker.run, task): task for task in tasks}
    for done in concurrent.futures.as_completed(running):
        seconds = done.result().cost.compile_seconds
        progress.say(f"{running[done].topology}: took {seconds:.0f} s to compile")
    return [done.result() for done in running]


if __name__ == "__main__":
    flags.DEFINE_list(
        "topology",
        None,
        "Topologies such as v3:2x2, v4:4x4x4, v5e:4x8 and h100:8; `attached` for this machine's "
        "GPUs.",
    )
    flags.DEFINE_string("json", None, "JSON file to write, a list with one object per topology.")
    flags.DEFINE_boolean(
        "find-batch-size",
        False,
        "Whether to find the largest batch that fits, to within 3 %: five to ten compilations.",
    )
    flags.DEFINE_integer(
        "num-images",
        None,
        "Number of images of the training split, if the dataset is not prepared here.",
    )
    flags.DEFINE_float(
        "decode-rate",
        _DECODE_RATE,
        "Images that a core of the host decodes and crops twice in a second; measured by "
        "tests/benchmarks/input.py, by default on a cloud machine with JPEGs of 500 x 375 pixels.",
    )
    flags.DEFINE_integer("jobs", None, "Number of topologies to compile at a time. [one per core]")
    cli.run(main, _USAGE, config="file")
