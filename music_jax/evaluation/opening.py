"""Opening a run's workdir, to evaluate it."""

from ml_collections import config_dict

from music_jax import records
from music_jax.config import FREE_FIELDS, from_json, is_free, validate
from music_jax.data import datasets
from music_jax.data.sources import Source
from music_jax.errors import NotMeasurableError, UserError
from music_jax.evaluation.run import Run
from music_jax.mesh import make_data_mesh
from music_jax.train.restore import restore_run

# Images for a run none of whose own are read.
_NO_IMAGES = Source("no images", (), "image", "label", 0)


def open_run(
    workdir: str,
    *,
    checkpoint: str | None = None,
    overrides: dict[str, object] | None = None,
    labels: bool = True,
    images: bool = True,
) -> Run:
    """Opens a run with one of its checkpoints.

    Only images that are needed have to be there: those of the training are opened if
    `evaluation.test` or, for labels, `evaluation.train` names no others.

    Args:
      workdir: of the run.
      checkpoint: its step, or its directory; None for the latest.
      overrides: config fields, by dotted name, to evaluate with in place of the run's own.
      labels: whether images with labels are needed, if there are any.
      images: whether any images of the run are needed.

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
    sources, why_not, found = None, "", _NO_IMAGES
    if images:
        named = config.evaluation
        datasets.prepare(config, training=not named.test or (labels and not named.train))
        if labels:
            try:
                sources = datasets.evaluation_sources(config)
            except NotMeasurableError as error:
                why_not = str(error)
        found = sources.test if sources else datasets.evaluation_images(config)

    mesh = make_data_mesh()
    step, recipe, state = restore_run(directory, config, checkpoint, mesh)
    return Run(
        config=config,
        workdir=directory,
        sources=sources,
        images=found,
        network=recipe.network,
        params=state.params,
        batch_stats=state.batch_stats,
        step=step,
        mesh=mesh,
        skipped=records.open_skipped(directory, config),
        why_not=why_not,
    )


def _apply(config: config_dict.ConfigDict, overrides: dict[str, object]) -> None:
    for field, value in overrides.items():
        if field == "dataset.path":  # the images of the training may be elsewhere by now
            if not config.dataset.path:
                raise UserError(
                    f"config.dataset.path belongs to a training on a folder; this one was on "
                    f"{config.dataset.name}, whose place is config.dataset.data_dir"
                )
        elif not is_free(field):
            raise UserError(
                f"config.{field} belongs to the training, which is over; what can change is "
                f"dataset.path, {', '.join(FREE_FIELDS)}"
            )
        config.update_from_flattened_dict({field: value})
