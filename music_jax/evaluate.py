r"""Evaluates a run's checkpoint with any of the protocols.

Writes NAME.json for each protocol (linear_eval.json for the linear probe) into the workdir, or into
--output=DIR.

  python -m music_jax.evaluate --workdir=runs/mnist5k
  python -m music_jax.evaluate --workdir=runs/mnist5k --protocols=knn,segments --checkpoint=1550
  python -m music_jax.evaluate --workdir=runs/cifar10 --protocols=transfer \
      --transfer=cifar100:train:test
  python -m music_jax.evaluate --workdir=runs/folder --protocols=linear \
      --config.evaluation.train=photos/train --config.evaluation.test=photos/test
  python -m music_jax.evaluate --workdir=/shared/runs/mnist5k --output=results/mnist5k

For a run that somebody else trained, or that was trained elsewhere, give the location of the images
again, such as --config.dataset.path=DIR: locations that only its config.json names are not read.

The protocols:

  linear      linear classifier on frozen features, learning rates swept
  knn         weighted vote of the 10, 20 and 200 nearest training images
  fewshot     1, 5 and 10 labels per class, over 20 draws
  retrieval   mean average precision of searches among the training images
  clustering  the segments' units as clusters, without training; for the objective MUSIC
  label_free  RankMe, LiDAR, alpha-ReQ, uniformity, alignment; needs no labels
  segments    use of the units, information between segments, gap to the bound; needs no labels
  semi        fine-tuning on 1 % and 10 % of the labels
  finetune    fine-tuning on all labels
  transfer    linear and knn on other datasets, named by --transfer

Features are computed once and cached in features/ beside the results, which may be deleted at any
time. Existing results that were computed with the same settings are reused; see --force.

Images without a label are used only by protocols that need no labels; their number is logged.

Exit codes: 0 done; 2 wrong input; 3 unusable data, or a probe diverged; 75 stopped by a signal.
"""

from absl import flags

from music_jax import cli

_DEFAULT = ("linear", "knn", "fewshot", "retrieval", "clustering", "label_free", "segments")


def main() -> None:
    """Reads the flags and evaluates."""
    cli.begin_evaluation()
    evaluate(
        flags.FLAGS.workdir,
        protocols=tuple(name.strip() for name in flags.FLAGS.protocols if name.strip()),
        output=flags.FLAGS.output,
        checkpoint=flags.FLAGS.checkpoint,
        transfer_sets=tuple(flags.FLAGS.transfer or ()),
        overrides=cli.config_overrides(),
        force=flags.FLAGS.force,
    )


def evaluate(
    workdir: str,
    *,
    protocols: tuple[str, ...] = _DEFAULT,
    output: str | None = None,
    checkpoint: str | int | None = None,
    transfer_sets: tuple[str, ...] = (),
    overrides: dict[str, object] | None = None,
    force: bool = False,
) -> dict[str, dict]:
    """Evaluates a checkpoint of a run, writes the results and prints them.

    Args:
      workdir: Workdir of the run.
      protocols: Names of protocols, as in `music_jax.evaluation.protocols.PROTOCOLS`.
      output: Directory for the results; the workdir by default.
      checkpoint: Step of the checkpoint, or its directory; the latest by default.
      transfer_sets: Datasets as `--transfer` names them; they add the protocol `transfer`.
      overrides: Config fields by dotted name that replace the run's own in the evaluation.
      force: Whether to recompute existing results.

    Returns:
      The contents of the JSON files by protocol.

    Raises:
      UserError: There is no such run, checkpoint, protocol or dataset, or an override would change
        the training.
      DivergedError: A probe diverged.
    """
    from music_jax.data.skipped import report_skipped
    from music_jax.distributed import progress
    from music_jax.evaluation.protocols import PROTOCOLS, check_protocols, run_protocols
    from music_jax.evaluation.results import summary_table
    from music_jax.evaluation.run import load_run

    if transfer_sets and "transfer" not in protocols:
        protocols = (*protocols, "transfer")
    check_protocols(protocols, transfer_sets)
    run = load_run(
        workdir,
        output=output,
        checkpoint=checkpoint,
        overrides=overrides,
        labels=any(PROTOCOLS[name].labels for name in protocols),
        images=any(name != "transfer" for name in protocols),
    )
    results = run_protocols(run, protocols, transfer_sets=transfer_sets, force=force)
    progress.say_lines(summary_table(results))
    report_skipped(run.skipped)
    return results


if __name__ == "__main__":
    flags.DEFINE_list("protocols", list(_DEFAULT), "Names of protocols.")
    flags.DEFINE_multi_string(
        "transfer",
        None,
        "A dataset to transfer to: NAME:TRAIN:TEST with the splits of TFDS, or SET:SET, each a "
        "folder or NAME:SPLIT.",
    )
    flags.DEFINE_string("output", None, "Directory for the results; the workdir by default.")
    flags.DEFINE_bool("force", False, "Recomputes existing results.")
    cli.run(
        main,
        __doc__,
        workdir=True,
        checkpoint=True,
        processes=True,
        config="fields",
        required=["workdir"],
    )
