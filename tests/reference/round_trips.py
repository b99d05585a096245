"""Measures the largest difference of features after a round trip through torchvision and timm.

    python -m music_jax.export --workdir=DIR --format=torchvision --output=b.safetensors
    python -c "import music_jax, numpy as np; from philox_weights import philox_images as images; \\
        e = music_jax.load('DIR'); x = images(8, e.size, 3); np.savez('b.npz', x=x, y=e(x))"
    /tmp/torchenv/bin/python tests/reference/round_trips.py resnet50 b.safetensors b.npz

Needs torch, torchvision, timm and safetensors; `make_torch.py` says how to get them.
"""

import sys

import numpy as np


def main():
    import timm
    import torch
    import torchvision
    from safetensors import safe_open
    from safetensors.torch import load_file

    name, weights, features = sys.argv[1:]
    with safe_open(weights, "np") as file:
        import json

        steps = json.loads(file.metadata()["preprocessing"])
    with np.load(features) as arrays:
        images, expected = arrays["x"], arrays["y"]
    inputs = ((images / 255 - steps["mean"]) / steps["std"]).astype(np.float32)
    inputs = torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy())
    tensors = load_file(weights)
    models = {}
    if name.startswith("resnet"):
        models["torchvision"] = torchvision.models.get_model(name)
        models["timm"] = timm.create_model(name)
        head = "fc"
    else:
        models["timm"] = timm.create_model(name, img_size=images.shape[1])
        head = "head"
    for library, model in models.items():
        print(library, name, model.load_state_dict(tensors, strict=True))
        setattr(model, head, torch.nn.Identity())
        with torch.no_grad():
            found = model.eval()(inputs).numpy()
        print(
            f"{library} {name}: features {found.shape}, largest {np.abs(expected).max():.3g}, "
            f"largest difference {np.abs(found - expected).max():.2g}"
        )


if __name__ == "__main__":
    main()
