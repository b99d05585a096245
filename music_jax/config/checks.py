"""Checks of single fields of a config and of its parts, all made by `music_jax.config.validate`.

Each raises a UserError that names the field.
"""

import math
from typing import Any

from ml_collections import config_dict

from music_jax.errors import UserError


def get(config: config_dict.ConfigDict, field: str) -> Any:
    """A field by its dotted name."""
    value = config
    for part in field.split("."):
        value = value[part]
    return value


def wrong(config: config_dict.ConfigDict, field: str, expected: str) -> UserError:
    """The error of a field, by its dotted name, that must do something else than it does."""
    return UserError(f"config.{field} must {expected}; got {get(config, field)!r}")


def check_one_of(config: config_dict.ConfigDict, field: str, known: Any) -> None:
    """Checks that a field has one of the known values."""
    if get(config, field) not in known:
        raise wrong(config, field, f"be one of {', '.join(str(k) for k in known)}")


def check_at_least(config: config_dict.ConfigDict, field: str, low: int) -> None:
    """Checks that a field is no less than a number."""
    if not get(config, field) >= low:
        raise wrong(config, field, f"be at least {low}")


def check_positive(config: config_dict.ConfigDict, field: str) -> None:
    """Checks that a field is a positive finite number."""
    if not (get(config, field) > 0 and math.isfinite(get(config, field))):
        raise wrong(config, field, "be positive and finite")


def check_backbone(config: config_dict.ConfigDict) -> None:
    """Checks that the backbone takes the options that are set, and images of the crops' size."""
    from music_jax.models import BACKBONES

    backbone = config.backbone
    spec = BACKBONES[backbone.name]
    for field in ("stem", "zero_init_residual", "num_heads"):
        if field not in spec.fields and backbone[field] is not None:
            raise UserError(
                f"config.backbone.{field} = {backbone[field]!r} means nothing to {backbone.name}; "
                "leave it unset"
            )
    width, heads = spec.make.keywords.get("width"), backbone.num_heads
    if heads is not None and (heads < 1 or width % heads):
        raise wrong(config, "backbone.num_heads", f"divide {backbone.name}'s width, {width}")
    if config.crop.size % spec.image_multiple:
        raise wrong(
            config, "crop.size", f"be a multiple of {spec.image_multiple} for {backbone.name}"
        )


def check_guards(config: config_dict.ConfigDict) -> None:
    """Checks the guards."""
    for field in ("guards.loss_spike_window", "guards.collapse_steps"):
        check_at_least(config, field, 1)
    for field in (
        "guards.max_rewinds",
        "guards.warmup_steps",
        "guards.loss_spike_deviations",
        "guards.min_effective_rank",
        "guards.check_replicas_every_steps",
        "guards.check_determinism_every_steps",
    ):
        check_at_least(config, field, 0)
    for field in ("min_usage_entropy", "max_dead_units", "min_embedding_std"):
        if not 0 <= config.guards[field] <= 1:
            raise wrong(config, f"guards.{field}", "be in [0, 1]")


def check_batches(config: config_dict.ConfigDict) -> None:
    """Checks that a batch that is normalized by its own statistics has at least two samples.

    The batch is the global one, over all devices; with accumulation each microbatch is normalized.
    """
    for part in ("semi_supervised.", "finetune.", "online_probe.", ""):
        if get(config, f"{part}batch_size") < 2:
            raise wrong(config, f"{part}batch_size", "be at least 2: it is normalized as a whole")
    size, parts = config.batch_size, config.accumulation_steps
    if size % parts:
        raise wrong(config, "accumulation_steps", f"divide batch_size = {size}")
    if size // parts < 2:
        raise wrong(
            config,
            "accumulation_steps",
            f"leave two samples or more of batch_size = {size} to each microbatch, which is "
            "normalized as a whole",
        )


def check_evaluation(config: config_dict.ConfigDict) -> None:
    """Checks the protocols' own parts."""
    check_at_least(config, "evaluation.num_views", 2)
    for field in ("knn.more_k", "few_shot.shots"):
        if any(value < 1 for value in get(config, field)):
            raise wrong(config, field, "be positive numbers")
    if not config.few_shot.shots:
        raise wrong(config, "few_shot.shots", "be one or more numbers")
    semi = config.semi_supervised
    if not semi.fractions or not all(0 < fraction <= 1 for fraction in semi.fractions):
        raise wrong(config, "semi_supervised.fractions", "be one or more numbers in (0, 1]")
    for field in ("lists", "backbone_learning_rates", "head_learning_rates"):
        if len(semi[field]) != len(semi.fractions):
            raise wrong(
                config,
                f"semi_supervised.{field}",
                f"have one entry for each of semi_supervised.fractions = {semi.fractions}",
            )
        if field != "lists" and not all(rate > 0 for rate in semi[field]):
            raise wrong(config, f"semi_supervised.{field}", "be positive")


def check_embedding(config: config_dict.ConfigDict, size: int) -> None:
    """Checks that the embedding, of a size, is made of the objective's segments."""
    segments, units = config.objective.num_segments, config.objective.units_per_segment
    if size < 1:
        raise wrong(config, "projector.output_size", "be at least 1")
    if config.objective.name == "music" and segments * units != size:
        raise UserError(
            f"the objective's {segments} segments of {units} units need an embedding of "
            f"{segments * units}, but config.projector.output_size is {size}; leave it unset, or "
            "change objective.num_segments or objective.units_per_segment"
        )
