"""`python -m music_jax.linear_eval`: linear probe and kNN of a checkpoint."""

from absl import flags

from music_jax import cli
from music_jax.cli import evaluation_command

_USAGE = """
Trains a linear classifier on the frozen backbone of a run's latest checkpoint, and classifies by
nearest neighbors; writes linear_eval.json and knn.json into the workdir.

  python -m music_jax.linear_eval --workdir=runs/mnist5k
  python -m music_jax.linear_eval --workdir=runs/mnist5k --checkpoint=1550
  python -m music_jax.linear_eval --workdir=runs/mnist5k --config.linear_eval.num_epochs=200
  python -m music_jax.linear_eval --workdir=/shared/runs/mnist5k --output=results/mnist5k

Of a run that somebody else trained, or trained elsewhere, name the places of the images again, such
as --config.dataset.path=DIR: places that only its config.json names are not read.

Exit codes: 0 done; 2 wrong input; 3 unusable data, or a probe diverged; 75 stopped by a signal.
"""


def main() -> None:
    """Reads the flags and evaluates."""
    workdir, overrides = evaluation_command.begin()
    linear_eval(
        workdir,
        output=flags.FLAGS.output,
        checkpoint=flags.FLAGS.checkpoint,
        overrides=overrides,
    )


def linear_eval(
    workdir: str,
    *,
    output: str | None = None,
    checkpoint: str | None = None,
    overrides: dict[str, object] | None = None,
) -> None:
    """Evaluates a checkpoint of a run, writes linear_eval.json and knn.json and prints the table.

    Args:
      workdir: of the run.
      output: Directory for the results; the workdir by default.
      checkpoint: its step, or its directory; None for the latest.
      overrides: config fields, by dotted name, to evaluate with in place of the run's own.

    Raises:
      UserError: there is no such run or checkpoint, or an override would change what was trained.
    """
    from music_jax.data.skipped import report_skipped
    from music_jax.distributed import progress
    from music_jax.evaluation.load_run import open_run
    from music_jax.evaluation.runner import final_protocols, measure
    from music_jax.evaluation.tables import results_table

    run = open_run(workdir, output=output, checkpoint=checkpoint, overrides=overrides)
    progress.say_lines(results_table(measure(run, final_protocols(run.config), again=True)))
    report_skipped(run.skipped)


if __name__ == "__main__":
    cli.define_config_fields(
        "--config.linear_eval.FIELD=VALUE, --config.knn.FIELD=VALUE and the like change how the "
        "run is evaluated.",
    )
    flags.DEFINE_string("output", None, "Directory for the results; by default the workdir.")
    flags.DEFINE_string(
        "checkpoint", None, "Step of the checkpoint, or its directory; by default the latest."
    )
    cli.run(main, _USAGE)
