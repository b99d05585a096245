"""`python -m music_jax.report`: a run, or several side by side, as one HTML file."""

import os

from absl import flags
from ml_collections import config_flags

from music_jax import cli
from music_jax.errors import UserError

_USAGE = """
Writes one HTML file that shows a run: what was run and on what, its curves with the bounds of the
objective, its results beside raw pixels and random initialization, the joint probability of its
segments, what each unit stands for, nearest neighbors, a map of the embedding, augmented views,
the probe's confusions, and what was skipped, rewound or resumed. The file needs no network, and
opens from disk on a computer or a phone. It may be written while the run goes on.

  python -m music_jax.report --workdir=runs/mnist5k
  python -m music_jax.report --workdir=runs/music,runs/vicreg --output=compared.html
  python -m music_jax.report --workdir=runs/imagenet --images=400

Of a run that somebody else trained, or trained elsewhere, name the places of the images again, such
as --config.dataset.path=DIR: places that only its config.json names are not read.

The network is run on some of the test images (of the training images, where there are no others);
without a checkpoint or without the images the report has the curves and figures alone, and says so.
The confusion matrix needs the linear probe, which a training ends with; see music_jax.linear_eval.

Exit codes: 0 done; 2 wrong input; 75 stopped by a signal.
"""

_FEWEST, _MOST = 16, 4000


def main() -> None:
    """Reads the flags and writes the report."""
    given, num_images = flags.FLAGS.workdir, flags.FLAGS.images
    workdirs = _workdirs(given or "")
    if not workdirs:
        raise UserError("--workdir=DIR is missing: the run to show; several with commas between")
    if not _FEWEST <= num_images <= _MOST:
        raise UserError(f"--images must be from {_FEWEST} to {_MOST}; got {num_images}")
    from music_jax.exchange.extras import needs

    with needs("plotly", "report"):
        import plotly  # noqa: F401
    with needs("jinja2", "report"):
        import jinja2  # noqa: F401
    with needs("cv2", "data"):
        import cv2  # noqa: F401
    from music_jax.distributed import progress
    from music_jax.distributed.mesh import use_cores
    from music_jax.report.page import write_report
    from music_jax.report.reading import check_workdirs
    from music_jax.workdir.user_directories import use_compilation_cache

    check_workdirs(workdirs)
    use_cores(batch_size=4)  # any batch is filled up
    use_compilation_cache()
    path, size = write_report(
        workdirs,
        output=flags.FLAGS.output,
        num_images=num_images,
        overrides=dict(config_flags.get_override_values(flags.FLAGS["config"])),
    )
    progress.say(f"wrote {path} ({size / 1e6:.1f} MB); open it in a browser")


def _workdirs(given: str) -> list[str]:
    """The paths between commas; one path if there is such a directory."""
    if os.path.isdir(os.path.expanduser(given)):
        return [given]
    return [path.strip() for path in given.split(",") if path.strip()]


if __name__ == "__main__":
    cli.define_config_fields(
        "--config.dataset.data_dir=DIR and the like say where the images of the runs are.",
    )
    flags.DEFINE_string(
        "output", None, "The file to write; by default report.html in the (first) workdir."
    )
    flags.DEFINE_integer(
        "images", 1000, f"How many images to show and measure, {_FEWEST} to {_MOST}."
    )
    cli.run(main, _USAGE, in_processes=False)
