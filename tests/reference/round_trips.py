"""Measures the largest difference of features after a round trip through each form of export.

    PYTHONPATH=.:tests python tests/reference/round_trips.py --torch=/tmp/torchenv/bin/python \\
        resnet18 resnet50 vit_s16 runs/mnist5k

A name stands for the backbone with `philox_weights`, imported and evaluated at 224 px; else it is
a run's workdir. `make_torch.py` says how to get the environment with torch, which needs safetensors
here; without `--torch`, torchvision and timm are left out.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

_HERE = pathlib.Path(__file__).parent
_PYTHON = sys.executable

_STABLEHLO = """
import sys, jax, jax.export, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
"""

_TIMM = """
import sys, numpy as np, timm, torch
folder, inputs, output = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.no_grad():
    np.save(output, model(torch.from_numpy(np.load(inputs))).numpy())
"""

_TORCH = """
import json, sys, numpy as np, timm, torch, torchvision
from safetensors.torch import load_file
weights, inputs, output, names = sys.argv[1:]
names, inputs = json.loads(names), torch.from_numpy(np.load(inputs))
for library, name in names.items():
    make = {"torchvision": torchvision.models.get_model, "timm": timm.create_model}[library]
    model = make(name)
    model.load_state_dict(load_file(weights), strict=True)
    setattr(model, "fc" if hasattr(model, "fc") else "head", torch.nn.Identity())
    with torch.no_grad():
        np.save(f"{output}.{library}.npy", model.eval()(inputs).numpy())
"""


def main():
    import jax
    import onnxruntime
    import orbax.checkpoint as ocp
    from philox_weights import philox_images
    from safetensors.numpy import load_file

    import music_jax
    from music_jax.errors import UserError
    from music_jax.exchange.encoder import Encoder, TrainedBackbone
    from music_jax.exchange.importing import import_backbone
    from music_jax.exchange.weights import TIMM_NAMES, TORCHVISION_NAMES
    from music_jax.export import export

    torch = next((a[8:] for a in sys.argv[1:] if a.startswith("--torch=")), None)
    for name in (a for a in sys.argv[1:] if not a.startswith("--")):
        directory = pathlib.Path(tempfile.mkdtemp())
        run = _imported(name, directory) if name in TIMM_NAMES else name
        encoder = music_jax.load(run)
        config = encoder.trained.config
        images = philox_images(3, encoder.size, encoder.channels)
        expected = _features(encoder, images)
        inputs = (images / 255 - config.dataset.mean) / config.dataset.std
        inputs = np.ascontiguousarray(inputs.astype(np.float32).transpose(0, 3, 1, 2))
        np.save(directory / "images.npy", images[:2])
        np.save(directory / "inputs.npy", inputs)

        def say(form, found, name=name, expected=expected):
            difference = np.abs(found - expected[: len(found)]).max()
            print(
                f"{name}: {form}: largest difference {difference:.1e} of features up to "
                f"{np.abs(expected).max():.2g} ({len(found)} images)",
                flush=True,
            )

        def write(form, directory=directory, run=run):
            return str(export(str(run), form=form, output=str(directory / form))[0])

        say("safetensors", _features(music_jax.load(write("safetensors")), images))
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(write("orbax"))
        tensors = {}
        for part in tree.values():
            for path, value in jax.tree_util.tree_flatten_with_path(part)[0]:
                tensors[".".join(str(key.key) for key in path)] = np.asarray(value)
        say("orbax", _features(Encoder(TrainedBackbone(config, 0, tensors)), images))
        session = onnxruntime.InferenceSession(write("onnx"))
        say("onnx", session.run(["features"], {"images": inputs})[0])
        output = str(directory / "features.npy")
        program = [_PYTHON, "-c", _STABLEHLO, write("stablehlo")]
        subprocess.run([*program, str(directory / "images.npy"), output], check=True)
        say("stablehlo, another process", np.load(output))
        try:
            weights = write("torchvision")
        except UserError as error:
            print(f"{name}: torchvision: {error}")
            continue
        (directory / "back.safetensors").write_bytes(pathlib.Path(weights).read_bytes())
        import_backbone(str(directory / "back.safetensors"), str(directory / "back"), config)
        say(
            "torchvision's form, imported again",
            _features(music_jax.load(directory / "back"), images),
        )
        assert load_file(weights).keys() == _names(config.backbone.name)
        if torch:
            theirs = {"timm": TIMM_NAMES[config.backbone.name]}
            if config.backbone.name in TORCHVISION_NAMES:
                theirs["torchvision"] = config.backbone.name
            program = [torch, "-c", _TORCH, weights, str(directory / "inputs.npy")]
            subprocess.run([*program, str(directory / "torch"), json.dumps(theirs)], check=True)
            for library in theirs:
                say(f"{library}, strict=True", np.load(directory / f"torch.{library}.npy"))
            program = [torch, "-c", _TIMM, write("timm"), str(directory / "inputs.npy"), output]
            subprocess.run(program, check=True)
            say("timm, local-dir", np.load(output))


def _features(encoder, images):
    """Of images that are cut already, as all other forms take them."""
    return encoder.encode_crops(images)[0]


def _names(backbone):
    return json.loads((_HERE / "torch_names.json").read_text())[backbone].keys()


def _imported(name, directory):
    """A run of a backbone with the reference's weights."""
    from philox_weights import philox_weights
    from safetensors.numpy import save_file

    from music_jax.config import default_config
    from music_jax.exchange.importing import import_backbone
    from music_jax.models.vision_transformer import sincos_positions

    shapes = json.loads((_HERE / "torch_names.json").read_text())[name]
    weights = philox_weights(shapes)
    if "pos_embed" in weights:
        width = weights["pos_embed"].shape[2]
        positions = np.concatenate([np.zeros((1, width)), sincos_positions(14, 14, width)])
        weights["pos_embed"] = positions[None].astype(np.float32)
    save_file(weights, directory / "theirs.safetensors")
    config = default_config()
    if name == "vit_s16":
        config.backbone.num_heads = 6  # timm's
    import_backbone(str(directory / "theirs.safetensors"), str(directory / "run"), config)
    return directory / "run"


if __name__ == "__main__":
    main()
