r"""Computes the mean and the standard deviation of the channels of the training images.

The result is printed as fields of the config and cached for the user. A training with
--config.dataset.mean=() takes it from the cache, or computes it itself.

  python -m music_jax.channel_statistics --config=folder --config.dataset.path=tiles \
      --config.dataset.num_channels=13 --config.dataset.pixel_type=float32

Values of uint8 images are divided by 255; others are in the units of the files.

Exit codes: 0 done; 2 wrong input; 3 unusable data; 75 stopped by a signal.
"""

from absl import flags

from music_jax import cli


def main() -> None:
    """Reads the flags and computes."""
    config, count = flags.FLAGS.config, flags.FLAGS.count
    config.dataset.mean = config.dataset.std = ()
    from music_jax.config import validate
    from music_jax.data import datasets
    from music_jax.data.statistics import compute_and_cache
    from music_jax.distributed import progress

    validate(config)
    datasets.prepare(config, ["dataset.name"])
    source = datasets.training_source(config)
    found = compute_and_cache(source, source.fingerprint(times=True), config, count=count)
    progress.say(f"{found.num_images:,} of {len(source):,} images of {source.name}")
    progress.say(f"config.dataset.mean = {found.mean}")
    progress.say(f"config.dataset.std = {found.std}")


if __name__ == "__main__":
    flags.DEFINE_integer(
        "count",
        10_000,
        "Number of images to read, evenly spaced; all, if there are fewer.",
        lower_bound=1,
    )
    cli.run(main, __doc__, config="file")
