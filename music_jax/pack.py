"""Packs a dataset's images into a few large files, with the shorter side shrunk.

The output consists of array_record shards of JPEGs or uncompressed images and is read like a
folder, with --config.dataset.path=DIR. To resume a stopped command, rerun it with the same
arguments. If the output is complete, the command reports this. Several workers may pack shares of
one dataset, at the same time or not; the last one to finish completes it.

  python -m music_jax.pack --source=photos --output=photos-320
  python -m music_jax.pack --source=imagenet2012:train --output=imagenet-320 --shorter_side=320
  python -m music_jax.pack --source='wds:train-{000..127}.tar' --output=train --worker=0/4
  python -m music_jax.pack --source='parquet:data/train-*.parquet' --output=train

Exit codes: 0 done; 2 wrong input; 3 unusable data; 75 stopped by a signal, complete shards saved.
"""

import dataclasses
import re

from absl import flags
from etils import epath

from music_jax import cli
from music_jax.errors import MusicError


def main() -> None:
    """Reads the flags and packs."""
    given = flags.FLAGS
    from music_jax.config import default_config
    from music_jax.data import datasets
    from music_jax.data.packing import Packing, pack
    from music_jax.data.parquet_source import open_parquet
    from music_jax.data.tar_source import open_tars
    from music_jax.distributed import progress
    from music_jax.distributed.shares import parse_share

    share = parse_share(given.worker)
    names = [field.name for field in dataclasses.fields(Packing)]
    packing = Packing(**{name: getattr(given, name) for name in names})
    config = default_config()
    config.dataset.data_dir = given.data_dir
    config.dataset.manual_dir = given.manual_dir
    config.dataset.num_channels, config.dataset.pixel_type = given.channels, given.pixel_type
    keys = {"image_key": given.image_key, "label_key": given.label_key}
    config.dataset.update({name: key for name, key in keys.items() if key is not None})
    kind, _, pattern = given.source.partition(":")
    try:
        if open_files := {"wds": open_tars, "parquet": open_parquet}.get(kind):
            source = open_files(pattern, **keys)
        else:
            source = datasets.open_named(config, given.source, prepare=True)
        num_images = pack(
            datasets.check_pixels(config, source),
            epath.Path(given.output).expanduser(),
            packing,
            share=share,
            max_skipped_share=given.max_skipped_share,
            num_threads=given.num_threads,
        )
    except MusicError as error:
        raise type(error)(_with_own_flags(str(error))) from error
    if num_images is None:
        progress.say(
            f"share {share} of {given.output} is done, and others are not; the last one completes "
            "the dataset"
        )
        return
    progress.say(
        f"{given.output} holds {num_images:,} images; train on them with "
        f"--config.dataset.path={given.output}"
    )


def _with_own_flags(message: str) -> str:
    """Returns a message with the fields of a config replaced by the flags of this command."""
    names = "data_dir|manual_dir|image_key|label_key|max_skipped_share|pixel_type"
    message = message.replace("config.dataset.num_channels", "--channels")
    return re.sub(rf"(--)?config\.dataset\.({names})", r"--\2", message)


if __name__ == "__main__":
    flags.DEFINE_string(
        "source",
        None,
        "A folder of images; NAME:SPLIT of a TFDS dataset, or hf:NAME:SPLIT; wds:PATTERN or "
        "parquet:PATTERN for WebDataset tars or Parquet files, with {000..127}, * and ? in names.",
    )
    flags.DEFINE_string("output", None, "Directory for the shards and their index.")
    flags.DEFINE_integer("shorter_side", 320, "Target length of the shorter side in pixels.")
    flags.DEFINE_enum(
        "encoding",
        "jpeg",
        ["jpeg", "raw", "npy"],
        "Format of the images; raw ones need no decoding, but about eight times the space, and npy "
        "ones may have any number of channels and any pixel type.",
    )
    flags.DEFINE_integer("quality", 90, "Quality of the JPEGs, 1 to 100.")
    flags.DEFINE_integer("channels", 3, "1 for grayscale, 3 for color, any number for npy.")
    flags.DEFINE_enum(
        "pixel_type",
        "uint8",
        ["uint8", "uint16", "float32"],
        "Type of the pixels' values; uint8 unless --encoding=npy.",
    )
    flags.DEFINE_integer("shard_size", 4096, "Number of images per shard.")
    flags.DEFINE_string(
        "worker",
        "0/1",
        "I/N: packs share I of N, from 0 to N-1; all workers have the same --output.",
    )
    flags.DEFINE_integer("num_threads", None, "Threads; one per core by default.", lower_bound=1)
    flags.DEFINE_float("max_skipped_share", 0.01, "Largest share of unreadable images.", 0.0, 1.0)
    flags.DEFINE_string(
        "image_key", None, "Feature, column or (wds:) extension of the images, if not a usual one."
    )
    flags.DEFINE_string(
        "label_key", None, "Feature, column, extension or field of .json of the labels, likewise."
    )
    flags.DEFINE_string("data_dir", None, "Directory of TFDS, if not the default one.")
    flags.DEFINE_string("manual_dir", None, "Directory of files that TFDS cannot download itself.")
    cli.run(main, __doc__, required=["source", "output"])
