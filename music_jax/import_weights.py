"""`python -m music_jax.import_weights`: weights from elsewhere as a run, to be evaluated."""

from absl import flags

from music_jax import cli
from music_jax.errors import UserError

_USAGE = """
Makes a workdir of a ResNet-18/34/50 in the layout of torchvision and timm, which the checkpoints of
Barlow Twins and VICReg have, too, or of a ResNet that lightly wrapped (backbone.0.weight), or of a
vision transformer of timm's with MoCo v3's position embedding. linear_eval, evaluate, export and
encode then take it like any run.

  python -m music_jax.import_weights --weights=resnet50.safetensors --workdir=runs/barlow \\
      --config.dataset.name=imagenet2012 --config.dataset.test_split=validation
  python -m music_jax.linear_eval --workdir=runs/barlow --config.dataset.name=imagenet2012

Which backbone it is follows from the file, and so does a prefix such as module.backbone.; heads are
left out. The number of a transformer's attention heads does not follow: MoCo v3's checkpoints are
recognized by their names, for others --config.backbone.num_heads= says it. What else the file does
not tell, and was assumed, is printed. A .pth file is a pickle, which is not opened here; where
torch is, convert it:

  {convert}

Exit codes: 0 done; 2 wrong input; 75 stopped by a signal.
"""


def main() -> None:
    """Reads the flags and imports."""
    given = flags.FLAGS
    if not given.weights:
        raise UserError("--weights=FILE is missing: a safetensors file")
    if not given.workdir:
        raise UserError("--workdir=DIR is missing: a directory for the run")
    from music_jax.distributed import progress
    from music_jax.exchange.importing import import_backbone

    imported = import_backbone(given.weights, given.workdir, given.config, prefix=given.prefix)
    progress.say(f"assumed, since the file does not tell: {imported.assumed}")
    if imported.excluded:
        counts = ", ".join(f"{name} ({count})" for name, count in imported.excluded.items())
        progress.say(f"left out, with the number of tensors: {counts}")
    progress.say(
        f"{given.workdir} holds the {imported.config.backbone.name} of {given.weights}; "
        f"python -m music_jax.linear_eval --workdir={given.workdir} evaluates it"
    )


def _usage() -> str:
    from music_jax.exchange.weights import CONVERT_COMMAND

    return _USAGE.format(convert=CONVERT_COMMAND)


if __name__ == "__main__":
    flags.DEFINE_string("weights", None, "The safetensors file.")
    flags.DEFINE_string(
        "prefix", None, "What the backbone's tensors begin with, if the file has several backbones."
    )
    cli.define_config_fields(
        "--config.FIELD=VALUE says on what and how it is to be evaluated.",
    )
    cli.run(main, _usage(), in_processes=False)
