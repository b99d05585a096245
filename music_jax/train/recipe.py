"""The static inputs of the training step: network, objective, optimizer, guards, augmentation."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from music_jax.config import from_json, is_centered
from music_jax.data.augment import ViewAugmentation, local_augmentations, view_augmentations
from music_jax.errors import UserError
from music_jax.models.network import Network, make_network
from music_jax.objectives import (
    barlow_twins_loss,
    discrete_loss,
    music_lower_bound,
    music_terms,
    sigreg_loss,
    simclr_loss,
    tcr_loss,
    vicreg_loss,
)
from music_jax.optim import lars, matrices_only, warmup_cosine
from music_jax.registry import BACKBONES, OBJECTIVES, OPTIMIZERS, RegisteredObjective
from music_jax.train.guards import Metrics, Objective, RandomObjective, embedding_statistics

_OBJECTIVE_STREAM = 3  # separates the objectives' randomness from the augmentations'

# A batch's crops, [batch, views, height, width, channels] of `config.dataset.pixel_type`: those of
# the two views, or a pair of these and the local views.
Crops = jax.Array | tuple[jax.Array, jax.Array]

# Groups of fields that no recipe depends on.
_EVALUATION = (
    *("checkpoint", "evaluation", "few_shot", "finetune", "knn", "linear_eval", "online"),
    *("online_probe", "semi_supervised"),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Static inputs of the training step.

    Attributes:
      network: Backbone and projection head.
      objective: Loss of the embeddings of the two views.
      statistics: Statistics of the embeddings of one view, for the guards.
      guards: `config.guards`, the limits that stop a failed training.
      schedule_of: Function from a learning rate at a batch of 256 to the schedule.
      optimizer_of: Function from a schedule to the optimizer.
      views: Augmentation of each of the two views.
      local_views: Augmentation of each local view.
      mean: Mean of each channel, as in `config.dataset`.
      std: Standard deviation of each channel.
      dtype: Type that the network computes in.
      accumulation_steps: Number of microbatches that a batch is split into.
      seed: Seed of the augmentations and of objectives that draw random numbers.
      base_learning_rate: Learning rate at a batch of 256.
    """

    network: Network
    objective: Objective | RandomObjective
    statistics: Callable[[jax.Array], Metrics]
    guards: config_dict.FrozenConfigDict
    schedule_of: Callable[[float | jax.Array], optax.Schedule]
    optimizer_of: Callable[[optax.Schedule], optax.GradientTransformation]
    views: tuple[ViewAugmentation, ...]
    local_views: tuple[ViewAugmentation, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: jnp.dtype
    accumulation_steps: int
    seed: int | jax.Array = 0
    base_learning_rate: float | jax.Array = 0.0

    @property
    def schedule(self) -> optax.Schedule:
        """Learning rate of each step."""
        return self.schedule_of(self.base_learning_rate)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Optimizer of the parameters."""
        return self.optimizer_of(self.schedule)

    def objective_of_step(self, step: int | jax.Array) -> Objective:
        """Returns the objective; one that draws random numbers gets the key of the step."""
        if not isinstance(self.objective, RandomObjective):
            return self.objective
        key = jax.random.fold_in(jax.random.key(self.seed), _OBJECTIVE_STREAM)
        return functools.partial(self.objective.function, key=jax.random.fold_in(key, step))


def make_recipe(config: config_dict.ConfigDict, steps_per_epoch: int) -> Recipe:
    """Returns the recipe that a config describes."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _EVALUATION}
    seed, rate = fields.pop("seed"), fields["optimizer"].pop("base_learning_rate")
    # The cache key includes the registered parts, since a name may be registered again.
    parts = (
        BACKBONES[config.backbone.name],
        OBJECTIVES[config.objective.name],
        OPTIMIZERS[config.optimizer.name],
    )
    recipe = _shared_recipe(json.dumps(fields, sort_keys=True), steps_per_epoch, parts)
    return dataclasses.replace(recipe, seed=seed, base_learning_rate=rate)


@functools.lru_cache(maxsize=4)
def _shared_recipe(config_json: str, steps_per_epoch: int, parts: tuple[Any, ...]) -> Recipe:
    """Returns the recipe of all seeds and base learning rates, which thus share one program."""
    config = from_json(json.loads(config_json))
    _, make_objective, make_optimizer = parts
    is_music = config.objective.name == "music"
    objective = make_objective(config.objective)
    if not isinstance(objective, RandomObjective):
        objective = functools.partial(objective)  # hashable in any case
    network = make_network(config)
    if isinstance(make_objective, RegisteredObjective):
        _check_result(config, objective, network.num_embedding)
    return Recipe(
        network=network,
        objective=objective,
        statistics=functools.partial(
            embedding_statistics,
            num_segments=config.objective.num_segments if is_music else None,
            temperature=config.objective.temperature,
            center=is_centered(config),
        ),
        guards=config_dict.FrozenConfigDict(config.guards),
        schedule_of=functools.partial(_make_schedule, config, steps_per_epoch),
        optimizer_of=lambda schedule: _scale_backbone(
            make_optimizer(schedule, config.optimizer), config
        ),
        views=view_augmentations(config),
        local_views=local_augmentations(config),
        mean=tuple(config.dataset.mean),
        std=tuple(config.dataset.std),
        dtype=jnp.dtype(config.compute_dtype),
        accumulation_steps=config.accumulation_steps,
    )


def _check_result(config: config_dict.ConfigDict, objective: Objective, dim: int) -> None:
    """Raises UserError unless a registered objective returns a loss and scalars."""
    view = jax.ShapeDtypeStruct((config.batch_size, dim), jnp.dtype(config.compute_dtype))
    found = jax.eval_shape(objective, view, view)
    is_pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
    scalars = jax.tree.leaves(found)
    if not (
        is_pair
        and getattr(found[0], "shape", None) == ()
        and jnp.issubdtype(found[0].dtype, jnp.floating)
        and all(x.shape == () for x in scalars)
    ):
        raise UserError(
            f"objective {config.objective.name!r} must return a pair: the loss, a floating scalar, "
            f"and a dictionary of scalars to log; got {found}"
        )


def _scale_backbone(
    optimizer: optax.GradientTransformation, config: config_dict.ConfigDict
) -> optax.GradientTransformation:
    """Scales the updates of the backbone; those of its frozen stages become zero.

    The updates of every optimizer are proportional to the learning rate.
    """
    parts, scale = [optimizer], config.optimizer.backbone_scale
    if scale != 1:
        backbone = lambda params: {name: name == "backbone" for name in params}  # noqa: E731
        parts.append(optax.masked(optax.scale(scale), backbone))
    if config.backbone.frozen_stages:
        frozen = functools.partial(_frozen, config.backbone)
        parts.append(optax.masked(optax.set_to_zero(), frozen))
    # A chain of one would change the state: saved runs would not resume.
    return optax.chain(*parts) if len(parts) > 1 else optimizer


def _frozen(config: config_dict.ConfigDict, params: Any) -> Any:
    """Returns a mask of the parameters of the first `frozen_stages` stages of the backbone."""
    spec = BACKBONES[config.name]
    num_blocks = sum(spec.stages[: config.frozen_stages - 1])
    mask = {name: name in spec.stem for name in params["backbone"]}
    blocks = {index: int(index) < num_blocks for index in params["backbone"]["blocks"]}
    return {name: False for name in params} | {"backbone": mask | {"blocks": blocks}}


def _make_schedule(
    config: config_dict.ConfigDict, steps_per_epoch: int, base_learning_rate: float | jax.Array
) -> optax.Schedule:
    optimizer = config.optimizer
    warmup = max(optimizer.warmup_epochs, optimizer.min_warmup_steps / steps_per_epoch)
    if optimizer.min_warmup_steps and warmup >= config.num_epochs:
        raise UserError(
            f"config.optimizer.min_warmup_steps = {optimizer.min_warmup_steps} is not less than "
            f"the {config.num_epochs * steps_per_epoch} steps of the training; lower it"
        )
    return warmup_cosine(
        base_learning_rate,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        num_epochs=config.num_epochs,
        warmup_epochs=warmup,
        final_scale=optimizer.final_scale,
    )


def _music(config: config_dict.ConfigDict) -> Objective:
    weights = (config.diagonal_weight, config.cross_segment_weight, config.invariance_weight)
    bound = music_lower_bound(config.units_per_segment)

    def objective(a: jax.Array, b: jax.Array) -> tuple[jax.Array, Metrics]:
        terms = music_terms(
            a,
            b,
            num_segments=config.num_segments,
            temperature=config.temperature,
            center=config.center,
        )
        loss = weights[0] * terms[0] + weights[1] * terms[1] + weights[2] * terms[2]
        metrics = terms._asdict()
        if weights == (1.0, 1.0, 1.0):  # the bound holds for these only
            metrics["gap_to_bound"] = loss - jnp.asarray(bound, loss.dtype)
        return loss, metrics

    return objective


def _of_loss(
    loss: Callable[..., jax.Array], **fields: str
) -> Callable[[config_dict.ConfigDict], Objective]:
    """Returns the factory of an objective; `fields` has the field of each argument of its loss."""

    def make(config: config_dict.ConfigDict) -> Objective:
        options = {argument: config[field] for argument, field in fields.items()}
        return lambda a, b: (loss(a, b, **options), {})

    return make


def _sigreg(config: config_dict.ConfigDict) -> RandomObjective:
    fields = ("sigreg_weight", "num_slices", "num_points", "t_max")
    options = {field: config[field] for field in fields}
    return RandomObjective(lambda a, b, key: (sigreg_loss(a, b, key=key, **options), {}))


OBJECTIVES.update(
    music=_music,
    barlow_twins=_of_loss(barlow_twins_loss, off_diagonal_weight="off_diagonal_weight"),
    vicreg=_of_loss(
        vicreg_loss,
        similarity_weight="similarity_weight",
        variance_weight="variance_weight",
        covariance_weight="covariance_weight",
    ),
    simclr=_of_loss(simclr_loss, temperature="contrast_temperature"),
    sigreg=_sigreg,
    tcr=_of_loss(tcr_loss, similarity_weight="cosine_weight", epsilon_squared="epsilon_squared"),
    discrete=_of_loss(
        discrete_loss,
        temperature="temperature",
        sharpness_weight="sharpness_weight",
        diversity_weight="diversity_weight",
    ),
)


# Every optimizer decays only the parameters of two or more dimensions: neither biases nor the
# parameters of normalization layers.


def _lars(
    learning_rate: optax.Schedule, config: config_dict.ConfigDict
) -> optax.GradientTransformation:
    return lars(learning_rate, weight_decay=config.weight_decay, momentum=config.momentum)


def _sgd(
    learning_rate: optax.Schedule, config: config_dict.ConfigDict
) -> optax.GradientTransformation:
    # The mask of `optax.add_decayed_weights` would change the state: saved runs would not resume.
    decay = optax.stateless_with_tree_map(
        lambda g, w: g + config.weight_decay * w if jnp.ndim(w) >= 2 else g
    )
    return optax.chain(decay, optax.sgd(learning_rate, momentum=config.momentum))


def _adamw(
    learning_rate: optax.Schedule, config: config_dict.ConfigDict
) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=config.weight_decay, mask=matrices_only)


OPTIMIZERS.update(lars=_lars, sgd=_sgd, adamw=_adamw)
