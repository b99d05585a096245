r"""Imports external backbone weights as a run to evaluate.

Makes a workdir from a ResNet-18/34/50 in the layout of torchvision and timm, which the checkpoints
of Barlow Twins and VICReg also have, from a ResNet that lightly wrapped (backbone.0.weight), or
from a vision transformer of timm with MoCo v3's position embedding. linear_eval, evaluate, export
and encode then accept it like any run.

  python -m music_jax.import_weights --weights=resnet50.safetensors --workdir=runs/barlow \
      --config.dataset.name=imagenet2012 --config.dataset.test_split=validation
  python -m music_jax.linear_eval --workdir=runs/barlow --config.dataset.name=imagenet2012

The backbone is recognized by the names and shapes in the file, with any prefix such as
module.backbone.; heads are ignored. A transformer's number of attention heads is known for MoCo v3
only; give others with --config.backbone.num_heads=N. Other properties that the file does not
specify are assumed and printed. A .pth file is a pickle, which is not opened here; with torch,
convert it:

  {convert}

Exit codes: 0 done; 2 wrong input; 75 stopped by a signal.
"""

from absl import flags

from music_jax import cli


def main() -> None:
    """Reads the flags and imports."""
    given = flags.FLAGS
    from music_jax.distributed import progress
    from music_jax.exchange.importing import import_backbone

    imported = import_backbone(given.weights, given.workdir, given.config, prefix=given.prefix)
    progress.say(f"assumed, since the file does not specify it: {imported.assumed}")
    if imported.excluded:
        counts = ", ".join(f"{name} ({count})" for name, count in imported.excluded.items())
        progress.say(f"excluded, with the number of tensors: {counts}")
    progress.say(
        f"{given.workdir} holds the {imported.config.backbone.name} of {given.weights}; "
        f"python -m music_jax.linear_eval --workdir={given.workdir} evaluates it"
    )


if __name__ == "__main__":
    flags.DEFINE_string("weights", None, "Safetensors file.")
    flags.DEFINE_string(
        "prefix", None, "Prefix of the backbone's tensors, if the file has several backbones."
    )
    from music_jax.exchange.weights import CONVERT_COMMAND

    usage = (__doc__ or "").format(convert=CONVERT_COMMAND)
    cli.run(main, usage, workdir=True, config="fields", required=["weights", "workdir"])
