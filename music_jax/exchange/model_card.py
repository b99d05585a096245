"""The model card: what a backbone is, how it is used, and how it came to be; Markdown."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from music_jax.config import view_augmentations
from music_jax.data.augment import ViewAugmentation
from music_jax.exchange.formats import FORMATS, preprocessing
from music_jax.exchange.trained import TrainedBackbone
from music_jax.version import __version__
from music_jax.workdir.files import read_json

IMPORTED_FILE = "imported.json"  # in a workdir whose weights come from elsewhere


def model_card(
    trained: TrainedBackbone,
    *,
    form: str,
    file_name: str,
    num_classes: int,
    workdir: epath.Path | None,
    license_name: str | None,
) -> str:
    """Writes the card of an exported backbone.

    Args:
      trained: the backbone.
      form: the format that it was exported in.
      file_name: what the export is called.
      num_classes: of the classifier in it, if there is any.
      workdir: of the run, for its results; None if it came from a file.
      license_name: of the weights, as the user says.
    """
    config = trained.config
    imported = _read(workdir, IMPORTED_FILE)
    size = sum(x.size for x in trained.tensors.values())
    sections = [
        _front_matter(license_name),
        f"# {_code(config.backbone.name)}, "
        + ("imported" if imported else f"pre-trained with {_code(config.objective.name)}"),
        f"A backbone of {size / 1e6:.2f} M numbers that maps an image to "
        f"{trained.backbone.num_features:,} features, in float32. {FORMATS[form].title}: "
        f"{_code(file_name)}.",
        "## Use",
        FORMATS[form].usage(trained, file_name, num_classes),
        "## Preprocessing",
        _preprocessing(trained),
    ]
    if imported:
        sections += ["## Origin", _origin(imported)]
    elif workdir is not None:
        sections += ["## Data", _data(trained), "## Recipe", _recipe(trained)]
    else:
        sections += ["## Data and recipe", "Not in the file that this was exported from."]
    sections += ["## Results", _results(workdir, trained.step)]
    sections += ["## Licence", _license(license_name)]
    sections += [
        f"Written by music_jax {__version__} with jax {jax.__version__}, from the "
        f"checkpoint of step {trained.step:,}."
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(license_name: str | None) -> str:
    lines = ["---", "library_name: music_jax", "pipeline_tag: image-feature-extraction"]
    lines += [f"license: {json.dumps(license_name)}"] if license_name else []
    lines += ["tags: [self-supervised-learning, image-feature-extraction, jax]", "---"]
    return "\n".join(lines)


def _preprocessing(trained: TrainedBackbone) -> str:
    steps = preprocessing(trained)
    size, resize = steps["center_crop"], steps["resize_shorter_side"]
    channels = "three channels, RGB" if steps["channels"] == 3 else "one channel, gray"
    return "\n".join(
        [
            f"1. {channels}, values from 0 to 255",
            f"2. shorter side resized to {resize} px (by area where it shrinks, else bilinear), "
            f"central {size} x {size} px",
            f"3. divided by 255; minus {steps['mean']}, divided by {steps['std']}",
        ]
    )


def _data(trained: TrainedBackbone) -> str:
    dataset = trained.config.dataset
    if dataset.path:
        return f"The images of the folder {_code(epath.Path(dataset.path).name)}."
    return f"The split {_code(dataset.train_split)} of {_code(dataset.name)} (TFDS); no label used."


def _recipe(trained: TrainedBackbone) -> str:
    config = trained.config
    objective, optimizer = config.objective, config.optimizer
    rows = [("objective", _code(objective.name))]
    if objective.name == "music":
        sizes = f"{objective.num_segments} segments of {objective.units_per_segment} units"
        rows += [("embedding", f"{sizes}, temperature {objective.temperature}")]
    hidden = ", ".join(map(str, config.projector.hidden_sizes)) or "none"
    rows += [
        ("projection head, hidden", hidden),
        ("epochs", str(config.num_epochs)),
        ("batch", str(config.batch_size)),
        (
            "optimizer",
            f"{_code(optimizer.name)}, base learning rate {optimizer.base_learning_rate} (times "
            f"batch / 256), weight decay {optimizer.weight_decay}",
        ),
        ("warm-up", f"{optimizer.warmup_epochs} epochs, then a cosine"),
        ("crops", f"{config.crop.size} px, scale {list(config.crop.scale)}"),
        ("seed", str(config.seed)),
    ]
    for i, view in enumerate(view_augmentations(config), start=1):
        rows += [(f"view {i}", _augmentation(view))]
    return _table(("", ""), rows)


def _augmentation(view: ViewAugmentation) -> str:
    """The fields of a view's augmentation that are not as by default."""
    nothing = ViewAugmentation()
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    said = [f"{k} {v}" for k, v in fields.items() if v != getattr(nothing, k)]
    return ", ".join(said).replace("_", " ") or "the crop alone"


def _results(workdir: epath.Path | None, step: int) -> str:
    linear, knn = _read(workdir, "linear_eval.json"), _read(workdir, "knn.json")
    rows, where = [], []
    for name, record in (("linear probe, top-1", linear), ("kNN, top-1", knn)):
        if record.get("step") != step:
            continue
        values = [record.get(k) for k in ("top1", "random_init_top1", "raw_pixels_top1")]
        rows.append((name, *map(_percent, values)))
        where.append(_tested_on(record))
    if not rows:
        return "This checkpoint has not been evaluated."
    header = ("", "this backbone", "at random initialization", "raw pixels")
    said = " and ".join(dict.fromkeys(where))
    return f"{_table(header, rows)}\n\nOn {said}; the backbone frozen."


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) and 0 <= value <= 1 else "-"


def _tested_on(record: dict[str, Any]) -> str:
    data, count = record.get("data"), record.get("num_test")
    test = data.get("test") if isinstance(data, dict) else None
    if not isinstance(test, str) or not test:
        test = "?"
    elif ":" not in test:  # a folder, whose place is nobody's business
        test = test.rstrip("/").rpartition("/")[2]
    return f"{_code(test)}, {count if isinstance(count, int) else '?'} test images"


def _origin(imported: dict[str, Any]) -> str:
    return (
        f"Weights from {_code(imported.get('file', '?'))} (SHA-256 "
        f"{_code(imported.get('sha256', '?'))}), in the layout of torchvision and timm. They were "
        "trained elsewhere; the recipe in config.json is not theirs. Assumed, since the file does "
        f"not tell: {_code(imported.get('assumed', '?'))}."
    )


def _license(license_name: str | None) -> str:
    named = (
        f"The weights: {license_name}."
        if license_name
        else "No license of the weights was named (`--license=`)."
    )
    return f"{named} The images that they were trained on have terms of their own."


def _read(workdir: epath.Path | None, name: str) -> dict[str, Any]:
    """A JSON file of the run; {} if it is not there or of no use."""
    try:
        record = read_json(workdir / name) if workdir is not None else {}
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)


def _code(text: str) -> str:
    text = str(text).encode(errors="replace").decode()  # names of files may be no Unicode
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
