"""Fine-tuning: how its logits are computed, and when it waits for a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_runs import LinearNetwork
from small_runs import small_config

from music_jax.distributed.mesh import make_data_mesh
from music_jax.evaluation import finetune as module
from music_jax.evaluation.finetune import Classifier, FinetuneRecipe, finetune, logit_extractor
from music_jax.models.network import init_network, make_network


def _divided(images):
    return images.astype(jnp.float32) / 255


def test_logits_are_those_of_the_running_statistics():
    """So that they do not depend on the other images of a batch."""
    config = small_config(name="tiny_resnet")
    network = make_network(config)
    params, batch_stats = jax.jit(lambda key: init_network(config, key))(jax.random.key(0))
    batch_stats = jax.tree.map(lambda x: 0.7 * x + 0.2, batch_stats)
    rng = np.random.Generator(np.random.Philox(key=0))
    images = rng.integers(0, 256, (6, 28, 28, 1), dtype=np.uint8)
    kernel = rng.standard_normal((network.num_features, 3), np.float32)
    bias = np.asarray([0.5, -1.0, 2.0], np.float32)
    classifier = Classifier(params, jnp.asarray(kernel), jnp.asarray(bias), batch_stats)
    extract = logit_extractor(network, classifier, _divided)
    found = np.asarray(extract(images)["logits"])
    features = network.features(params, batch_stats, _divided(jnp.asarray(images)))
    np.testing.assert_allclose(found, np.asarray(features) @ kernel + bias, rtol=1e-4, atol=1e-4)
    brighter = images.copy()
    brighter[1:] = 255
    np.testing.assert_allclose(extract(brighter)["logits"][0], found[0], rtol=1e-4, atol=1e-4)


def test_the_steps_are_sgd_with_momentum_and_decay_in_plain_numpy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 8, 8, 1), np.uint8)  # three steps an epoch
    labels = rng.integers(3, size=(6, 32))
    scale = rng.uniform(0.5, 1.5, 64)
    recipe = FinetuneRecipe(2, 32, 40.0, 8.0, momentum=0.8, weight_decay=0.05)
    with jax.numpy_dtype_promotion("standard"):
        found = finetune(
            LinearNetwork(),
            {"scale": jnp.asarray(scale, jnp.float32)},
            {},
            [(jnp.asarray(x), jnp.asarray(y)) for x, y in zip(images, labels, strict=True)],
            recipe,
            num_classes=3,
            steps_per_epoch=3,
            normalize=_divided,
            mesh=make_data_mesh(),
            seed=4,
        )
    w = 0.01 * np.asarray(jax.random.normal(jax.random.key(4), (64, 3)), np.float64)
    b = np.zeros(3)
    m_scale, m_w, m_b = np.zeros(64), np.zeros((64, 3)), np.zeros(3)
    for step, (x, y) in enumerate(zip(images.reshape(6, 32, 64) / 255, labels, strict=True)):
        factor = 32 / 256 * 0.5 * (1 + np.cos(np.pi * step / 6))
        scores = np.exp(x * scale @ w + b)
        error = (scores / scores.sum(1, keepdims=True) - np.eye(3)[y]) / 32
        m_scale = 0.8 * m_scale + np.sum(error @ w.T * x, axis=0) + 0.05 * scale
        m_w = 0.8 * m_w + (x * scale).T @ error + 0.05 * w
        m_b = 0.8 * m_b + error.sum(0) + 0.05 * b
        scale = scale - 40.0 * factor * m_scale
        w, b = w - 8.0 * factor * m_w, b - 8.0 * factor * m_b
    np.testing.assert_allclose(found.params["scale"], scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.kernel, w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.bias, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("devices", "waits"), [(1, 0), (2, 3)])
def test_a_step_is_waited_for_only_where_devices_share_the_cores(devices, waits, monkeypatch):
    counted = []
    monkeypatch.setattr(module.jax, "block_until_ready", counted.append)
    images, labels = jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.arange(4) % 2
    with jax.numpy_dtype_promotion("standard"):
        finetune(
            LinearNetwork(),
            {"scale": jnp.ones(64)},
            {},
            [(images, labels)] * 3,
            FinetuneRecipe(1, 4, 0.1, 0.1),
            num_classes=2,
            steps_per_epoch=3,
            normalize=_divided,
            mesh=make_data_mesh(devices),
        )
    assert len(counted) == waits
