"""`python -m music_jax.encode`: the features of a folder of images."""

from absl import flags

from music_jax import cli
from music_jax.errors import UserError

_USAGE = """
Computes the features of every image of a folder by the backbone of a run, and with --codes the most
probable unit of each segment. Run again with the same arguments, it goes on where it was stopped.

  python -m music_jax.encode --workdir=runs/mnist5k --images=photos --output=photos.npy
  python -m music_jax.encode --workdir=runs/mnist5k --images=photos --output=photos.parquet --codes
  python -m music_jax.encode --workdir=backbone.safetensors --images=photos --output=photos.npy

photos.npy is float32 [images, features], photos.codes.npy int32 [images, segments]; photos.npy.json
gives the file of each row, and what could not be read. photos.parquet has the columns file,
features and codes. --workdir takes a file that music_jax.export wrote as safetensors, too.

Exit codes: 0 done; 2 wrong input; 3 no image can be read; 75 stopped by a signal, all parts kept.
"""


def main() -> None:
    """Reads the flags and encodes."""
    given = flags.FLAGS
    for flag, value, meaning in (
        ("workdir=DIR", given.workdir, "the run whose backbone computes the features"),
        ("images=FOLDER", given.images, "the images"),
        ("output=FILE", given.output, "a .npy or .parquet file for the features"),
    ):
        if not value:
            raise UserError(f"--{flag} is missing: {meaning}")
    if given.batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more; got {given.batch_size}")
    from music_jax.data import datasets
    from music_jax.distributed import progress
    from music_jax.distributed.mesh import use_cores
    from music_jax.exchange.backbone import load_backbone
    from music_jax.exchange.encoder import Encoder
    from music_jax.exchange.folder_encoding import encode_folder

    use_cores(batch_size=4)  # any batch is filled up
    source = datasets.open_path(given.images)
    trained = load_backbone(given.workdir, checkpoint=given.checkpoint)
    encoder = Encoder(trained, batch_size=given.batch_size)
    progress.say(encode_folder(encoder, source, given.output, codes=given.codes))


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "The folder, or what music_jax.pack made of one.")
    flags.DEFINE_string("output", None, "The file to write, .npy or .parquet.")
    flags.DEFINE_boolean("codes", False, "Also write the discrete code of each segment.")
    flags.DEFINE_string(
        "checkpoint", None, "Step of the checkpoint, or its directory; by default the latest."
    )
    flags.DEFINE_integer("batch_size", 128, "Images that go through the backbone at once.")
    cli.run(main, _USAGE, in_processes=False)
