"""`python -m music_jax.linear_eval`: linear probe and kNN of a checkpoint."""

from absl import flags
from ml_collections import config_dict, config_flags

from music_jax import cli
from music_jax.config import default_config, from_json, is_free, validate
from music_jax.errors import UserError

_USAGE = """
Trains a linear classifier on the frozen backbone of a run's latest checkpoint, and classifies by
nearest neighbours; writes linear_eval.json and knn.json into the workdir.

  python -m music_jax.linear_eval --workdir=runs/mnist5k
  python -m music_jax.linear_eval --workdir=runs/mnist5k --checkpoint=300
  python -m music_jax.linear_eval --workdir=runs/mnist5k --config.linear_eval.num_epochs=200

Exit codes: 0 done; 2 wrong input; 3 unusable data.
"""


def main() -> None:
    """Reads the flags and evaluates."""
    if not cli.WORKDIR.value:
        raise UserError("--workdir=DIR is missing: the directory of the run to evaluate")
    from music_jax.compilation_cache import use_compilation_cache
    from music_jax.mesh import use_cores

    cli.join_cluster()
    use_cores(batch_size=4)  # any batch is filled up, so that all devices get some of it
    use_compilation_cache(cli.WORKDIR.value)
    overrides = dict(config_flags.get_override_values(flags.FLAGS["config"]))
    linear_eval(cli.WORKDIR.value, checkpoint=flags.FLAGS.checkpoint, overrides=overrides)


def linear_eval(
    workdir: str, *, checkpoint: str | None = None, overrides: dict[str, object] | None = None
) -> None:
    """Evaluates a checkpoint of a run, writes linear_eval.json and knn.json and prints the table.

    Args:
      workdir: of the run.
      checkpoint: its step, or its directory; None for the latest.
      overrides: config fields, by dotted name, to evaluate with in place of the run's own.

    Raises:
      UserError: there is no such run or checkpoint, or an override would change what was trained.
    """
    from music_jax import progress, records
    from music_jax.data import datasets
    from music_jax.evaluation.evaluate import evaluate, read_results, results_table
    from music_jax.mesh import is_main_process, make_data_mesh
    from music_jax.train.restore import restore_run

    directory = records.open_workdir(workdir, create=False)
    saved = records.read_config(directory)
    if saved is None:
        raise UserError(f"{workdir} holds no run: it has no config.json")
    config = from_json(saved)
    _apply(config, overrides or {})
    validate(config)
    datasets.prepare(config)
    sources = datasets.evaluation_sources(config, datasets.training_source(config))
    if sources is None:
        raise UserError(
            f"{workdir} was trained on images without a test set; name labelled ones with "
            "--config.evaluation.test=, and --config.evaluation.train= to learn from"
        )
    skipped = records.open_skipped(directory, config)

    mesh = make_data_mesh()
    step, recipe, state = restore_run(directory, config, checkpoint, mesh)
    evaluate(
        config,
        directory,
        sources,
        skipped=skipped,
        network=recipe.network,
        params=state.params,
        batch_stats=state.batch_stats,
        step=step,
        mesh=mesh,
    )
    results = read_results(config, directory, step) if is_main_process() else None
    if results is not None:
        progress.say(results_table(results))
    records.report_skipped(skipped)


def _apply(config: config_dict.ConfigDict, overrides: dict[str, object]) -> None:
    for field, value in overrides.items():
        if not is_free(field):
            raise UserError(
                f"config.{field} belongs to the training, which is over; only how it is evaluated "
                "can change: evaluation, linear_eval, knn, dataset.test_split, dataset.data_dir"
            )
        config.update_from_flattened_dict({field: value})


if __name__ == "__main__":
    config_flags.DEFINE_config_dict(
        "config",
        default_config(),
        "--config.linear_eval.FIELD=VALUE, --config.knn.FIELD=VALUE and the like change how the "
        "run is evaluated.",
    )
    flags.DEFINE_string(
        "checkpoint", None, "Step of the checkpoint, or its directory; by default the latest."
    )
    cli.run(main, _USAGE)
