"""Reads configs from Python files and saved runs, compares them, and checks their fields."""

import difflib
import fnmatch
import inspect
import json
import os
import pathlib
import reprlib
import runpy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from music_jax import registry
from music_jax.config.defaults import default_config, is_free
from music_jax.errors import UserError

_OPTIONS = "options"  # field of a registered part, a dictionary of JSON values
_MAX_NUMBER = 2**32  # Larger numbers overflow in some field and are never intended.
_KINDS = {
    str: "a text without a zero byte",
    bool: "True or False",
    int: f"an integer of at most {_MAX_NUMBER}",
    float: f"a finite number of at most {_MAX_NUMBER}",
}
_CHOICES: dict[str, Collection[Any]] = {
    "backbone.name": registry.BACKBONES,
    "objective.name": registry.OBJECTIVES,
    "optimizer.name": registry.OPTIMIZERS,
    "backbone.stem": ("imagenet", "cifar", "strided"),
    "compute_dtype": ("float32", "bfloat16"),
    "dataset.pixel_type": ("uint8", "uint16", "float32"),
    "guards.policy": ("stop", "rewind"),
    "linear_eval.feature_scaling": ("none", "standardize", "whiten"),
    "online.measures": ("knn", "rankme", "lidar"),
}
# Interval of each number, or of each entry of a tuple, by name pattern; the first match counts.
_INTERVALS = {
    # Two samples or more, since batch normalization needs them.
    "[2, inf)": "batch_size semi_supervised.batch_size finetune.batch_size online_probe.batch_size"
    " evaluation.num_views objective.num_segments objective.units_per_segment"
    " objective.num_points online.num_images online.view_images online.num_views",
    "[0, inf)": "guards.check_*_every_steps guards.loss_spike_deviations guards.max_rewinds"
    " guards.min_effective_rank guards.warmup_steps *.weight_decay *.brightness *.contrast"
    " *.saturation *.noise_std backbone.frozen_stages optimizer.backbone_scale"
    " online.every_steps optimizer.min_warmup_steps",
    "[1, inf)": "*num_epochs *every_steps *.batch_size accumulation_steps *.max_to_keep crop.size"
    " evaluation.view_images few_shot.draws few_shot.shots knn.k knn.more_k projector.*"
    " guards.loss_spike_window guards.collapse_steps sharding.fsdp objective.num_slices"
    " local_views.size dataset.num_channels",
    "[1, 1024]": "num_decode_threads",
    "[0, 100]": "local_views.count",
    "[0, 4294967295]": "seed",
    "(0, inf)": "*temperature *learning_rate *learning_rates *.grace_seconds dataset.std"
    " crop.aspect_ratio augmentation.*.scale *.blur_sigma objective.t_max"
    " objective.epsilon_squared",
    "(0, 1]": "crop.scale local_views.scale semi_supervised.fractions",
    "(0, 1)": "linear_eval.validation_fraction",
    "[0, 1)": "*.momentum",
    "[0, 1]": "*_probability *.translation *.max_skipped_share guards.min_usage_entropy"
    " guards.max_dead_units guards.min_embedding_std objective.sigreg_weight",
    "[0, 0.5]": "*.hue",
    "[0, 89]": "*.shear_degrees",
    "[0, 180]": "*.rotation_degrees",
}
_PAIRS = "crop.scale local_views.scale crop.aspect_ratio augmentation.*.scale *.blur_sigma"
_PATHS = ("backbone.init_from", "dataset.path")
_NOT_EMPTY = (
    "linear_eval.base_learning_rates few_shot.shots semi_supervised.fractions online.measures"
)


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns the paths of the config files that come with the package, by name."""
    package = pathlib.Path(__file__).parents[1]
    folder = package / "configs"
    if not folder.is_dir():  # a clone, in which the folder is beside the package
        folder = package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def from_file(path: str | os.PathLike[str], **fields: Any) -> config_dict.ConfigDict:
    """Returns the config of a config file, with some fields changed.

        config = from_file("digits", num_epochs=8, objective={"num_segments": 16})

    Args:
      path: A Python file with a function `get_config`, or the name of a config that comes with the
        package, such as `mnist5k`.
      **fields: Values of fields by name; those of a group as a dictionary.

    Returns:
      The config.

    Raises:
      UserError: The file cannot be read or has no such function, there is no such field, or a
        field does not take such a value.
    """
    name = os.fspath(path)
    shipped = shipped_configs()
    file = name if os.path.isfile(name) else str(shipped.get(name, name))
    try:
        get_config = runpy.run_path(file)["get_config"]
    except Exception as error:  # A config file may raise anything.
        if not os.path.exists(file):
            raise UserError(
                f"there is no config file {name!r}; give the path of one, or one of the names "
                f"{', '.join(shipped)}"
            ) from error
        raise UserError(
            f"{name!r} is not a config file, such as configs/digits.py: {_reason(error)}"
        ) from error
    try:
        config = get_config()
    except Exception as error:
        raise UserError(f"the config file {name!r} fails: {_reason(error)}") from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"get_config of the config file {name!r} must return a config, as "
            f"music_jax.config.default_config makes one; got {config!r:.100}"
        )
    _set_fields(config, fields)
    check_values(config)
    return config


def _reason(error: Exception) -> str:
    """Returns the message of an error in one line, without the field list of ml_collections."""
    name = type(error).__name__
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    message, _, rest = text.partition("Other fields present")
    hint = rest.rpartition("Did you mean")
    return " ".join(f"{name}: {message}{hint[1]}{hint[2] if hint[1] else ''}".split())


def from_json(record: dict[str, Any]) -> config_dict.ConfigDict:
    """Returns the config in a `config.json`, of this version of the package or another one.

    Fields that it lacks get their defaults. Fields that this version lacks are dropped if they do
    not affect the training.

    Raises:
      UserError: It has a field that this version lacks and that affects the training, or a value of
        the wrong type.
    """
    config = default_config()
    known = field_names(config)
    try:
        if wrong := [name for name in _flatten(record, separator="\0") if "." in name]:
            raise ValueError(f"the name {wrong[0]!r} has a dot")
        for name, value in _flatten(record).items():
            is_group = name in known and isinstance(get_field(config, name), config_dict.ConfigDict)
            if value == {} and not (is_group or is_free(name)):
                raise ValueError(f"{name!r} is empty")
        config.update_from_flattened_dict(
            {
                field: tuple(value) if isinstance(value, list) else value
                for field, value in _leaves(record).items()
                if field in known or not is_free(field)
            }
        )
    except Exception as error:  # A damaged record makes a ConfigDict raise anything.
        reason = _reason(error)[:300]
        raise UserError(f"the saved config does not fit this version: {reason}") from error
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the dotted name and both values of each field that differs and is not free.

    Fields of local views count only if there are any.
    """
    old, new = _leaves(old), _leaves(new)
    found = []
    fields = old.keys() | new.keys()
    if not (old.get("local_views.count") or new.get("local_views.count")):
        fields = {f for f in fields if not f.startswith(("local_views.", "augmentation.local."))}
    for field in sorted(fields):
        there, here = old.get(field), new.get(field)
        if field in _PATHS and isinstance(there, str) and isinstance(here, str):
            there, here = normalize_path(there), normalize_path(here)
        if there != here and not is_free(field):
            found.append(f"{field}: {reprlib.repr(there)} there, {reprlib.repr(here)} now")
    return found


