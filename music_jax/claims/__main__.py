"""`python -m music_jax.claims`: the paper's claims as a sweep that goes on where it was stopped."""

import os
import subprocess
import sys

from absl import flags
from etils import epath

from music_jax import cli
from music_jax.distributed import usable_cores
from music_jax.errors import UserError

_USAGE = """
Puts the paper's claims to the test: a sweep of trainings, each in a directory of its own, and a
table and a plot for each claim. Run again with the same arguments, it trains what is missing; of
what is in work when it is stopped or killed, nothing is kept.

  python -m music_jax.claims --config=configs/mnist5k.py --seeds=5 --output=claims/mnist5k
  python -m music_jax.claims --config=configs/shapes.py --seeds=3 --only=1,7 --results=RESULTS.md

  1 objectives; 2 projector depth; 3 embedding dimension; 4 batch size; 5 trivial solutions (from
  a collapsed start too where images are kept in memory); 6 temperature and weights; 7 what each
  segment is about (shapes)

With --only, the tables of other claims that the directory has already stay, made anew from all
results that are there. --results has one section for each sweep, by the name of its directory.

Learning rates are chosen on a part of the training split. What differs from the config file, and
all grids: music_jax/claims/settings.py. --config.FIELD=VALUE comes before both.

Exit codes: 0 done; 2 wrong input; 3 some cells failed; 75 stopped by a signal.
"""


def main() -> None:
    """Reads the flags, runs what is missing and writes the tables."""
    config = flags.FLAGS.config
    if flags.FLAGS.seeds < 1:
        raise UserError(f"--seeds must be at least 1; got {flags.FLAGS.seeds}")

    results_file = _results_file()
    cores = _cores()
    from music_jax.claims import plots, pool, report, results
    from music_jax.claims.cells import Sweep, base_config, chosen
    from music_jax.claims.grid import make_claims
    from music_jax.claims.settings import settings_of
    from music_jax.data import datasets
    from music_jax.distributed import progress
    from music_jax.workdir.directory import WorkdirLock, open_workdir

    name = config.dataset.name
    settings = settings_of(name)
    overridden = _overridden_fields()
    claims = make_claims(base_config(config, settings, overridden), settings)
    wanted = chosen({claim.number: claim for claim in claims}, flags.FLAGS.only)
    output = flags.FLAGS.output or os.path.join("claims", name.partition("/")[0])
    directory = open_workdir(output)
    sweep = Sweep(
        config,
        settings,
        wanted,
        num_seeds=flags.FLAGS.seeds,
        directory=directory,
        overridden=overridden,
    )
    sweep.validate()
    shown = sweep.with_earlier(claims)
    try:
        if not flags.FLAGS.tables_only:
            with WorkdirLock(directory):
                datasets.prepare(config)
                pool.run_missing(sweep, cores=cores)
    finally:
        tables = results.collect(shown)
        results.write(tables, directory)
        plots.write(tables, directory)
        progress.say_lines(results.as_text(tables))
        if results_file is not None:
            report.write_section(results_file, shown, tables)


def _results_file() -> epath.Path | None:
    """The Markdown file, seen to be writable before hours are spent."""
    if not flags.FLAGS.results:
        return None
    path = epath.Path(flags.FLAGS.results).expanduser()
    try:
        (path.parent / "results").mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a directory")
        if not path.exists():  # The only sure way to know.
            path.touch()
            path.unlink()
    except OSError as error:
        raise UserError(
            f"--results={path} cannot be written: {error}; name a Markdown file"
        ) from error
    return path


def _cores() -> list[int | None]:
    """The core that each worker keeps to; a single worker where there is an accelerator.

    This process itself leaves accelerators to the worker.
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
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return [None] * (flags.FLAGS.workers or usable_cores())
    cores = sorted(affinity(0))
    return [cores[i % len(cores)] for i in range(flags.FLAGS.workers or len(cores))]


def _overridden_fields() -> list[str]:
    return [a[len("--config.") :].partition("=")[0] for a in sys.argv if a.startswith("--config.")]


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 5, "Seeds of each setting.")
    flags.DEFINE_list("only", [], "Numbers of the claims to test; all by default.")
    flags.DEFINE_string("output", None, "Directory of the sweep. [claims/DATASET]")
    flags.DEFINE_string("results", None, "Markdown file in which to put the dataset's section.")
    flags.DEFINE_integer("workers", None, "Processes on CPU. [one a core]", lower_bound=1)
    flags.DEFINE_boolean("tables_only", False, "Train nothing: tables from what there is.")
    cli.run(main, _USAGE, config="file")
