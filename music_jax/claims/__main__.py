"""`python -m music_jax.claims`: compare objectives, and test the paper's claims."""

import contextlib
import os
import subprocess
import sys

from absl import flags

from music_jax import cli
from music_jax.distributed import usable_cores
from music_jax.distributed.shares import parse_share
from music_jax.errors import NotMeasurableError, UserError

_USAGE = """
Compares objectives, each with the same search and the same number of fresh seeds, and tests the
claims of the paper. Rerun the command to run the missing trainings; those that were interrupted
resume from their last checkpoint.

  python -m music_jax.claims --config=configs/fashion_mnist.py --budget=small
  python -m music_jax.claims --config=configs/fashion_mnist.py
  python -m music_jax.claims --config=configs/fashion_mnist.py --objectives=music,vicreg,mine \\
      --import=my_objective

  1 objectives; 2 projector depth; 3 embedding dimension; 4 batch size; 5 trivial solutions;
  6 information that segments share

Results that the output directory has are used, so that a clone with the results of the built-in
objectives only trains yours. The tables are claims.md, claims.json, claims.csv and claim-N.png in
that directory. --tables_only recomputes them from the results and predictions there.

--worker=I/N runs the Ith of N shares of the cells, from 0: start N such commands with one output
directory, on any machines. Each waits for the others' results that it needs.

Exit codes: 0 done; 2 wrong input; 3 some cells failed, of this worker or of one that it waits for;
75 stopped by a signal, or results of workers that do not run are missing: rerun the command.
"""


def main() -> None:
    """Reads the flags, runs the missing trainings and writes the tables."""
    given, config = flags.FLAGS, flags.FLAGS.config
    share = parse_share(given.worker)
    cores = [] if given.tables_only else _cores()
    from music_jax.claims.budget import BUDGETS, images_of
    from music_jax.claims.cells import Results
    from music_jax.claims.methods import BUILT_IN, find_methods
    from music_jax.claims.planning import check_cells
    from music_jax.claims.sweep import Sweep
    from music_jax.claims.tables import CLAIMS, make_tables
    from music_jax.workdir.directory import open_workdir
    from music_jax.workdir.lock import WorkdirLock

    budget = BUDGETS[given.budget]
    name = config.dataset.name.partition("/")[0] + ("-small" if given.budget == "small" else "")
    sweep = Sweep(
        config=config,
        images=images_of(config.dataset.name, budget),
        budget=budget,
        methods=find_methods([text.strip() for text in given.objectives] or list(BUILT_IN)),
        claims=_claims(given.only, tuple(CLAIMS)) or budget.claims,
        seeds=budget.seeds if given.seeds is None else given.seeds,
        results=Results(open_workdir(given.output or os.path.join("results", name))),
    )
    check_cells(sweep)
    sweep.results.check_config(config, budget=given.budget)
    try:
        if not given.tables_only:
            from music_jax.claims.run_cells import run_missing
            from music_jax.data import datasets

            runs = open_workdir(given.runs or os.path.join("runs", "claims", name))
            own = runs / "locks" / f"{share.index}-of-{share.count}"
            own.mkdir(parents=True, exist_ok=True)
            with WorkdirLock(own):
                datasets.prepare(config)
                with contextlib.suppress(NotMeasurableError):  # which the cells report
                    if datasets.evaluation_sources(config).train.multi_label:
                        raise UserError(
                            f"the images of {config.dataset.name} may have several classes each; "
                            "the claims need one class, such as that of one feature"
                        )
                run_missing(sweep, runs=runs, cores=cores, share=share)
    finally:
        from music_jax.claims import report
        from music_jax.distributed import progress

        tables = make_tables(sweep)
        report.write_report(sweep, tables, sweep.results.directory)
        progress.say_lines(report.as_text(tables))


def _claims(only: list[str], known: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the numbers of claims in a list of texts."""
    numbers = {str(number): number for number in known}
    for text in only:
        if text.strip() not in numbers:
            raise UserError(
                f"--only={','.join(only)}: there is no claim {text!r}; there are "
                f"{', '.join(numbers)}"
            )
    return tuple(sorted({numbers[text.strip()] for text in only}))


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
    count = flags.FLAGS.workers or usable_cores()
    if not hasattr(os, "sched_getaffinity"):  # which exists on Linux only
        return [None] * count
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i % len(cores)] for i in range(count)]


if __name__ == "__main__":
    flags.DEFINE_list("objectives", [], "Objectives to compare; all built-in ones by default.")
    flags.DEFINE_integer(
        "seeds", None, "Number of final seeds. [10; 3 with --budget=small]", lower_bound=1
    )
    flags.DEFINE_enum("budget", "full", ["full", "small"], "Size of the search and trainings.")
    flags.DEFINE_list("only", [], "Numbers of the claims to test. [all; 1,6 if small]")
    flags.DEFINE_string("output", None, "Directory of the results. [results/DATASET]")
    flags.DEFINE_string("runs", None, "Directory of the trainings. [runs/claims/DATASET]")
    flags.DEFINE_string("worker", "0/1", "I/N: runs share I of N of the cells, from 0 to N-1.")
    flags.DEFINE_integer(
        "workers", None, "Number of processes on CPU. [one per core]", lower_bound=1
    )
    flags.DEFINE_boolean("tables_only", False, "Only writes the tables of the existing results.")
    cli.run(main, _USAGE, config="file")
