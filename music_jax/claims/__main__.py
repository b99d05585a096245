"""`python -m music_jax.claims`: test the paper's claims with a resumable sweep of trainings."""

import contextlib
import os
import subprocess
import sys

from absl import flags
from etils import epath

from music_jax import cli
from music_jax.distributed import usable_cores
from music_jax.errors import NotMeasurableError, UserError

_USAGE = """
Tests the paper's claims with a sweep of trainings, each in a directory of its own, and writes a
table and a plot for each claim. Rerun the command to run the missing trainings; those
that were interrupted resume from their last checkpoint.

  python -m music_jax.claims --config=configs/mnist5k.py --seeds=5 --output=claims/mnist5k
  python -m music_jax.claims --config=configs/shapes.py --seeds=3 --only=1,7 --results=RESULTS.md

  1 objectives; 2 projector depth; 3 embedding dimension; 4 batch size; 5 trivial solutions;
  6 temperature and weights; 7 what each segment is about (shapes)

With --only, the tables of other claims that the directory already has are kept, and recomputed from
all existing results. --results has one section for each sweep, named after its directory.

Learning rates are chosen on a part of the training split. All grids, and the fields that differ
from the config file, are in music_jax/claims/grid.py. --config.FIELD=VALUE overrides both.

Exit codes: 0 done; 2 wrong input; 3 some cells failed; 75 stopped by a signal.
"""


def main() -> None:
    """Reads the flags, runs the missing trainings and writes the tables."""
    config = flags.FLAGS.config
    if flags.FLAGS.seeds < 1:
        raise UserError(f"--seeds must be at least 1; got {flags.FLAGS.seeds}")

    results_file = _results_file()
    cores = _cores()
    from music_jax.claims import report
    from music_jax.claims.run_cells import run_missing
    from music_jax.claims.sweep import make_sweep
    from music_jax.data import datasets
    from music_jax.distributed import progress
    from music_jax.workdir.directory import WorkdirLock

    output = os.path.join("claims", config.dataset.name.partition("/")[0])
    sweep = make_sweep(
        config,
        only=flags.FLAGS.only,
        seeds=flags.FLAGS.seeds,
        directory=flags.FLAGS.output or output,
        overridden=cli.config_overrides(),
    )
    sweep.validate()
    shown = sweep.with_earlier()
    try:
        if not flags.FLAGS.tables_only:
            with WorkdirLock(sweep.directory):
                datasets.prepare(config)
                with contextlib.suppress(NotMeasurableError):  # which the cells report
                    if datasets.evaluation_sources(config).train.multi_label:
                        raise UserError(
                            f"the images of {config.dataset.name} may have several classes each; "
                            "the claims need one class, such as that of one feature"
                        )
                run_missing(sweep, cores=cores)
    finally:
        tables = shown.tables()
        report.write_tables(tables, sweep.directory)
        report.write_plots(tables, sweep.directory)
        progress.say_lines(report.as_text(tables))
        if results_file is not None:
            report.write_section(results_file, shown, tables)


def _results_file() -> epath.Path | None:
    """Returns the Markdown file after checking that it can be written."""
    if not flags.FLAGS.results:
        return None
    path = epath.Path(flags.FLAGS.results).expanduser()
    try:
        (path.parent / "results").mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a directory")
        if not path.exists():  # the only reliable check
            path.touch()
            path.unlink()
    except OSError as error:
        raise UserError(
            f"--results={path} cannot be written: {error}; name a Markdown file"
        ) from error
    return path


def _cores() -> list[int | None]:
    """Returns the core of each worker, or a single worker without one if there is an accelerator.

    From here on this process uses the CPU only, and leaves accelerators to the worker.
    """
    backend = os.environ.get("JAX_PLATFORMS")
    if backend != "cpu":
        ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
        found = subprocess.run(ask, capture_output=True, text=True, check=False)
        if found.returncode:
            cli.check_devices()
        backend = (found.stdout.split() or ["none"])[-1]
    import jax

    jax.config.update("jax_platforms", "cpu")
    if backend != "cpu":
        return [None]
    if not hasattr(os, "sched_getaffinity"):  # which exists on Linux only
        return [None] * (flags.FLAGS.workers or usable_cores())
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i % len(cores)] for i in range(flags.FLAGS.workers or len(cores))]


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 5, "Number of seeds of each setting.")
    flags.DEFINE_list("only", [], "Numbers of the claims to test; all by default.")
    flags.DEFINE_string("output", None, "Directory of the sweep. [claims/DATASET]")
    flags.DEFINE_string("results", None, "Markdown file to write the sweep's section to.")
    flags.DEFINE_integer(
        "workers", None, "Number of processes on CPU. [one per core]", lower_bound=1
    )
    flags.DEFINE_boolean("tables_only", False, "Only writes the tables of the existing results.")
    cli.run(main, _USAGE, config="file")
