"""`python -m music_jax.report`: writes the report of one or several runs as one HTML file."""

import os

from absl import flags

from music_jax import cli
from music_jax.errors import UserError, require_extra

_USAGE = """
Writes one HTML file about a run, or about several side by side: accuracies with their baselines,
verdicts on collapse and redundancy, curves with the lower bounds of the objective, setup and cost,
what the segments share, the images of each unit, nearest neighbors, a map of the embedding,
augmented views, the probe's confusion matrix and most confident errors, and what was skipped,
rewound or resumed. A small network can be tried on your own images in the page. Several runs are
compared in a table, with intervals of the differences. The file needs no network connection, opens
from disk on a computer or a phone, and prints. The run may still be in progress.

  python -m music_jax.report --workdir=runs/mnist5k
  python -m music_jax.report --workdir=runs/music,runs/vicreg --output=compared.html
  python -m music_jax.report --workdir=runs/imagenet --images=400

For a run that somebody else trained, or that was trained elsewhere, give the location of its images
again, for example with --config.dataset.path=DIR: locations that only its config.json names are not
read.

The network is run on some of the test images, or of the training images if there are no others.
Without a checkpoint or images, the report has only the curves and tables, and gives the reason. The
confusion matrix needs the linear probe, with which a training ends; see music_jax.linear_eval.

Exit codes: 0 done; 2 wrong input; 75 stopped by a signal.
"""

_MIN_IMAGES, _MAX_IMAGES = 16, 4000


def main() -> None:
    """Reads the flags and writes the report."""
    workdirs, num_images = _split(flags.FLAGS.workdir or ""), flags.FLAGS.images
    if not workdirs:
        raise UserError("--workdir=DIR is missing; separate several runs with commas")
    if not _MIN_IMAGES <= num_images <= _MAX_IMAGES:
        raise UserError(f"--images must be from {_MIN_IMAGES} to {_MAX_IMAGES}; got {num_images}")
    with require_extra("report"):
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    from music_jax.distributed import progress
    from music_jax.distributed.mesh import use_cores
    from music_jax.report.page import write_report
    from music_jax.workdir.compilation_cache import use_compilation_cache

    use_cores(batch_size=4)  # batches are padded
    use_compilation_cache()
    path, size = write_report(
        workdirs, output=flags.FLAGS.output, num_images=num_images, overrides=cli.config_overrides()
    )
    progress.say(f"wrote {path} ({size / 1e6:.1f} MB); open it in a browser")


def _split(value: str) -> list[str]:
    """Splits paths at commas, unless the whole value is a directory."""
    if os.path.isdir(os.path.expanduser(value)):
        return [value]
    return [path.strip() for path in value.split(",") if path.strip()]


if __name__ == "__main__":
    flags.DEFINE_string(
        "output", None, "File to write; report.html in the (first) workdir by default."
    )
    flags.DEFINE_integer(
        "images", 1000, f"Number of images to show and measure, {_MIN_IMAGES} to {_MAX_IMAGES}."
    )
    cli.run(main, _USAGE, workdir=True, config="fields")
