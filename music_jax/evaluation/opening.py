"""Opening a run's workdir, to evaluate it."""

from ml_collections import config_dict

from music_jax import records
from music_jax.config import FREE_FIELDS, from_json, is_free, validate
from music_jax.data import datasets
from music_jax.errors import UserError
from music_jax.evaluation.run import Run
from music_jax.mesh import make_data_mesh
from music_jax.train.restore import restore_run


def open_run(
    workdir: str, *, checkpoint: str | None = None, overrides: dict[str, object] | None = None
) -> Run:
    """Opens a run with one of its checkpoints.

    Args:
      workdir: of the run.
      checkpoint: its step, or its directory; None for the latest.
      overrides: config fields, by dotted name, to evaluate with in place of the run's own.

    Returns:
      The run.

    Raises:
      UserError: there is no such run or checkpoint, or an override would change what was trained.
    """
    directory = records.open_workdir(workdir, create=False)
    saved = records.read_config(directory)
    if saved is None:
        raise UserError(f"{workdir} holds no run: it has no config.json")
    config = from_json(saved)
    _apply(config, overrides or {})
    validate(config)
    datasets.prepare(config)
    training = datasets.training_source(config)
    sources = datasets.evaluation_sources(config, training)

    mesh = make_data_mesh()
    step, recipe, state = restore_run(directory, config, checkpoint, mesh)
    return Run(
        config=config,
        workdir=directory,
        sources=sources,
        images=sources.test if sources else training,
        network=recipe.network,
        params=state.params,
        batch_stats=state.batch_stats,
        step=step,
        mesh=mesh,
        skipped=records.open_skipped(directory, config),
    )


def _apply(config: config_dict.ConfigDict, overrides: dict[str, object]) -> None:
    for field, value in overrides.items():
        if not is_free(field):
            raise UserError(
                f"config.{field} belongs to the training, which is over; what can change is "
                f"{', '.join(FREE_FIELDS)}"
            )
        config.update_from_flattened_dict({field: value})
