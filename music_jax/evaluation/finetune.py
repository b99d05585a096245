"""Classification with the backbone itself trained on, by a learning rate of its own."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from music_jax.distributed.mesh import shares_cores
from music_jax.evaluation.features import Extractor, replicate
from music_jax.models.network import Network, Tree


@dataclasses.dataclass(frozen=True)
class FinetuneRecipe:
    """How a backbone is trained on with labels.

    Attributes:
      num_epochs: passes over the labeled images.
      batch_size: images a step.
      backbone_learning_rate: at a batch of 256; falls as a cosine to 0.
      head_learning_rate: of the linear classifier, likewise.
      momentum: of SGD.
      weight_decay: of all parameters.
    """

    num_epochs: int
    batch_size: int
    backbone_learning_rate: float
    head_learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classifier:
    """A backbone with a linear classifier.

    Attributes:
      params: the network's parameters.
      kernel: [features, classes].
      bias: [classes].
      batch_stats: the network's running statistics.
    """

    params: Tree
    kernel: jax.Array
    bias: jax.Array
    batch_stats: Tree


# Images as they come from the host to what the backbone takes; see `features.normalize`.
Normalize = Callable[[jax.Array], jax.Array]


def finetune(
    network: Network,
    params: Tree,
    batch_stats: Tree,
    batches: Iterable[tuple[jax.Array, jax.Array]],
    recipe: FinetuneRecipe,
    *,
    num_classes: int,
    steps_per_epoch: int,
    normalize: Normalize,
    mesh: Mesh,
    seed: int = 0,
    after_step: Callable[[], None] = lambda: None,
) -> Classifier:
    """Trains a backbone and a linear classifier together; normalization is by the batch.

    Args:
      network: the network, whose projector takes no part.
      params: the parameters to start from, which stay as they are.
      batch_stats: the running statistics to start from.
      batches: images [batch, height, width, channels] and integer labels [batch] of every step.
      recipe: how to train.
      num_classes: number of labels.
      steps_per_epoch: steps an epoch, for the schedule.
      normalize: applied to each batch of images.
      mesh: the devices.
      seed: of the classifier's kernel, drawn from N(0, 0.01).
      after_step: called after each step, such as to move a progress bar.

    Returns:
      The classifier after the last step.
    """
    optimizer = _optimizer(recipe, steps_per_epoch)
    kernel = 0.01 * jax.random.normal(jax.random.key(seed), (network.num_features, num_classes))
    start = {"backbone": params, "head": (kernel, jnp.zeros(num_classes))}
    trained, batch_stats = replicate((start, batch_stats), mesh)
    opt_state = jax.jit(optimizer.init)(trained)
    step = jax.jit(functools.partial(_step, network, optimizer, normalize), donate_argnums=(2,))
    for images, labels in batches:
        trained, batch_stats, opt_state = step(trained, batch_stats, opt_state, images, labels)
        if shares_cores(mesh):
            jax.block_until_ready(trained["head"])
        after_step()
    kernel, bias = trained["head"]
    return Classifier(trained["backbone"], kernel, bias, batch_stats)


def _optimizer(recipe: FinetuneRecipe, steps_per_epoch: int) -> optax.GradientTransformation:
    def sgd(base_learning_rate: float) -> optax.GradientTransformation:
        peak = base_learning_rate * recipe.batch_size / 256
        schedule = optax.cosine_decay_schedule(peak, recipe.num_epochs * steps_per_epoch)
        return optax.chain(
            optax.add_decayed_weights(recipe.weight_decay),
            optax.sgd(schedule, momentum=recipe.momentum),
        )

    return optax.multi_transform(
        {"backbone": sgd(recipe.backbone_learning_rate), "head": sgd(recipe.head_learning_rate)},
        {"backbone": "backbone", "head": "head"},
    )


def _step(
    network: Network,
    optimizer: optax.GradientTransformation,
    normalize: Normalize,
    trained: Tree,
    batch_stats: Tree,
    opt_state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[Tree, Tree, optax.OptState]:
    def loss(trained: Tree) -> tuple[jax.Array, Tree]:
        features, new_stats = network.train_features(
            trained["backbone"], batch_stats, normalize(images)
        )
        kernel, bias = trained["head"]
        logits = features.astype(jnp.float32) @ kernel + bias[None]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), new_stats

    grads, new_stats = jax.grad(loss, has_aux=True)(trained)
    updates, opt_state = optimizer.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), new_stats, opt_state


def logit_extractor(network: Network, classifier: Classifier, normalize: Normalize) -> Extractor:
    """Gives the `logits` [batch, classes] of images, the running statistics being used."""

    @jax.jit
    def extract(classifier: Classifier, images: jax.Array) -> dict[str, jax.Array]:
        features = network.features(classifier.params, classifier.batch_stats, normalize(images))
        logits = features.astype(jnp.float32) @ classifier.kernel + classifier.bias[None]
        return {"logits": logits}

    return functools.partial(extract, classifier)
