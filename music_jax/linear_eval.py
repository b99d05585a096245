"""Trains a linear probe on a run's checkpoint and classifies by nearest neighbors.

Both use the features of the frozen backbone. The results are in linear_eval.json and knn.json in
the workdir, or in --output=DIR.

  python -m music_jax.linear_eval --workdir=runs/mnist5k
  python -m music_jax.linear_eval --workdir=runs/mnist5k --checkpoint=1550
  python -m music_jax.linear_eval --workdir=runs/mnist5k --config.linear_eval.num_epochs=200
  python -m music_jax.linear_eval --workdir=/shared/runs/mnist5k --output=results/mnist5k

For a run that somebody else trained, or that was trained elsewhere, give the location of the images
again, such as --config.dataset.path=DIR: locations that only its config.json names are not read.

Exit codes: 0 done; 2 wrong input; 3 unusable data, or a probe diverged; 75 stopped by a signal.
"""

from absl import flags

from music_jax import cli


def main() -> None:
    """Reads the flags and evaluates."""
    cli.begin_evaluation()
    linear_eval(
        flags.FLAGS.workdir,
        output=flags.FLAGS.output,
        checkpoint=flags.FLAGS.checkpoint,
        overrides=cli.config_overrides(),
    )


def linear_eval(
    workdir: str,
    *,
    output: str | None = None,
    checkpoint: str | int | None = None,
    overrides: dict[str, object] | None = None,
) -> None:
    """Evaluates a checkpoint of a run, writes linear_eval.json and knn.json and prints a table.

    Args:
      workdir: Workdir of the run.
      output: Directory for the results; the workdir by default.
      checkpoint: Step of the checkpoint, or its directory; the latest by default.
      overrides: Config fields by dotted name that replace the run's own in the evaluation.

    Raises:
      UserError: There is no such run or checkpoint, or an override would change the training.
    """
    from music_jax.data.skipped import report_skipped
    from music_jax.distributed import progress
    from music_jax.evaluation.protocols import final_protocols, run_protocols
    from music_jax.evaluation.results import results_table
    from music_jax.evaluation.run import load_run

    run = load_run(workdir, output=output, checkpoint=checkpoint, overrides=overrides)
    results = run_protocols(run, final_protocols(run.config), force=True)
    progress.say_lines(results_table(results))
    report_skipped(run.skipped)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Directory for the results; the workdir by default.")
    cli.run(
        main,
        __doc__,
        workdir=True,
        checkpoint=True,
        processes=True,
        config="fields",
        required=["workdir"],
    )
