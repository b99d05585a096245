"""Checks the fields of a config, and finds them by name."""

import difflib
import fnmatch
import inspect
import json
from collections.abc import Collection, Sequence
from typing import Any

from ml_collections import config_dict

from music_jax import registry
from music_jax.config.defaults import default_config
from music_jax.errors import UserError

OPTIONS = "options"  # field of a registered part, a dictionary of JSON values
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
    "[0, 1]": "*_probability *.translation *.max_skipped_share guards.min_usage_entropy"
    " guards.max_dead_units guards.min_embedding_std objective.sigreg_weight"
    " optimizer.final_scale",
    # Two samples or more, since batch normalization needs them.
    "[2, inf)": "batch_size semi_supervised.batch_size finetune.batch_size online_probe.batch_size"
    " evaluation.num_views objective.num_segments objective.units_per_segment"
    " objective.num_points online.num_images online.view_images online.num_views",
    "[0, inf)": "guards.check_*_every_steps guards.loss_spike_deviations guards.max_rewinds"
    " guards.min_effective_rank guards.warmup_steps *.weight_decay *.brightness *.contrast"
    " *.saturation *.noise_std backbone.frozen_stages optimizer.backbone_scale"
    " online.every_steps optimizer.min_warmup_steps objective.*_weight",
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
    "[0, 0.5]": "*.hue",
    "[0, 89]": "*.shear_degrees",
    "[0, 180]": "*.rotation_degrees",
}
_PAIRS = "crop.scale local_views.scale crop.aspect_ratio augmentation.*.scale *.blur_sigma"
_NOT_EMPTY = (
    "linear_eval.base_learning_rates few_shot.shots semi_supervised.fractions online.measures"
)


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
        advice = "; shorten the warm-up with --config.optimizer.warmup_epochs=N"
        raise _wrong(config, "optimizer.warmup_epochs", expected, advice)
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
        if name == OPTIONS:
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
    numbers = f"{'integers' if entry is int else 'numbers'} of at most {_MAX_NUMBER}"
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
        except (TypeError, ValueError) as error:  # a ValueError if it has no signature
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


def flatten(record: dict[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Returns all groups and fields by dotted name, each group before its fields.

    The options of registered parts count as one field.
    """
    found = {}
    for key, value in record.items():
        found[prefix + key] = value
        if isinstance(value, dict) and key != OPTIONS:
            found |= flatten(value, f"{prefix}{key}{separator}", separator)
    return found


def field_names(config: config_dict.ConfigDict) -> list[str]:
    """Returns the dotted names of all groups and fields, each group before its fields."""
    return list(flatten(config.to_dict()))


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
