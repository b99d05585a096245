"""Compares backbones and augmentations on the validation images of a comparison.

    python tests/benchmarks/pilot.py backbones --output=DIR
    python tests/benchmarks/pilot.py augmentations --output=DIR

Each backbone is probed with random weights and after a short training with two objectives; each
augmentation after a short training with four, so that none is chosen for one method. A line of JSON
for each training, which is not repeated when the command is rerun; see docs/comparison.md.
"""

import argparse
import json
import os
import pathlib
import runpy
import time

import jax

import music_jax
from music_jax.claims.probe import logistic_probe
from music_jax.claims.references import samples
from music_jax.config import set_views
from music_jax.evaluation.run import load_run
from music_jax.models.resnet import BasicBlock, ResNet
from music_jax.train import train_and_evaluate

VALIDATION = "train[50000:]"
BACKBONES = {  # the config's own, with other widths, pooling and depths
    "narrow": {"widths": (16, 32, 64)},
    "wide": {"widths": (32, 64, 128)},
    "deep": {"stage_sizes": (2, 2, 2)},
    "fine": {"first_stride": 1},
    "two_stages": {"stage_sizes": (1, 1), "widths": (24, 48)},
    "grid": {"stage_sizes": (1, 1), "widths": (24, 48), "pool_grid": 4},
}
JITTER = {"jitter_probability": 0.8, "brightness": 0.4, "contrast": 0.4}
AUGMENTATIONS = {  # smallest share of the area in a crop, and fields of both views
    "crops": (0.3, {}),
    "small_crops": (0.15, {}),
    "crops_jitter": (0.3, JITTER),
    "crops_jitter_blur": (0.3, JITTER | {"blur_probability": 0.5, "blur_sigma": (0.3, 1.2)}),
}
OBJECTIVES = {
    "music": {},
    "vicreg": {},
    "barlow_twins": {"off_diagonal_weight": 41.8 / 511},
    "simclr": {"contrast_temperature": 0.3},
}


def register(name, sizes):
    standard = {"stage_sizes": (1, 1, 1), "widths": (24, 48, 96), "stem_width": 16}
    standard |= {"first_stride": 2, "stem": "strided", "zero_init_residual": False}
    music_jax.register_backbone(
        name, lambda **given: ResNet(block=BasicBlock, **{**standard, **sizes, **given})
    )


def train(config, directory, random):
    """Returns accuracies, throughput and the seconds of a core of one training."""
    begun = time.process_time()
    train_and_evaluate(config, directory)
    seconds = time.process_time() - begun
    logged = pathlib.Path(directory, "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line) for line in logged]
    run = load_run(directory, overrides={"dataset.test_split": VALIDATION})
    found = {"core_seconds": round(seconds), "features": run.network.num_features}
    found["images_per_second"] = round(max(x.get("images_per_second") or 0 for x in speeds))
    for model in ("trained", "random_init") if random else ("trained",):
        probe = logistic_probe(samples(run.train(model)), samples(run.test(model)))
        found[model] = round(probe.validation_top1, 4)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("backbones", "augmentations"))
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--images", default=50_000, type=int)
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)
    for name, sizes in BACKBONES.items():
        register(name, sizes)
    if given.what == "backbones":
        names = ("pooled_resnet", *BACKBONES)
        jobs = [(name, "crops", objective) for name in names for objective in ("music", "vicreg")]
    else:
        jobs = [
            ("pooled_resnet", name, objective) for name in AUGMENTATIONS for objective in OBJECTIVES
        ]
    given.output.mkdir(parents=True, exist_ok=True)
    for backbone, augmentation, objective in jobs:
        path = given.output / f"{backbone}-{augmentation}-{objective}"
        result = path.with_suffix(".json")
        if not result.exists():
            config = runpy.run_path("configs/fashion_mnist.py")["get_config"]()
            smallest, fields = AUGMENTATIONS[augmentation]
            config.crop.scale = (smallest, 1.0)
            set_views(config, **fields)
            config.num_epochs, config.optimizer.warmup_epochs = given.epochs, 0
            config.optimizer.min_warmup_steps = 50
            config.log_every_steps = 20
            config.dataset.train_split = f"train[:{given.images}]"
            config.dataset.test_split = ""
            config.objective.name = objective
            config.objective.update(OBJECTIVES[objective])
            if backbone != "pooled_resnet":
                config.backbone.update(name=backbone, stem=None, zero_init_residual=None)
            found = train(config, os.fspath(path), random=objective == "music")
            result.write_text(json.dumps(found))
        print(backbone, augmentation, objective, result.read_text(), flush=True)


if __name__ == "__main__":
    main()