def _flatten(record: dict[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Returns all groups and fields by dotted name, each group before its fields.

    The options of registered parts count as one field.
    """
    found = {}
    for key, value in record.items():
        found[prefix + key] = value
        if isinstance(value, dict) and key != _OPTIONS:
            found |= _flatten(value, f"{prefix}{key}{separator}", separator)
    return found


def _leaves(record: dict[str, Any]) -> dict[str, Any]:
    found = _flatten(record)
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, dict) or name.endswith(f".{_OPTIONS}")
    }


def normalize_path(path: str) -> str:
    """Returns one name for all spellings of a folder: `~` expanded, no `./`, `//` or final `/`.

    Links are not resolved, a relative path stays relative, and the name of a TFDS split or the
    address of a bucket stays as it is.
    """
    if not path or "://" in path:
        return path
    return os.path.normpath(os.path.expanduser(path))


def validate(config: config_dict.ConfigDict, *, training: bool = True) -> None:
    """Checks a config, as far as this is possible without devices and data.

    The names of backbones, objectives and optimizers are checked once the packages that register
    them are imported, which happens before anything is built or trained.

    Args:
      config: The config.
      training: Whether the objective is going to be used, which must be known then.

    Raises:
      UserError: A field has a value that cannot be used; the message names the field.
    """
    check_values(config)
    for field in field_names(config):
        value = get_field(config, field)
        if field == "objective.name" and not training:
            continue
        if value is not None and not isinstance(value, config_dict.ConfigDict):
            _check_value(config, field, value)
    _check_options(config)
    _check_backbone(config)
    size, count = config.batch_size, config.accumulation_steps
    if size % count:
        raise _wrong(config, "accumulation_steps", f"divide batch_size = {size}")
    if size // count < 2:
        expected = f"leave at least two samples of batch_size = {size} to each microbatch"
        raise _wrong(config, "accumulation_steps", expected)
    segments, units = config.objective.num_segments, config.objective.units_per_segment
    if config.objective.name == "music" and segments * units != embedding_size(config):
        raise UserError(
            f"the objective's {segments} segments of {units} units need an embedding of "
            f"{segments * units}, but config.projector.output_size is {embedding_size(config)}; "
            "leave it unset, or change objective.num_segments or objective.units_per_segment"
        )
    if config.crop.eval_resize < config.crop.size:
        raise _wrong(config, "crop.eval_resize", f"be at least crop.size = {config.crop.size}")
    if config.dataset.mean or not training:
        _check_statistics(config, training)
    if not 0 <= config.optimizer.warmup_epochs < config.num_epochs:
        expected = f"be in [0, num_epochs = {config.num_epochs})"
        raise _wrong(config, "optimizer.warmup_epochs", expected)
    fractions = config.semi_supervised.fractions
    for name in ("lists", "backbone_learning_rates", "head_learning_rates"):
        if len(config.semi_supervised[name]) != len(fractions):
            expected = f"have one entry for each of semi_supervised.fractions = {fractions}"
            raise _wrong(config, f"semi_supervised.{name}", expected)


def _check_statistics(config: config_dict.ConfigDict, training: bool) -> None:
    """Checks the mean and the standard deviation of the channels."""
    dataset, default = config.dataset, default_config().dataset
    advice = "; dataset.mean=() computes both from the training images" if training else ""
    for name in ("mean", "std"):
        if len(dataset[name]) != dataset.num_channels:
            expected = f"have dataset.num_channels = {dataset.num_channels} numbers"
            raise _wrong(config, f"dataset.{name}", expected, advice)
        if dataset.pixel_type != "uint8" and dataset[name] == default[name]:
            expected = f"be of the images' {dataset.pixel_type} values, not of ImageNet's"
            raise _wrong(config, f"dataset.{name}", expected, advice)


def check_values(config: config_dict.ConfigDict) -> None:
    """Checks that every field exists and has the type of its default, and that numbers are finite.

    Raises:
      UserError: A field is missing, unknown or has a value of another type; the message names it.
    """
    default = default_config()
    known = field_names(default)
    for field in field_names(config):
        if field not in known:
            raise UserError(unknown_field_message(field, known))
    for field in known:
        group, _, name = field.rpartition(".")
        if name not in get_field(config, group):
            raise UserError(
                f"the config lacks the field {field!r}; a config file starts from "
                "music_jax.config.default_config(), which has them all"
            )
        kind = get_field(default, group).get_type(name)
        expected = _expected_type(get_field(config, field), get_field(default, field), kind)
        if expected:
            raise _wrong(config, field, expected)
        if name == _OPTIONS:
            try:
                json.dumps(get_field(config, field).to_dict(), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise _wrong(config, field, f"hold values of JSON ({error})") from error


def _expected_type(value: Any, default: Any, kind: type) -> str | None:
    """Returns the expected type of a value in words, or None if the value has it."""
    if value is None and default is None:
        return None
    if kind is not tuple:
        return None if _has_kind(value, kind) else f"be {_KINDS.get(kind, 'a group of fields')}"
    entry = type(default[0]) if default else float
    if isinstance(value, tuple) and all(_has_kind(v, entry) for v in value):
        return None
    numbers = f"numbers of at most {_MAX_NUMBER}"
    return f"be a tuple of {'texts without a zero byte' if entry is str else numbers}"


def _has_kind(value: Any, kind: type) -> bool:
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and abs(value) <= _MAX_NUMBER  # False for NaN
    return isinstance(value, kind) and not (isinstance(value, str) and "\0" in value)


def _check_value(config: config_dict.ConfigDict, field: str, value: Any) -> None:
    """Checks one field against the tables above."""
    known = _CHOICES.get(field)
    entries = value if isinstance(value, tuple) else (value,)
    if known and not all(entry in known for entry in entries):
        kind = "hold some" if isinstance(value, tuple) else "be one"
        expected = f"{kind} of {', '.join(str(choice) for choice in known)}"
        if field in ("backbone.name", "objective.name"):
            expected += ", or be registered by a module that is named with --import=MODULE"
        raise _wrong(config, field, expected)
    if _matches(field, _NOT_EMPTY) and not value:
        raise _wrong(config, field, "have at least one entry")
    if _matches(field, _PAIRS) and (len(value) != 2 or value[0] > value[1]):
        raise _wrong(config, field, "be a pair (low, high) with low <= high")
    interval = next((i for i, names in _INTERVALS.items() if _matches(field, names)), None)
    if interval is None or isinstance(value, str):
        return
    if not all(_is_in(interval, entry) for entry in entries):
        expected = f"be in {interval}"
        if interval.endswith(" inf)"):
            low = interval[1:].partition(",")[0]
            expected = f"be at least {low}" if interval[0] == "[" else "be positive"
        where = " in each entry" if isinstance(value, tuple) else ""
        raise _wrong(config, field, expected + where)


def _matches(field: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns.split())


def _is_in(interval: str, number: float) -> bool:
    low, high = (float(limit) for limit in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _check_options(config: config_dict.ConfigDict) -> None:
    """Checks that the options of registered parts fit them, and that other parts have none."""
    backbone = registry.BACKBONES.get(config.backbone.name)
    objective = registry.OBJECTIVES.get(config.objective.name)
    open_dataset = registry.DATASETS.get(config.dataset.name)
    registered: list[tuple[str, Any, tuple[Any, ...], tuple[str, ...]]] = []  # with arguments
    if backbone is not None:
        make = backbone.make if backbone.is_registered else None
        registered.append(("backbone", make, (), ("channels", "dtype", "rngs")))
    if objective is not None:
        make = objective.make if isinstance(objective, registry.RegisteredObjective) else None
        registered.append(("objective", make, (), ()))
    if open_dataset is not None:
        registered.append(("dataset", open_dataset, ("train",), ()))
    for group, make, positional, named in registered:
        options, name = registry.options(config[group]), config[group].name
        if make is None:
            if options:
                raise UserError(
                    f"config.{group}.options is for a registered {group}; {name} is one of the "
                    "package: leave it empty"
                )
            continue
        if inspect.isclass(make):  # Flax's metaclass hides the signature.
            make, positional = make.__init__, (None, *positional)
        try:
            inspect.signature(make).bind(*positional, **dict.fromkeys(named), **options)
        except TypeError as error:
            raise UserError(
                f"config.{group}.options = {options!r} does not fit the {group} {name!r}: {error}"
            ) from error


def _check_backbone(config: config_dict.ConfigDict) -> None:
    """Checks that the backbone supports the options that are set, and the size of the crops."""
    backbone = config.backbone
    spec = registry.BACKBONES.get(backbone.name)
    if spec is None:
        return
    if spec.is_registered:  # The other fields are those of the recipe that it is tried in.
        for field in ("remat", "frozen_stages"):
            if backbone[field]:
                raise UserError(f"config.backbone.{field} is not supported by {backbone.name}")
        return
    for field in ("stem", "zero_init_residual", "num_heads"):
        if field not in spec.fields and backbone[field] is not None:
            raise UserError(
                f"config.backbone.{field} = {backbone[field]!r} is not supported by "
                f"{backbone.name}; leave it unset"
            )
    if backbone.frozen_stages > 1 + len(spec.stages):
        expected = f"be at most {1 + len(spec.stages)} for {backbone.name}"
        raise _wrong(config, "backbone.frozen_stages", expected)
    width, heads = spec.sizes.get("width"), backbone.num_heads
    if heads is not None and (heads < 1 or width % heads):
        raise _wrong(config, "backbone.num_heads", f"divide {backbone.name}'s width, {width}")
    multiple = spec.image_multiple
    sizes = ["crop.size"] + ["local_views.size"] * (config.local_views.count > 0)
    for field in sizes:
        if get_field(config, field) % multiple:
            raise _wrong(config, field, f"be a multiple of {multiple} for {backbone.name}")


def embedding_size(config: config_dict.ConfigDict) -> int:
    """Returns the size of the embedding: `projector.output_size`, or segments times units."""
    objective = config.objective
    return config.projector.output_size or objective.num_segments * objective.units_per_segment


def is_centered(config: config_dict.ConfigDict) -> bool:
    """Returns whether the objective subtracts the mean from the embedding; only MUSIC does."""
    return config.objective.name == "music" and config.objective.center


def get_field(config: config_dict.ConfigDict, field: str) -> Any:
    """Returns the value of a field by its dotted name; the config itself for an empty name."""
    value = config
    for part in field.split(".") if field else ():
        value = value[part]
    return value


def _set_fields(config: config_dict.ConfigDict, fields: Mapping[str, Any]) -> None:
    """Sets fields by name or dotted name; those of a group to a mapping."""
    known = field_names(config)
    for field, value in fields.items():
        if field not in known:
            raise UserError(unknown_field_message(field, known))
        group, _, name = field.rpartition(".")
        old = get_field(config, field)
        if isinstance(old, config_dict.ConfigDict) and name != _OPTIONS:
            if not isinstance(value, Mapping | config_dict.ConfigDict):
                raise UserError(
                    f"config.{field} is a group of fields and takes a dictionary such as "
                    f"{{{next(iter(old))!r}: VALUE}}; got {value!r}"
                )
            _set_fields(config, {f"{field}.{key}": inner for key, inner in value.items()})
            continue
        try:
            get_field(config, group)[name] = value
        except TypeError as error:
            kind = get_field(config, group).get_type(name).__name__
            raise UserError(f"config.{field} must be of type {kind}; got {value!r}") from error


def field_names(config: config_dict.ConfigDict) -> list[str]:
    """Returns the dotted names of all groups and fields, each group before its fields."""
    return list(_flatten(config.to_dict()))


def unknown_field_message(field: str, known: Sequence[str]) -> str:
    """Returns the message for a field that does not exist, with the nearest known one."""
    last = field.rpartition(".")[2]
    same_ending = [name for name in known if name.rpartition(".")[2] == last]
    nearest = difflib.get_close_matches(field, same_ending or known, n=1, cutoff=0.0)
    return f"the config has no field {field!r}; the nearest known one is {nearest[0]!r}"


def _wrong(
    config: config_dict.ConfigDict, field: str, expected: str, advice: str = ""
) -> UserError:
    return UserError(f"config.{field} must {expected}; got {get_field(config, field)!r}{advice}")
