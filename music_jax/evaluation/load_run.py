"""Opening a run's workdir, to evaluate it."""

from etils import epath
from ml_collections import config_dict

from music_jax.checkpoint.restore import restore_network
from music_jax.config import FREE_FIELDS, from_json, is_free, validate
from music_jax.data import datasets
from music_jax.data.skipped import SkippedImages, UnlistedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import NotMeasurableError, UserError
from music_jax.evaluation.run import Run
from music_jax.workdir import places, records

# Images for a run none of whose own are read.
_NO_IMAGES = Source("no images", (), "image", "label", 0)


def open_run(
    workdir: str,
    *,
    output: str | None = None,
    read_only: bool = False,
    checkpoint: str | None = None,
    overrides: dict[str, object] | None = None,
    labels: bool = True,
    images: bool = True,
) -> Run:
    """Opens a run with one of its checkpoints.

    Only images that are needed have to be there: those of the training are opened if
    `evaluation.test` or, for labels, `evaluation.train` names no others.

    Args:
      workdir: The run's workdir. Nothing is written into it if `output` is given.
      output: Directory that results go to; the workdir by default.
      read_only: Whether nothing is written at all, not even which images cannot be decoded.
      checkpoint: its step, or its directory; None for the latest.
      overrides: config fields, by dotted name, to evaluate with in place of the run's own.
      labels: whether images with labels are needed, if there are any.
      images: whether any images of the run are needed.

    Returns:
      The run.

    Raises:
      UserError: there is no such run or checkpoint, an override would change what was trained, or
        the images are in a place that only the run's files name; see `music_jax.workdir.places`.
    """
    given = overrides or {}
    directory = records.find_workdir(workdir)
    saved = records.read_config(directory)
    if saved is None:  # it was there a moment ago
        raise UserError(f"{workdir} holds no run: it has no config.json")
    config = from_json(saved)
    own = places.is_signed(config, records.read_signature(directory))
    _apply(config, given)
    validate(config)
    if not own:
        places.leave_out_foreign(config, given, workdir, labels=labels, images=images)
    if read_only:
        results = directory
        skipped: SkippedImages = UnlistedImages(directory, max_share=1.0)
    else:
        results = _open_output(workdir, output)
        skipped = records.open_skipped(results, config)
    sources, why_not, found = None, "", _NO_IMAGES
    if images:
        datasets.prepare(config, given)
        if labels:
            try:
                sources = datasets.evaluation_sources(config)
            except NotMeasurableError as error:
                why_not = str(error)
        found = sources.test if sources else datasets.evaluation_images(config)

    mesh = make_data_mesh()
    restored = restore_network(directory, config, checkpoint, mesh)
    return Run(
        config=config,
        workdir=results,
        sources=sources,
        images=found,
        network=restored.network,
        params=restored.params,
        batch_stats=restored.batch_stats,
        step=restored.step,
        mesh=mesh,
        skipped=skipped,
        why_not=why_not,
    )


def _open_output(workdir: str, output: str | None) -> epath.Path:
    if output is not None:
        return records.open_workdir(output)
    try:
        return records.open_workdir(workdir, create=False)
    except UserError as error:
        raise UserError(
            f"{error}; or name another place for the results with --output=DIR"
        ) from error


def _apply(config: config_dict.ConfigDict, overrides: dict[str, object]) -> None:
    for field, value in overrides.items():
        if field == "dataset.path":  # the images of the training may be elsewhere by now
            if not config.dataset.path:
                raise UserError(
                    f"config.dataset.path belongs to a training on a folder; this one was on "
                    f"{config.dataset.name}, whose place is config.dataset.data_dir"
                )
        elif not is_free(field) and field not in places.FIELDS:
            raise UserError(
                f"config.{field} belongs to the training, which is over; what can change is "
                f"{', '.join((*places.FIELDS[:2], *FREE_FIELDS))}"
            )
        config.update_from_flattened_dict({field: value})
