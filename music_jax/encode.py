"""Computes the features of every image in a folder.

They come from the backbone of a run; with --codes, the most probable unit of each segment is
written too. To resume a stopped command, rerun it with the same arguments. With --worker, several
processes encode shares of the images; the last one to finish writes the output.

  python -m music_jax.encode --workdir=runs/mnist5k --images=photos --output=photos.npy
  python -m music_jax.encode --workdir=runs/mnist5k --images=photos --output=photos.parquet --codes
  python -m music_jax.encode --workdir=backbone.safetensors --images=photos --output=photos.npy

photos.npy is float32 [images, features], photos.codes.npy int32 [images, segments]; photos.npy.json
names the file of each row and the files that could not be read. photos.parquet has the columns
file, features and codes. --workdir also takes a safetensors file that music_jax.export wrote.

Exit codes: 0 done; 2 wrong input; 3 no image can be read; 75 stopped by a signal, all parts saved.
"""

from absl import flags

from music_jax import cli


def main() -> None:
    """Reads the flags and encodes."""
    given = flags.FLAGS
    from music_jax.data import datasets
    from music_jax.distributed import progress
    from music_jax.distributed.mesh import use_cores
    from music_jax.distributed.shares import parse_share
    from music_jax.exchange.encoder import Encoder, load_backbone
    from music_jax.exchange.folder_encoding import encode_folder

    share = parse_share(given.worker)
    use_cores(batch_size=4)  # Batches are padded, so that each device gets a part of any of them.
    source = datasets.open_path(given.images)
    trained = load_backbone(given.workdir, checkpoint=given.checkpoint)
    encoder = Encoder(trained, batch_size=given.batch_size)
    progress.say(encode_folder(encoder, source, given.output, codes=given.codes, share=share))


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "Folder of images, or output of music_jax.pack.")
    flags.DEFINE_string("output", None, "File to write, .npy or .parquet.")
    flags.DEFINE_boolean("codes", False, "Also writes the discrete code of each segment.")
    flags.DEFINE_integer("batch_size", 128, "Images per forward pass.", lower_bound=1)
    flags.DEFINE_string(
        "worker",
        "0/1",
        "I/N: encodes share I of N, from 0 to N-1; all workers have the same --output.",
    )
    cli.run(main, __doc__, workdir=True, checkpoint=True, required=["workdir", "images", "output"])
