"""Opening a run's workdir, to evaluate it."""

from etils import epath
from ml_collections import config_dict

from music_jax import records
from music_jax.config import from_json, is_free, validate
from music_jax.data import datasets
from music_jax.errors import UserError
from music_jax.evaluation.run import Run
from music_jax.mesh import make_data_mesh
from music_jax.train.checkpoints import Checkpoints
from music_jax.train.state import abstract_state
from music_jax.train.step import make_recipe


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
    recipe = make_recipe(config, steps_per_epoch=1)  # the optimiser is only needed for its shapes
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        if checkpoint is None:
            step = checkpoints.latest_whole_step()
        else:
            step = _named_step(checkpoint, directory, checkpoints.all_steps())
            checkpoints.check_whole(step)
        if step is None:
            raise UserError(f"{directory} has no checkpoint yet")
        state = checkpoints.restore(step, abstract_state(config, recipe.optimizer), mesh)
    finally:
        checkpoints.close()
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
                f"config.{field} belongs to the training, which is over; only how it is evaluated "
                "can change: evaluation, linear_eval, knn, few_shot, semi_supervised, finetune, "
                "retrieval, clustering, dataset.test_split, dataset.data_dir"
            )
        config.update_from_flattened_dict({field: value})


def _named_step(checkpoint: str, directory: epath.Path, steps: list[int]) -> int:
    name = checkpoint.rstrip("/").rpartition("/")[2]
    if "/" in checkpoint:
        where = epath.Path(checkpoint.rstrip("/")).expanduser().resolve().parent
        if where != directory / "checkpoints":
            raise UserError(f"--checkpoint={checkpoint} is not below {directory}/checkpoints")
    if not name.isdigit() or int(name) not in steps:
        known = ", ".join(str(step) for step in sorted(steps)) or "none"
        raise UserError(f"there is no checkpoint {checkpoint!r}; the run has the steps {known}")
    return int(name)
