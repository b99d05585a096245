"""The backbone and its projection head as pure functions of parameters.

Only this module uses the API of Flax NNX: elsewhere parameters and batch statistics are nested
dictionaries of arrays.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import config_dict

from music_jax import registry
from music_jax.config import embedding_size, is_centered
from music_jax.errors import UserError
from music_jax.models import BACKBONES, Backbone
from music_jax.models.resnet import BatchNorm

Tree = Any  # a nested dictionary of arrays

# Compiler options for `init_network`, which runs once: compilation takes longer than execution.
INIT_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}

# Uniform in +-1 / sqrt(fan_in): a variance of 1 / (3 fan_in).
_LINEAR_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class RunningMean(nnx.Module):
    """Running mean of the embeddings, which inference subtracts.

    Training only tracks it: an objective with centered embeddings subtracts the batch's own mean,
    also if the batch is embedded in microbatches.

    Attributes:
      mean: Running mean [size], float32.
    """

    def __init__(self, size: int, *, momentum: float = 0.9):
        """Initializes the mean to 0; `momentum` is its decay per view."""
        self.momentum = momentum
        self.mean = nnx.BatchStat(jnp.zeros(size))

    def __call__(self, embeddings: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        """Updates the mean, in training, or subtracts it.

        Args:
          embeddings: Embeddings [batch * num_views, size].
          train: Whether to track the mean of each view.
          num_views: Number of views per sample.

        Returns:
          An array of the type and shape of `embeddings`.
        """
        wide = embeddings.astype(jnp.float32)
        if not train:
            return (wide - self.mean[...][None]).astype(embeddings.dtype)
        means = jnp.mean(wide.reshape(-1, num_views, wide.shape[1]), axis=0)  # [views, size]
        for v in range(num_views):
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * means[v]
        return embeddings


class Projector(nnx.Module):
    """Hidden layers of Linear, batch normalization and ReLU, then Linear without bias."""

    def __init__(
        self,
        num_features: int,
        hidden_sizes: Sequence[int],
        output_size: int,
        *,
        center: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the projection head.

        Args:
          num_features: Size of the backbone's features.
          hidden_sizes: Sizes of the hidden layers; may be empty.
          output_size: Size of the embedding.
          center: Whether inference subtracts a running mean from the embedding.
          dtype: Dtype of the products; parameters and statistics are float32.
          rngs: Random number generator of the initial weights.
        """
        sizes = (num_features, *hidden_sizes)
        linear = functools.partial(nnx.Linear, dtype=dtype, kernel_init=_LINEAR_INIT, rngs=rngs)
        self.hidden = nnx.List([linear(a, b) for a, b in itertools.pairwise(sizes)])
        self.norms = nnx.List([BatchNorm(size) for size in hidden_sizes])
        self.output = linear(sizes[-1], output_size, use_bias=False)
        self.center = RunningMean(output_size) if center else None
        self.dtype = dtype

    def __call__(self, features: jax.Array, *, train: bool, num_views: int = 1) -> jax.Array:
        """Maps features [batch * num_views, num_features] to embeddings of the head's dtype."""
        x = features.astype(self.dtype)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = nnx.relu(norm(linear(x), train=train, num_views=num_views))
        x = self.output(x)
        return x if self.center is None else self.center(x, train=train, num_views=num_views)


class _Modules(nnx.Module):
    def __init__(self, config: config_dict.ConfigDict, rngs: nnx.Rngs):
        self.backbone = _make_backbone(config, rngs)
        self.projector = Projector(
            self.backbone.num_features,
            config.projector.hidden_sizes,
            embedding_size(config),
            center=is_centered(config),
            dtype=jnp.dtype(config.compute_dtype),
            rngs=rngs,
        )


def _make_backbone(config: config_dict.ConfigDict, rngs: nnx.Rngs) -> Backbone:
    spec = BACKBONES[config.backbone.name]
    chosen = {field: config.backbone[field] for field in spec.fields}
    if spec.takes_image_size:
        chosen["image_size"] = config.crop.size
    backbone = spec.make(
        channels=config.dataset.num_channels,
        dtype=jnp.dtype(config.compute_dtype),
        rngs=rngs,
        **{field: value for field, value in chosen.items() if value is not None},
        **registry.options(config.backbone),
    )
    if spec.is_registered:
        _check_interface(config.backbone.name, backbone)
    return backbone


def _check_interface(name: str, backbone: Any) -> None:
    """Raises UserError unless a registered backbone has the interface of `Backbone`."""
    problem = None
    if not isinstance(backbone, nnx.Module):
        problem = f"a Flax NNX module; got {type(backbone).__name__}"
    elif not hasattr(getattr(backbone, "num_features", None), "__index__"):
        problem = "a module with the attribute num_features, the size of its features"
    else:
        try:
            inspect.signature(backbone).bind(None, train=True, num_views=2)
        except TypeError as error:
            problem = f"a module with __call__(self, images, *, train, num_views): {error}"
    if problem:
        raise UserError(f"backbone {name!r} must be {problem}")


