"""The backbone and its projection head as pure functions of parameters.

Only this module uses the API of Flax NNX: elsewhere parameters and batch statistics are nested
dictionaries of arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import config_dict

from music_jax.config import embedding_size, is_centered
from music_jax.models import BACKBONES, Backbone
from music_jax.models.layers import Projector

Tree = Any  # a nested dictionary of arrays

# Compiler options for `init_network`, which runs once: compilation takes longer than execution.
INIT_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


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
    return spec.make(
        channels=config.dataset.num_channels,
        dtype=jnp.dtype(config.compute_dtype),
        rngs=rngs,
        remat=config.backbone.remat,
        **{field: value for field, value in chosen.items() if value is not None},
    )


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
        self, params: Tree, batch_stats: Tree, views: jax.Array
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Embeds views in training mode: each view is normalized by its own batch statistics.

        Args:
          params: Parameters.
          batch_stats: Running statistics of the normalization layers.
          views: Normalized images [batch, views, height, width, channels].

        Returns:
          The features [batch, views, features], the embeddings [batch, views, dim] and the new
          running statistics.
        """
        modules = nnx.merge(self.graph, params, batch_stats, copy=True)
        batch, num_views = views.shape[:2]
        images = views.reshape(batch * num_views, *views.shape[2:])
        features = modules.backbone(images, train=True, num_views=num_views)
        embeddings = modules.projector(features, train=True, num_views=num_views)
        return (
            features.reshape(batch, num_views, -1),
            embeddings.reshape(batch, num_views, -1),
            nnx.to_pure_dict(nnx.state(modules, nnx.BatchStat)),
        )

    def train_features(
        self, params: Tree, batch_stats: Tree, images: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """Returns features in training mode, [batch, features], and the new running statistics."""
        modules = nnx.merge(self.graph, params, batch_stats, copy=True)
        features = modules.backbone(images, train=True, num_views=1)
        return features, nnx.to_pure_dict(nnx.state(modules, nnx.BatchStat))

    def features(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """Returns features in inference mode, [batch, features]."""
        return self.infer(params, batch_stats, images)[0]

    def infer(
        self, params: Tree, batch_stats: Tree, images: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns features [batch, features] and embeddings [batch, dim] in inference mode."""
        modules = nnx.merge(self.graph, params, batch_stats, copy=True)
        features = modules.backbone(images, train=False, num_views=1)
        return features, modules.projector(features, train=False, num_views=1)


def make_network(config: config_dict.ConfigDict) -> Network:
    """Returns the network of a config, without allocating its arrays."""
    modules = nnx.eval_shape(lambda: _Modules(config, nnx.Rngs(0)))
    graph = nnx.split(modules, nnx.Param, nnx.BatchStat)[0]
    return Network(graph, modules.backbone.num_features, embedding_size(config))


def init_network(config: config_dict.ConfigDict, key: jax.Array) -> tuple[Tree, Tree]:
    """Returns initial parameters and batch statistics; to be called under `jax.jit`."""
    return _arrays(_Modules(config, nnx.Rngs(key)))


def _arrays(module: Any) -> tuple[Tree, Tree]:
    params, batch_stats = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


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
        backbone = nnx.merge(self.graph, params, batch_stats, copy=True)
        return backbone(images, train=False, num_views=1)


def make_frozen_backbone(config: config_dict.ConfigDict) -> FrozenBackbone:
    """Returns the backbone of a config without projection head, and without allocating arrays."""
    module = nnx.eval_shape(lambda: _make_backbone(config, nnx.Rngs(0)))
    graph = nnx.split(module, nnx.Param, nnx.BatchStat)[0]
    return FrozenBackbone(graph, module.num_features, *_arrays(module))
