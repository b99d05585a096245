r"""Exports the backbone of a run for other programs.

Writes the backbone with the constants of its preprocessing, and beside it a model card, FILE.md
(for timm, DIR/README.md).

  python -m music_jax.export --workdir=runs/mnist5k --format=onnx --output=backbone.onnx
  python -m music_jax.export --workdir=runs/imagenet --format=torchvision \
      --output=backbone.safetensors --license=apache-2.0

  safetensors  by this package's names; music_jax.load reads it
  torchvision  safetensors by torchvision's and timm's names; load_state_dict(strict=True) takes it
  onnx         normalized images in, features out; any batch size
  stablehlo    images in, features out; any batch size; jax alone runs it
  orbax        a directory with the parameters as nested dictionaries
  timm         a directory that timm.create_model("local-dir:DIR", pretrained=True) loads

Exit codes: 0 done; 2 wrong input; 75 stopped by a signal.
"""

from absl import flags
from etils import epath

from music_jax import cli
from music_jax.errors import UserError


def main() -> None:
    """Reads the flags and exports."""
    given = flags.FLAGS
    from music_jax.distributed import progress

    path, card = export(
        given.workdir,
        form=given.format,
        output=given.output,
        checkpoint=given.checkpoint,
        num_classes=given.num_classes,
        license_name=given.license,
    )
    progress.say(f"the backbone is in {path}, its model card in {card}")


def export(
    workdir: str,
    *,
    form: str,
    output: str,
    checkpoint: str | int | None = None,
    num_classes: int = 1000,
    license_name: str | None = None,
) -> tuple[epath.Path, epath.Path]:
    """Writes a backbone, and its model card beside it, or for `timm` in the same directory.

    Args:
      workdir: Directory of a run, or a safetensors file that was exported from one.
      form: Format: `safetensors`, `torchvision`, `onnx`, `stablehlo`, `orbax` or `timm`.
      output: Path of the file, or for `orbax` and `timm` of a directory that does not exist yet.
      checkpoint: Step of the checkpoint, or its directory; the latest by default.
      num_classes: Size of the all-zero classifier in the format `torchvision`; 0 for none.
      license_name: License of the weights, for the model card.

    Returns:
      The paths of the backbone and of the model card.

    Raises:
      UserError: There is no such run or checkpoint, the format cannot hold this backbone, or the
        output cannot be written.
    """
    from music_jax.exchange import formats
    from music_jax.exchange.encoder import load_backbone

    if form not in formats.FORMATS:
        raise UserError(f"--format must be one of {', '.join(formats.FORMATS)}; got {form!r}")
    if num_classes < 0:
        raise UserError(f"--num_classes must be 0 or more; got {num_classes}")
    trained = load_backbone(workdir, checkpoint=checkpoint)
    where = epath.Path(workdir).expanduser()
    return formats.write(
        trained,
        form,
        output,
        num_classes=num_classes,
        workdir=where if where.is_dir() else None,
        license_name=license_name,
    )


if __name__ == "__main__":
    flags.DEFINE_enum(
        "format",
        None,
        ["safetensors", "torchvision", "onnx", "stablehlo", "orbax", "timm"],
        "Format; see above.",
    )
    flags.DEFINE_string("output", None, "File to write; for orbax and timm, a directory.")
    flags.DEFINE_integer(
        "num_classes",
        1000,
        "For torchvision: size of the all-zero classifier that its networks have; 0 for none.",
    )
    flags.DEFINE_string("license", None, "License of the weights, for the model card.")
    cli.run(main, __doc__, workdir=True, checkpoint=True, required=["workdir", "format", "output"])
