"""Datasets of the Hugging Face library `datasets` as sources, and their preparation.

A dataset is named `hf:PATH` for a folder of Parquet files or what `save_to_disk` has written, or
`hf:NAME` or `hf:NAMESPACE/NAME/CONFIG` for one of the hub. The library keeps a copy in Arrow's
format in its cache, except of what `save_to_disk` has written. No code of a dataset is run, and
only `prepare` uses the network.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
from typing import Any

import numpy as np
from ml_collections import config_dict

from music_jax.data.folder import read_file
from music_jax.data.labels import Labels, number_labels
from music_jax.data.sources import Source
from music_jax.errors import (
    MissingSplitError,
    UndecodableError,
    UserError,
    one_line,
    raising,
    require_extra,
)

PREFIX = "hf:"
# NAME, NAMESPACE/NAME or NAMESPACE/NAME/CONFIG
_HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:/([\w.-]+))?")
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}[^/]*")
_SPLIT_WORDS = {  # in the names of files and folders, as the library has them
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "dev", "val"},
    "train": {"train", "training"},
}
_SAVED = ("dataset_dict.json", "state.json")  # of several splits, of one
_FORMATS = ("arrow", "cache", "imagefolder", "parquet", "webdataset")  # without other code
_LABEL_KEY = "label"  # the config's default, which a dataset need not have


def prepare(dataset: config_dict.ConfigDict) -> None:
    """Writes the dataset's Arrow files if they do not exist, downloading from the hub if needed.

    Args:
      dataset: Group `dataset` of the config: `name`, and `data_dir`, the cache of `datasets` (None
        for its default).

    Raises:
      UserError: The dataset is unknown, is in no supported format, or cannot be written.
    """
    datasets, path = _import(), _path(dataset)
    if _is_saved(path) or (not os.path.isdir(path) and _cached(dataset) is not None):
        return
    with raising(UserError, f"cannot prepare dataset {dataset.name!r}"):
        builder = _local(dataset) if os.path.isdir(path) else None
        if builder is None:
            name, config = _hub_name(dataset)
            cache_dir = os.path.expanduser(dataset.data_dir or "") or None
            builder = datasets.load_dataset_builder(name, config, cache_dir=cache_dir)
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in _FORMATS:
                raise UserError(
                    f"the files of {dataset.name!r} are of the kind {kind!r}; datasets of images "
                    f"are {', '.join(_FORMATS)}"
                )
        builder.download_and_prepare()


def open_split(dataset: config_dict.ConfigDict, split: str) -> Source:
    """Opens one split of a dataset that `prepare` has prepared.

    The labels are those of a ClassLabel, or of a column of whole numbers or texts. The images have
    no labels if `dataset.label_key` names another column, or is "" or the default and there is no
    such column.

    Args:
      dataset: Group `dataset` of the config.
      split: Split such as `train` or `train[:90%]`.

    Raises:
      MissingSplitError: The dataset has no such split.
      UserError: The dataset was not prepared; or the image or the label does not exist.
    """
    datasets, opened = _import(), _open(dataset)
    name = f"{dataset.name}:{split}"
    splits = sorted(_split_sizes(opened))
    what = f"cannot read split {split!r} of {dataset.name!r}, which has the splits {splits}"
    with raising(UserError if split in splits else MissingSplitError, what):
        rows = _read_split(opened, split)
    features, image_key, label_key = rows.features, dataset.image_key, dataset.label_key
    for key in (image_key, label_key):
        if key not in features and (key == image_key or key not in (_LABEL_KEY, "")):
            raise UserError(
                f"dataset {dataset.name!r} has no column {key!r}; it has {sorted(features)}: name "
                f"another with --config.dataset.{'image' if key == image_key else 'label'}_key="
            )
    if not _holds_files(features[image_key]):
        raise UserError(
            f"the column {image_key!r} of dataset {dataset.name!r} does not hold image files, but "
            f"{one_line(features[image_key], 300)}; name one that does with "
            "--config.dataset.image_key="
        )
    with raising(UserError, f"the files of {name} are damaged"):
        # Reads no images, and keeps Arrow from reading outside of its memory.
        used = [key for key in (image_key, label_key) if key in features]
        rows.data.select(used).validate(full=True)
    images = rows.select_columns([image_key])
    if isinstance(features[image_key], datasets.Image):
        images = images.cast_column(image_key, datasets.Image(decode=False))
    first = images[0][image_key] if len(images) else None
    if isinstance(first, dict) and not first.get("bytes") and "::" in str(first.get("path")):
        raise UserError(
            f"the images of {name} are in archives, which are not read ({first['path']:.200}); "
            "unpack these and name the folder with --config.dataset.path="
        )
    found = _labels(rows, dataset, name)
    files = [file["filename"] for file in rows.cache_files]
    content = [split, len(rows), str(features), found.class_names]
    path = _path(dataset)
    root = path if os.path.isdir(path) else datasets.config.HF_CACHE_HOME

    def read(index: int) -> dict[str, Any]:
        image = images[index][image_key]
        if isinstance(image, dict):
            image = image.get("bytes") or _read_image(root, image.get("path"))
        return {"image": image}

    def identity(times: bool) -> bytes:
        digest = hashlib.sha256(json.dumps(content).encode() + found.labels.tobytes())
        if times:
            states = [os.stat(file) for file in files]
            digest.update(str([(s.st_size, s.st_mtime_ns) for s in states]).encode())
        return digest.digest()

    return Source(
        name=name,
        size=len(rows),
        read=read,
        num_classes=found.num_classes,
        class_names=found.class_names,
        no_classes=found.no_classes,
        identity=identity,
        known_labels=found.labels,
        multi_label=found.multi_label,
    )


def _import() -> Any:
    with require_extra("hf"):
        import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _path(dataset: config_dict.ConfigDict) -> str:
    return os.path.expanduser(dataset.name.removeprefix(PREFIX))


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, file)) for file in _SAVED)


def _hub_name(dataset: config_dict.ConfigDict) -> tuple[str, str | None]:
    """Returns the name on the hub, and that of a config."""
    match = _HUB_NAME.fullmatch(dataset.name.removeprefix(PREFIX))
    if match is None:
        raise UserError(
            f"dataset {dataset.name!r} is neither a folder nor the name of a dataset of the hub, "
            "hf:NAMESPACE/NAME or hf:NAMESPACE/NAME/CONFIG"
        )
    return match[1], match[2]


def _local(dataset: config_dict.ConfigDict) -> Any:
    """Returns the builder for a folder of Parquet files."""
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    root = pathlib.Path(_path(dataset)).absolute()
    files: dict[str, list[pathlib.Path]] = {}
    for file in sorted(file for file in root.rglob("*.parquet") if file.is_file()):
        files.setdefault(_split_of(file.relative_to(root)), []).append(file)
    if not files:
        raise UserError(
            f"the folder {os.fspath(root)!r} holds no Parquet files, and nothing that save_to_disk "
            "has written"
        )

    def listed(paths: list[pathlib.Path]) -> Any:  # the cache is found by these times and sizes
        states = [path.stat() for path in paths]
        return DataFilesList(
            list(map(str, paths)), [(str(s.st_mtime_ns), str(s.st_size)) for s in states]
        )

    return Parquet(
        cache_dir=os.path.expanduser(dataset.data_dir or "") or None,
        dataset_name="parquet",
        data_files=DataFilesDict({split: listed(paths) for split, paths in files.items()}),
    )


def _split_of(file: pathlib.Path) -> str:
    """Returns the split of a Parquet file, by its name or those of its folders."""
    if sharded := _SHARD.fullmatch(file.name):
        return sharded[1]
    words = set(re.split(r"[-._ 0-9/]+", os.fspath(file.with_suffix("")).lower()))
    return next((split for split, known in _SPLIT_WORDS.items() if words & known), "train")


def _cached(dataset: config_dict.ConfigDict) -> Any:
    """Returns the builder for what is cached of a dataset of the hub; None if nothing is."""
    from datasets.packaged_modules.cache.cache import Cache

    name, config = _hub_name(dataset)
    try:
        return Cache(
            cache_dir=os.path.expanduser(dataset.data_dir or "") or None,
            dataset_name=name.rpartition("/")[2],
            config_name=config,
            version="auto",
            hash="auto",
            repo_id=name,
        )
    except ValueError as error:
        if "multiple" in str(error):
            raise UserError(
                f"several configs of {dataset.name!r} are cached; name one as in "
                f"--config.dataset.name={PREFIX}{name}/CONFIG: {one_line(error, 300)}"
            ) from error
        return None


def _open(dataset: config_dict.ConfigDict) -> Any:
    """Returns what `load_from_disk` gives, or else the builder of a prepared dataset."""
    datasets, path = _import(), _path(dataset)
    with raising(UserError, f"cannot open dataset {dataset.name!r}"):
        if _is_saved(path):
            return datasets.load_from_disk(path, keep_in_memory=False)
        builder = _local(dataset) if os.path.isdir(path) else _cached(dataset)
    if builder is None or not builder.info.splits:
        raise UserError(
            f"dataset {dataset.name!r} was not prepared in the cache of Hugging Face; name it with "
            f"--config.dataset.name={dataset.name} to prepare it, or give the directory where it "
            "was prepared with --config.dataset.data_dir=DIR"
        )
    return builder


def _splits(saved: Any) -> dict[str, Any]:
    """Returns the splits that were saved; one without a name is `train`."""
    return dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}


def _split_sizes(opened: Any) -> dict[str, int]:
    if hasattr(opened, "as_dataset"):
        return {name: info.num_examples for name, info in opened.info.splits.items()}
    return {name: len(rows) for name, rows in _splits(opened).items()}


def _read_split(opened: Any, split: str) -> Any:
    import datasets

    if hasattr(opened, "as_dataset"):
        return opened.as_dataset(split, in_memory=False)
    saved, sizes = _splits(opened), _split_sizes(opened)
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    rows = [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return datasets.concatenate_datasets(rows).with_format(None)


def _holds_files(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _labels(rows: Any, dataset: config_dict.ConfigDict, name: str) -> Labels:
    key = dataset.label_key
    if key not in rows.features:
        none = np.full(len(rows), -1, np.int32)
        return Labels(none, 0, (), f"{dataset.name} has no column {key!r}")
    column = rows.select_columns([key]).with_format("arrow")[:].column(key)
    feature = getattr(rows.features[key], "feature", rows.features[key])  # of a list
    names = getattr(feature, "names", None) or ()  # of a ClassLabel
    return number_labels(column.to_pylist(), f"the column {key!r} of {name}", names)


def _read_image(root: str, path: Any) -> bytes:
    """Reads an image of which the dataset has the path, in the directory of the dataset."""
    if not isinstance(path, str):
        raise UndecodableError("its cell of the table holds neither a file nor a path")
    file = os.path.join(root, path)
    if not os.path.realpath(file).startswith(f"{os.path.realpath(root)}/"):
        raise UndecodableError(f"its path {path!r} leads out of {root!r}")
    return read_file(file, is_link=True)