def _check_features(config: config_dict.ConfigDict, backbone: Backbone) -> None:
    """Checks that the backbone's features have the shape and the type of its description."""
    channels, dtype = config.dataset.num_channels, jnp.dtype(config.compute_dtype)
    sizes = [config.crop.size] + [config.local_views.size] * (config.local_views.count > 0)
    for size in sizes:
        images = jax.ShapeDtypeStruct((4, size, size, channels), dtype)
        features = nnx.eval_shape(
            lambda backbone, x: backbone(x, train=True, num_views=2), backbone, images
        )
        expected = (4, backbone.num_features)
        if not hasattr(features, "shape"):
            raise UserError(
                f"backbone {config.backbone.name!r} must return an array; got a "
                f"{type(features).__name__}"
            )
        if features.shape != expected or features.dtype != jnp.float32:
            raise UserError(
                f"backbone {config.backbone.name!r} must return features of shape {expected}, "
                f"float32, for images of shape {images.shape}; got {features.shape}, "
                f"{features.dtype}"
            )


class _Graph(NamedTuple):
    """Modules without their arrays; hashable.

    Attributes:
      definition: Graph of Flax NNX.
      rngs: Shapes of the state of random layers, such as dropout.
      structure: Structure of this state.
    """

    definition: Any
    rngs: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any


def _split(module: Any) -> tuple[_Graph, Tree, Tree]:
    """Returns the graph, the parameters and all other arrays except the state of random layers."""
    definition, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
    params, rngs, others = states
    leaves, structure = jax.tree.flatten(rngs)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    graph = _Graph(definition, shapes, structure)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(others)


def _merge(graph: _Graph, params: Tree, others: Tree, key: jax.Array | None = None) -> Any:
    """Returns the modules; their random layers draw from `key`."""
    key = jax.random.key(0) if key is None else key
    rngs = [
        jax.random.split(jax.random.fold_in(key, i), x.shape)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else jnp.zeros(x.shape, x.dtype)
        for i, x in enumerate(graph.rngs)
    ]
    state = jax.tree.unflatten(graph.structure, rngs)
    return nnx.merge(graph.definition, params, others, state, copy=True)


@dataclasses.dataclass(frozen=True)
class Network:
    """Pure functions of a backbone with its projection head.

    Attributes:
      graph: The modules without their arrays.
      num_features: Size of the backbone's features.
      num_embedding: Size of the embedding.
    """

    graph: Any
    num_features: int
    num_embedding: int

    def embed(
        self, params: Tree, batch_stats: Tree, views: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Embeds views in training mode: each view is normalized by its own batch statistics.

        Args:
          params: Parameters.
          batch_stats: Running statistics of the normalization layers.
          views: Normalized images [batch, views, height, width, channels].
          key: Random key of layers such as dropout.

        Returns:
          The features [batch, views, features], the embeddings [batch, views, dim] and the new
          running statistics.
        """
        modules = _merge(self.graph, params, batch_stats, key)
        batch, num_views = views.shape[:2]
        images = views.reshape(batch * num_views, *views.shape[2:])
        features = modules.backbone(images, train=True, num_views=num_views)
        embeddings = modules.projector(features, train=True, num_views=num_views)
        return (
            features.reshape(batch, num_views, -1),
            embeddings.reshape(batch, num_views, -1),
            _split(modules)[2],
        )

    def train_features(
        self, params: Tree, batch_stats: Tree, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """Returns features in training mode, [batch, features], and the new running statistics."""
        modules = _merge(self.graph, params, batch_stats, key)
        features = modules.backbone(images, train=True, num_views=1)
        return features, _split(modules)[2]

    def features(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """Returns features in inference mode, [batch, features]."""
        return self.infer(params, batch_stats, images)[0]

    def infer(
        self, params: Tree, batch_stats: Tree, images: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns features [batch, features] and embeddings [batch, dim] in inference mode."""
        modules = _merge(self.graph, params, batch_stats)
        features = modules.backbone(images, train=False, num_views=1)
        return features, modules.projector(features, train=False, num_views=1)


def make_network(config: config_dict.ConfigDict) -> Network:
    """Returns the network of a config, without allocating its arrays."""
    modules = nnx.eval_shape(lambda: _Modules(config, nnx.Rngs(0)))
    if BACKBONES[config.backbone.name].is_registered:
        _check_features(config, modules.backbone)
    return Network(_split(modules)[0], modules.backbone.num_features, embedding_size(config))


def init_network(config: config_dict.ConfigDict, key: jax.Array) -> tuple[Tree, Tree]:
    """Returns initial parameters and batch statistics; to be called under `jax.jit`."""
    _, params, batch_stats = _split(_Modules(config, nnx.Rngs(key)))
    return params, batch_stats


@dataclasses.dataclass(frozen=True)
class FrozenBackbone:
    """A backbone as a pure function, with the shapes of its arrays.

    Attributes:
      graph: The module without its arrays.
      num_features: Size of the features.
      params: Shapes of the parameters, which a network holds under `backbone`.
      batch_stats: Shapes of the running statistics, which a network holds under `backbone`.
    """

    graph: Any
    num_features: int
    params: Tree
    batch_stats: Tree

    def features(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """Returns features in inference mode, [batch, features]."""
        backbone = _merge(self.graph, params, batch_stats)
        return backbone(images, train=False, num_views=1)


def make_frozen_backbone(config: config_dict.ConfigDict) -> FrozenBackbone:
    """Returns the backbone of a config without projection head, and without allocating arrays."""
    module = nnx.eval_shape(lambda: _make_backbone(config, nnx.Rngs(0)))
    graph, params, batch_stats = _split(module)
    return FrozenBackbone(graph, module.num_features, params, batch_stats)
