"""Writes torch_names.json, torch_features.npz and timm_configs.json: what torchvision and timm call
the tensors of the backbones that are exchanged with them, the features that they compute from known
weights, and the files config.json that timm writes beside weights.

    python -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy \\
        safetensors
    PYTHONPATH=tests /tmp/torchenv/bin/python tests/reference/make_torch.py

The weights are `philox_weights` of the names and shapes; for the vision transformer, the position
embedding is MoCo v3's in place of a drawn one. Features are computed in float64, of
`philox_images(2, 64, 3)` normalised by ImageNet's constants.
"""

import json
import pathlib
import tempfile

import numpy as np
from philox_weights import philox_images, philox_weights

_HERE = pathlib.Path(__file__).parent
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE = 64


def main():
    import timm
    import torch
    import torchvision

    images = (philox_images(2, _SIZE, 3) / 255 - _MEAN) / _STD
    images = torch.from_numpy(images.transpose(0, 3, 1, 2))

    def features(model):
        tensors = philox_weights(shapes_of(model))
        if "pos_embed" in tensors:
            tensors["pos_embed"] = positions(_SIZE // 16, tensors["pos_embed"].shape[-1])
        model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True)
        with torch.no_grad():
            return model.double().eval()(images).numpy()

    names, found = {}, {}
    for name in ("resnet18", "resnet34", "resnet50"):
        model = torchvision.models.get_model(name)
        names[name] = shapes_of(model)
        if names[name] != shapes_of(timm.create_model(name)):
            raise SystemExit(f"timm's {name} has other tensors than torchvision's")
        model.fc = torch.nn.Identity()
        found[name] = features(model)
        np.testing.assert_allclose(
            features(timm.create_model(name, num_classes=0)), found[name], atol=1e-9
        )
    for name, theirs in (
        ("vit_s16", "vit_small_patch16_224"),
        ("vit_b16", "vit_base_patch16_224"),
    ):
        names[name] = shapes_of(timm.create_model(theirs))
    small = timm.create_model("vit_small_patch16_224", img_size=_SIZE, num_classes=0)
    found["vit_s16"] = features(small)

    lines = [f"{json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in names.items()]
    (_HERE / "torch_names.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    np.savez(_HERE / "torch_features.npz", **{k: v.astype(np.float32) for k, v in found.items()})
    (_HERE / "timm_configs.json").write_text(json.dumps(timm_configs(), indent=1) + "\n")
    for name, values in found.items():
        print(f"{name}: features {values.shape}, standard deviation {values.std():.3f}")


def timm_configs():
    """The files of `save_for_hf` for images of 32 pixels, cut from 37."""
    import timm

    data = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    data |= {"crop_pct": 32 / 37, "interpolation": "bilinear"}
    files = {}
    for name, theirs, options in (
        ("resnet18", "resnet18", {}),
        ("vit_s16", "vit_small_patch16_224", {"img_size": (32, 32), "num_heads": 12}),
    ):
        model = timm.create_model(theirs, num_classes=0, pretrained_cfg_overlay=data, **options)
        with tempfile.TemporaryDirectory() as folder:
            timm.models.save_for_hf(model, folder, model_args=options, safe_serialization=True)
            files[name] = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return files


def shapes_of(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def positions(side, width):
    """[1, 1 + side², width]: none for the class token, then MoCo v3's, row by row."""
    place = np.arange(side, dtype=np.float64)
    rows, columns = np.repeat(place, side), np.tile(place, side)
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    angles = [np.outer(rows, omega), np.outer(columns, omega)]
    parts = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, width)), parts])[None].astype(np.float32)


if __name__ == "__main__":
    main()
