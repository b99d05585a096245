"""The backbone and its projection head as pure functions of parameters.

This is the one place that knows that the modules are Flax NNX: everywhere else parameters and
batch statistics are nested dictionaries of arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import config_dict

from music_jax.config import embedding_size
from music_jax.models import BACKBONES
from music_jax.models.projector import Projector
from music_jax.models.resnet import Backbone

Tree = Any  # a nested dictionary of arrays


class _Modules(nnx.Module):
    def __init__(self, config: config_dict.ConfigDict, rngs: nnx.Rngs):
        self.backbone = _make_backbone(config, rngs)
        self.projector = Projector(
            self.backbone.num_features,
            config.projector.hidden_sizes,
            embedding_size(config),
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
      graph: the modules without their arrays.
      num_features: size of the backbone's features.
      num_embedding: size of the embedding.
    """

    graph: Any
    num_features: int
    num_embedding: int

    def embed(
        self, params: Tree, batch_stats: Tree, views: jax.Array
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Embeds views in training mode: each view is normalized by its own batch statistics.

        Args:
          params: the parameters.
          batch_stats: the running statistics of the normalization layers.
          views: [batch, views, height, width, channels], normalized images.

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
        """Features [batch, features] by the batch's statistics, and the new running ones."""
        modules = nnx.merge(self.graph, params, batch_stats, copy=True)
        features = modules.backbone(images, train=True, num_views=1)
        return features, nnx.to_pure_dict(nnx.state(modules, nnx.BatchStat))

    def features(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """Features [batch, features] of images [batch, ...], by the running statistics."""
        return self.infer(params, batch_stats, images)[0]

    def infer(
        self, params: Tree, batch_stats: Tree, images: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Features [batch, features] and embeddings [batch, dim], by the running statistics."""
        modules = nnx.merge(self.graph, params, batch_stats, copy=True)
        features = modules.backbone(images, train=False, num_views=1)
        return features, modules.projector(features, train=False, num_views=1)


def make_network(config: config_dict.ConfigDict) -> Network:
    """The network that a config describes, without any array."""
    modules = nnx.eval_shape(lambda: _Modules(config, nnx.Rngs(0)))
    graph = nnx.split(modules, nnx.Param, nnx.BatchStat)[0]
    return Network(graph, modules.backbone.num_features, embedding_size(config))


# Options of `jax.jit` for `init_network`, which runs once: compiling it takes longer than running.
INIT_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


def init_network(config: config_dict.ConfigDict, key: jax.Array) -> tuple[Tree, Tree]:
    """Initial parameters and batch statistics; to be called under `jax.jit`."""
    modules = _Modules(config, nnx.Rngs(key))
    params, batch_stats = nnx.state(modules, nnx.Param), nnx.state(modules, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


@dataclasses.dataclass(frozen=True)
class FrozenBackbone:
    """A backbone alone as a pure function, with the shapes of its arrays.

    Attributes:
      graph: the module without its arrays.
      num_features: size of the features.
      params: shapes of the parameters, which are a network's at `backbone`.
      batch_stats: shapes of the running statistics, likewise.
    """

    graph: Any
    num_features: int
    params: Tree
    batch_stats: Tree

    def features(self, params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        """Features [batch, features] of images [batch, ...], by the running statistics."""
        backbone = nnx.merge(self.graph, params, batch_stats, copy=True)
        return backbone(images, train=False, num_views=1)


def make_frozen_backbone(config: config_dict.ConfigDict) -> FrozenBackbone:
    """The backbone that a config describes, without its projection head and any array."""
    module = nnx.eval_shape(lambda: _make_backbone(config, nnx.Rngs(0)))
    graph = nnx.split(module, nnx.Param, nnx.BatchStat)[0]
    params, batch_stats = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
    return FrozenBackbone(
        graph, module.num_features, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
    )
