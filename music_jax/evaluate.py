"""`python -m music_jax.evaluate`: a checkpoint measured by any of the protocols."""

from absl import flags

from music_jax import cli
from music_jax.cli import evaluation_command

_USAGE = """
Measures a run's latest checkpoint by the protocols named, and writes NAME.json of each (for the
linear probe linear_eval.json) into the workdir, or into --output=DIR.

  python -m music_jax.evaluate --workdir=runs/mnist5k
  python -m music_jax.evaluate --workdir=runs/mnist5k --protocols=knn,segments --checkpoint=1550
  python -m music_jax.evaluate --workdir=runs/cifar10 --protocols=transfer \\
      --transfer=cifar100:train:test
  python -m music_jax.evaluate --workdir=runs/folder --protocols=linear \\
      --config.evaluation.train=photos/train --config.evaluation.test=photos/test
  python -m music_jax.evaluate --workdir=/shared/runs/mnist5k --output=results/mnist5k

Of a run that somebody else trained, or trained elsewhere, name the places of the images again, such
as --config.dataset.path=DIR: places that only its config.json names are not read.

The protocols:

  linear      linear classifier on frozen features, learning rates swept
  knn         weighted vote of the 10, 20 and 200 nearest training images
  fewshot     1, 5 and 10 labels a class, over 20 draws
  retrieval   mean average precision of searches among the training images
  clustering  the segments' units as clusters, with nothing trained; for the objective MUSIC
  label_free  RankMe, LiDAR, alpha-ReQ, uniformity, alignment; needs no labels
  segments    use of the units, information between segments, distance to the bound; no labels
  semi        fine-tuning on 1 % and 10 % of the labels
  finetune    fine-tuning on all labels
  transfer    linear and knn on other datasets, named by --transfer

Features are computed once and kept beside the results, in features/, which may be deleted at any
time. What has been measured in the same way before is not measured again; see --again.

Images without a label take part only in what needs no labels; a line says how many there were.

Exit codes: 0 done; 2 wrong input; 3 unusable data, or a probe diverged; 75 stopped by a signal.
"""

_DEFAULT = ("linear", "knn", "fewshot", "retrieval", "clustering", "label_free", "segments")


def main() -> None:
    """Reads the flags and evaluates."""
    workdir, overrides = evaluation_command.begin()
    evaluate(
        workdir,
        protocols=tuple(name.strip() for name in flags.FLAGS.protocols if name.strip()),
        output=flags.FLAGS.output,
        checkpoint=flags.FLAGS.checkpoint,
        transfer_sets=tuple(flags.FLAGS.transfer or ()),
        overrides=overrides,
        again=flags.FLAGS.again,
    )


def evaluate(
    workdir: str,
    *,
    protocols: tuple[str, ...] = _DEFAULT,
    output: str | None = None,
    checkpoint: str | None = None,
    transfer_sets: tuple[str, ...] = (),
    overrides: dict[str, object] | None = None,
    again: bool = False,
) -> dict[str, dict]:
    """Measures a checkpoint of a run, writes the figures and prints them.

    Args:
      workdir: of the run.
      protocols: names, as `music_jax.evaluation.runner.PROTOCOLS` has them.
      output: Directory for the results; the workdir by default.
      checkpoint: its step, or its directory; None for the latest.
      transfer_sets: as `music_jax.data.datasets.parse_pair` reads them; adds the protocol
        `transfer`.
      overrides: config fields, by dotted name, to evaluate with in place of the run's own.
      again: measure anew what was measured before in the same way.

    Returns:
      What the JSON files hold, by protocol.

    Raises:
      UserError: there is no such run, checkpoint, protocol or dataset, or an override would change
        what was trained.
      DivergedError: a probe diverged.
    """
    from music_jax.data.skipped import report_skipped
    from music_jax.distributed import progress
    from music_jax.evaluation.load_run import open_run
    from music_jax.evaluation.runner import PROTOCOLS, check_names, measure
    from music_jax.evaluation.tables import summary_table
    from music_jax.evaluation.transfer import parse_set

    if transfer_sets and "transfer" not in protocols:
        protocols = (*protocols, "transfer")
    check_names(protocols, transfer_sets)
    for spec in transfer_sets:
        parse_set(spec)
    run = open_run(
        workdir,
        output=output,
        checkpoint=checkpoint,
        overrides=overrides,
        labels=any(PROTOCOLS[name].labels for name in protocols),
        images=any(name != "transfer" for name in protocols),
    )
    results = measure(run, protocols, transfer_sets=transfer_sets, again=again)
    progress.say_lines(summary_table(results))
    report_skipped(run.skipped)
    return results


if __name__ == "__main__":
    cli.define_config_fields(
        "--config.few_shot.draws=VALUE, --config.knn.FIELD=VALUE and the like change how the run "
        "is evaluated.",
    )
    flags.DEFINE_list("protocols", list(_DEFAULT), "Names of protocols, with commas between.")
    flags.DEFINE_multi_string(
        "transfer",
        None,
        "A dataset to transfer to: NAME:TRAIN:TEST with the splits of TFDS, or SET:SET, each a "
        "folder or NAME:SPLIT. May be given more than once.",
    )
    flags.DEFINE_string("output", None, "Directory for the results; by default the workdir.")
    flags.DEFINE_string(
        "checkpoint", None, "Step of the checkpoint, or its directory; by default the latest."
    )
    flags.DEFINE_bool("again", False, "Measure anew what was measured before in the same way.")
    cli.run(main, _USAGE)
