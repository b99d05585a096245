"""`python -m music_jax.export`: a trained backbone for use elsewhere."""

from absl import flags
from etils import epath

from music_jax import cli
from music_jax.errors import UserError

_USAGE = """
Writes the backbone of a run for use elsewhere, with the constants of its preprocessing, and beside
it a model card, FILE.md.

  python -m music_jax.export --workdir=runs/mnist5k --format=onnx --output=backbone.onnx
  python -m music_jax.export --workdir=runs/imagenet --format=torchvision \\
      --output=backbone.safetensors --license=apache-2.0

  safetensors  by our names; music_jax.load reads it
  torchvision  safetensors by torchvision's and timm's names; load_state_dict(strict=True) takes it
  onnx         normalized images in, features out; any batch
  stablehlo    uint8 images in, features out; any batch; jax alone runs it
  orbax        a directory, the parameters as nested dictionaries

Exit codes: 0 done; 2 wrong input; 75 stopped by a signal.
"""


def main() -> None:
    """Reads the flags and exports."""
    given = flags.FLAGS
    if not given.workdir:
        raise UserError("--workdir=DIR is missing: the run whose backbone is exported")
    if not given.format:
        raise UserError("--format is missing: safetensors, torchvision, onnx, stablehlo or orbax")
    if not given.output:
        raise UserError("--output=FILE is missing: where the backbone goes")
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
    checkpoint: str | None = None,
    num_classes: int = 1000,
    license_name: str | None = None,
) -> tuple[epath.Path, epath.Path]:
    """Writes a backbone, and its model card beside it.

    Args:
      workdir: of the run; or a safetensors file that was exported from one.
      form: `safetensors`, `torchvision`, `onnx`, `stablehlo` or `orbax`.
      output: the file; for `orbax` a directory that is not there yet.
      checkpoint: its step, or its directory; None for the latest.
      num_classes: of the classifier, which is zero, in the form `torchvision`; 0 for none.
      license_name: of the weights, for the card.

    Returns:
      Where the backbone is, and where the card.

    Raises:
      UserError: there is no such run or checkpoint, the form cannot hold this backbone, or the
        output cannot be written.
    """
    from music_jax.distributed.progress import escape_surrogates
    from music_jax.exchange import formats, torch_names
    from music_jax.exchange.model_card import model_card
    from music_jax.exchange.trained import read_trained
    from music_jax.workdir.files import write_new

    if form not in formats.FORMATS:
        raise UserError(f"--format must be one of {', '.join(formats.FORMATS)}; got {form!r}")
    if num_classes < 0:
        raise UserError(f"--num_classes must be 0 or more; got {num_classes}")
    trained = read_trained(workdir, checkpoint=checkpoint)
    if form == "torchvision":
        torch_names.check_exchangeable(trained.config)
    path = formats.write(trained, form, output, num_classes=num_classes)
    where = epath.Path(workdir).expanduser()
    card = path.with_name(path.name + ".md")
    text = model_card(
        trained,
        form=form,
        file_name=path.name,
        num_classes=num_classes,
        workdir=where if where.is_dir() else None,
        license_name=license_name,
    )
    try:
        write_new(card, escape_surrogates(text).encode())
    except OSError as error:
        raise UserError(f"cannot write the model card {card}: {error}") from error
    return path, card


if __name__ == "__main__":
    flags.DEFINE_enum(
        "format",
        None,
        ["safetensors", "torchvision", "onnx", "stablehlo", "orbax"],
        "What to write; see above.",
    )
    flags.DEFINE_string("output", None, "The file to write; with orbax, a directory.")
    flags.DEFINE_string(
        "checkpoint", None, "Step of the checkpoint, or its directory; by default the latest."
    )
    flags.DEFINE_integer(
        "num_classes",
        1000,
        "With torchvision: size of the classifier, all zero, that its networks have; 0 for none.",
    )
    flags.DEFINE_string("license", None, "Of the weights, for the model card.")
    cli.run(main, _USAGE, in_processes=False)
