"""`python -m music_jax.pack`: shrinks a dataset's images once, into a few large files."""

import re

from absl import flags
from etils import epath

from music_jax import cli
from music_jax.errors import MusicError, UserError

_USAGE = """
Packs images into array_record shards: the shorter side shrunk, as JPEG or uncompressed. What comes
out is read like a folder, with --config.dataset.path=DIR. Run again with the same arguments, it
goes on where it was stopped; once finished, it says so.

  python -m music_jax.pack --source=photos --output=photos-320
  python -m music_jax.pack --source=imagenet2012:train --output=imagenet-320 --shorter_side=320

Exit codes: 0 done; 2 wrong input; 3 unusable data; 75 stopped by a signal, all whole shards kept.
"""


def main() -> None:
    """Reads the flags and packs."""
    given = flags.FLAGS
    for name, meaning in (("source", "a folder, or NAME:SPLIT of TFDS"), ("output", "a directory")):
        if not given[name].value:
            raise UserError(f"--{name} is missing: {meaning}")
    from music_jax.config import default_config
    from music_jax.data import datasets
    from music_jax.data.packed import Packing, pack
    from music_jax.distributed import progress

    if not 0 <= given.max_skipped_share <= 1:
        raise UserError(f"--max_skipped_share must be in [0, 1]; got {given.max_skipped_share}")
    packing = Packing(
        shorter_side=given.shorter_side,
        encoding=given.encoding,
        quality=given.quality,
        channels=given.channels,
        shard_size=given.shard_size,
    )
    config = default_config()
    config.dataset.data_dir = given.data_dir
    config.dataset.manual_dir = given.manual_dir
    try:
        num_images = pack(
            datasets.open_named(config, given.source, prepare=True),
            epath.Path(given.output).expanduser(),
            packing,
            max_skipped_share=given.max_skipped_share,
            num_threads=given.num_threads,
        )
    except MusicError as error:
        raise type(error)(_by_own_flags(str(error))) from error
    progress.say(
        f"{given.output} holds {num_images:,} images; train on them with "
        f"--config.dataset.path={given.output}"
    )


def _by_own_flags(message: str) -> str:
    """The message with the fields of a config as the flags that they are here."""
    return re.sub(
        r"(--)?config\.dataset\.(data_dir|manual_dir|max_skipped_share)", r"--\2", message
    )


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "A folder of images, or NAME:SPLIT of a TFDS dataset.")
    flags.DEFINE_string("output", None, "Directory for the shards and their index.")
    flags.DEFINE_integer("shorter_side", 320, "What the shorter side is shrunk to, in pixels.")
    flags.DEFINE_enum(
        "encoding",
        "jpeg",
        ["jpeg", "raw"],
        "How images are kept; raw needs no decoding, and about eight times the room.",
    )
    flags.DEFINE_integer("quality", 90, "Of the JPEGs, 1 to 100.")
    flags.DEFINE_integer("channels", 3, "1 for gray, 3 for color.")
    flags.DEFINE_integer("shard_size", 4096, "Images of the source that go into one shard.")
    flags.DEFINE_integer("num_threads", None, "Threads; by default one a core.", lower_bound=1)
    flags.DEFINE_float("max_skipped_share", 0.01, "Of the images, that may be unreadable.")
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps its files, if not in its own default.")
    flags.DEFINE_string("manual_dir", None, "Where files lie that TFDS does not download itself.")
    cli.run(main, _USAGE, on_a_run=False)
