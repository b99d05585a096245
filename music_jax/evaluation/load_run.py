"""Loads a run from its workdir for evaluation."""

from etils import epath
from ml_collections import config_dict

from music_jax.checkpoint.manager import restore_network
from music_jax.config import FREE_FIELDS, from_json, is_free, validate
from music_jax.data import datasets
from music_jax.data.skipped import SkippedImages, UnlistedImages, open_skipped
from music_jax.data.sources import Source
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import NotMeasurableError, UserError
from music_jax.evaluation.run import Run
from music_jax.workdir.directory import find_workdir, open_workdir
from music_jax.workdir.run_config import (
    DATA_FIELDS,
    exclude_foreign_data,
    is_signed,
    read_config,
    read_signature,
)

_NO_IMAGES = Source("no images", (), "image", "label", 0)


def load_run(
    workdir: str,
    *,
    output: str | None = None,
    read_only: bool = False,
    checkpoint: str | None = None,
    overrides: dict[str, object] | None = None,
    labels: bool = True,
    images: bool = True,
) -> Run:
    """Loads a checkpoint of a run, and opens the images that it is evaluated on.

    Only images that are needed have to exist: the training images are opened if `evaluation.test`
    or, for labels, `evaluation.train` names no others.

    Args:
      workdir: Workdir of the run. Nothing is written into it if `output` is given.
      output: Directory for results; the workdir by default.
      read_only: Whether to write nothing at all, not even the list of images that cannot be
        decoded.
      checkpoint: Step or directory of the checkpoint; the latest by default.
      overrides: Config fields, by dotted name, that replace those of the run.
      labels: Whether to open labeled images, if there are any.
      images: Whether to open any images of the run.

    Raises:
      UserError: There is no such run or checkpoint, an override would change the training, or the
        images are in a location that only the run's files name; see `music_jax.workdir.run_config`.
    """
    given = overrides or {}
    directory = find_workdir(workdir)
    saved = read_config(directory)
    if saved is None:  # removed in the meantime
        raise UserError(f"{workdir} holds no run: it has no config.json")
    config = from_json(saved)
    own = is_signed(config, read_signature(directory))
    _override(config, given)
    validate(config, training=False)
    if not own:
        exclude_foreign_data(config, given, workdir, labels=labels, images=images)
    if read_only:
        results = directory
        skipped: SkippedImages = UnlistedImages(directory, max_share=1.0)
    else:
        results = _open_output(workdir, output)
        skipped = open_skipped(results, config)
    sources, why_no_sources, found = None, "", _NO_IMAGES
    if images:
        datasets.prepare(config, given)
        if labels:
            try:
                sources = datasets.evaluation_sources(config)
            except NotMeasurableError as error:
                why_no_sources = str(error)
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
        why_no_sources=why_no_sources,
    )


def _open_output(workdir: str, output: str | None) -> epath.Path:
    if output is not None:
        return open_workdir(output)
    try:
        return open_workdir(workdir, create=False)
    except UserError as error:
        raise UserError(
            f"{error}; or name another directory for the results with --output=DIR"
        ) from error


def _override(config: config_dict.ConfigDict, overrides: dict[str, object]) -> None:
    for field, value in overrides.items():
        if field == "dataset.path":  # the training images may have been moved
            if not config.dataset.path:
                raise UserError(
                    "config.dataset.path applies to runs trained on a folder; this one was trained "
                    f"on {config.dataset.name}: use config.dataset.data_dir"
                )
        elif not is_free(field) and field not in DATA_FIELDS:
            raise UserError(
                f"config.{field} cannot change after training; use one of "
                f"{', '.join((*DATA_FIELDS[:2], *FREE_FIELDS))}"
            )
        config.update_from_flattened_dict({field: value})
