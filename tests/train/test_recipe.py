"""The objectives, optimizers and schedule of a config, against plain numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.exchange.weights import tensors_by_name, torch_names
from music_jax.models.network import init_network
from music_jax.objectives import music_terms
from music_jax.train.recipe import OBJECTIVES, OPTIMIZERS, _frozen, _make_schedule, make_recipe

# No two fields have the same value, and none its default.
_CONFIG = config_dict.ConfigDict(
    {
        "num_segments": 3,
        "units_per_segment": 4,
        "temperature": 0.7,
        "diagonal_weight": 1.5,
        "cross_segment_weight": 0.6,
        "invariance_weight": 2.5,
        "off_diagonal_weight": 0.03,
        "similarity_weight": 11.0,
        "variance_weight": 13.0,
        "covariance_weight": 5.0,
        "contrast_temperature": 0.35,
        "center": True,
        "sigreg_weight": 0.15,
        "num_slices": 24,
        "num_points": 9,
        "t_max": 3.5,
        "cosine_weight": 50.0,
        "epsilon_squared": 0.45,
        "sharpness_weight": 1.25,
        "diversity_weight": 1.75,
    }
)


def _music(a, b):
    a, b = (jnp.asarray(z - z.mean(0)) for z in (a, b))
    terms = music_terms(a, b, num_segments=3, temperature=0.7)
    return 1.5 * terms.diagonal + 0.6 * terms.cross_segment + 2.5 * terms.invariance


def _barlow_twins(a, b):
    a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b))
    c = a.T @ b / len(a)
    on = np.diag(c)
    return np.sum((1 - on) ** 2) + 0.03 * (np.sum(c**2) - np.sum(on**2))


def _vicreg(a, b):
    loss = 11 * np.mean((a - b) ** 2)
    for z in (a, b):
        covariances = np.cov(z.T)
        variances = np.diag(covariances)
        loss += 13 * np.mean(np.maximum(0, 1 - np.sqrt(variances + 1e-4))) / 2
        loss += 5 * (np.sum(covariances**2) - np.sum(variances**2)) / z.shape[1]
    return loss


def _simclr(a, b):
    z = np.concatenate([a, b])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    weights = np.exp(z @ z.T / 0.35) * (1 - np.eye(len(z)))
    pairs = np.roll(np.arange(len(z)), len(a))
    return -np.mean(np.log(weights[np.arange(len(z)), pairs] / weights.sum(axis=1)))


_KEY = jax.random.key(4)


def _sigreg(a, b):
    directions = np.asarray(jax.random.normal(_KEY, (12, 24), jnp.float32))
    t = np.linspace(-3.5, 3.5, 9)
    normal = np.exp(-(t**2) / 2)
    loss = 0.85 * np.mean((a - b) ** 2) / 4
    for z in (a, b):
        waves = np.exp(1j * t * (z @ (directions / np.linalg.norm(directions, axis=0)))[..., None])
        squares = np.abs(waves.mean(0) - normal) ** 2
        loss += 0.15 / 2 * len(z) * np.mean(np.trapezoid(squares * normal, t))
    return loss


def _tcr(a, b):
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    mean = (a + b) / np.linalg.norm(a + b, axis=1, keepdims=True)
    loss = -50 / 2 * np.mean(np.sum((a + b) * mean, axis=1))
    for z in (a, b):
        matrix = np.eye(12) + 12 / (len(z) * 0.45) * z.T @ z
        loss -= np.linalg.slogdet(matrix)[1] / 4
    return loss


def _discrete(a, b):
    p, q = (np.exp(z / 0.7) / np.exp(z / 0.7).sum(1, keepdims=True) for z in (a, b))
    loss = np.mean(np.sum((p - q) * np.log(p / q), axis=1)) / 2
    for x in (p, q):
        mean = x.mean(0)
        loss += -1.25 / 2 * np.mean(np.sum(x * np.log(x), 1)) + 1.75 / 2 * mean @ np.log(mean)
    return loss


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_each_field_is_used_as_its_name_implies(name):
    a, b = 0.6 * np.random.default_rng(0).normal(size=(2, 10, 12))
    expected = {
        "music": _music,
        "barlow_twins": _barlow_twins,
        "vicreg": _vicreg,
        "simclr": _simclr,
        "sigreg": _sigreg,
        "tcr": _tcr,
        "discrete": _discrete,
    }[name](a.astype(np.float32), b.astype(np.float32))
    objective = OBJECTIVES[name](_CONFIG)
    if name == "sigreg":
        objective = functools.partial(objective.function, key=_KEY)
    loss, metrics = objective(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert set(metrics) == (
        {"diagonal", "cross_segment", "invariance"} if name == "music" else set()
    )


RATES = (0.3, 0.2, 0.1)


def optimizer_config(name):
    """Every field differs from its default and from the others."""
    config = default_config()
    config.optimizer.name = name
    config.optimizer.weight_decay = 0.07
    config.optimizer.momentum = 0.8
    return config.optimizer


def moved(name):
    """A matrix and a bias, and their gradients, through three steps of an optimizer."""
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    grads = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in RATES]
    optimizer = OPTIMIZERS[name](lambda step: jnp.asarray(RATES)[step], optimizer_config(name))

    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam divides by an integer's power
        for grad in grads:
            grad = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad)
            params, state = step(params, state, grad)
    return start, grads, params


def test_sgd_has_momentum_and_decays_only_matrices():
    start, grads, found = moved("sgd")
    for name, decay in (("kernel", 0.07), ("bias", 0.0)):
        w, velocity = start[name], 0.0
        for rate, grad in zip(RATES, grads, strict=True):
            velocity = 0.8 * velocity + grad[name] + decay * w
            w = w - rate * velocity
        np.testing.assert_allclose(found[name], w, rtol=1e-5)


def test_lars_adapts_and_decays_only_matrices():
    start, grads, found = moved("lars")
    for name, decay in (("kernel", 0.07), ("bias", 0.0)):
        w, velocity = start[name], 0.0
        for rate, grad in zip(RATES, grads, strict=True):
            g = grad[name] + decay * w
            if name == "kernel":
                g = 1e-3 * np.linalg.norm(w) / np.linalg.norm(g) * g
            velocity = 0.8 * velocity + g
            w = w - rate * velocity
        np.testing.assert_allclose(found[name], w, rtol=1e-5)


def test_adamw_decays_only_matrices():
    start, grads, found = moved("adamw")
    for name, decay in (("kernel", 0.07), ("bias", 0.0)):
        w, mean, square = start[name], 0.0, 0.0
        for t, (rate, grad) in enumerate(zip(RATES, grads, strict=True), 1):
            mean = 0.9 * mean + 0.1 * grad[name]
            square = 0.999 * square + 0.001 * grad[name] ** 2
            ratio = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
            w = w - rate * (ratio + decay * w)
        np.testing.assert_allclose(found[name], w, atol=1e-5)


def test_the_sgd_of_a_run_saved_before_its_decay_was_masked_has_the_same_state():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    before = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lambda step: 0.1, momentum=0.9))
    now = OPTIMIZERS["sgd"](lambda step: 0.1, optimizer_config("sgd"))
    assert jax.tree.structure(before.init(params)) == jax.tree.structure(now.init(params))


def update(**fields):
    """Returns the second update of a tiny backbone and its projector, and the optimizer's state."""
    config = default_config()
    config.backbone.name, config.optimizer.warmup_epochs = "tiny_resnet", 0
    config.update_from_flattened_dict(fields)
    optimizer = make_recipe(config, steps_per_epoch=5).optimizer
    shapes = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))[0]
    rng = np.random.default_rng(0)
    params, *grads = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
        for _ in range(3)
    )
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # as above
        for grad in grads:
            updates, state = optimizer.update(grad, state, params)
    return updates, state


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_the_backbone_has_its_own_learning_rate_and_frozen_stages(name):
    fields = {"optimizer.name": name, "projector.hidden_sizes": (), "projector.output_size": 8}
    fields |= {"objective.name": "vicreg"}
    expected, state = update(**fields)
    found, _ = update(**fields | {"optimizer.backbone_scale": 0.25, "backbone.frozen_stages": 2})
    jax.tree.map(np.testing.assert_array_equal, found["projector"], expected["projector"])
    for path, value in jax.tree.leaves_with_path(found["backbone"]):
        name_of = jax.tree_util.keystr(path)
        theirs = functools.reduce(lambda tree, key: tree[key.key], path, expected["backbone"])
        scale = 0.25 if name_of.startswith("['blocks'][1]") else 0.0
        np.testing.assert_array_equal(value, np.float32(scale) * theirs)  # a power of two: exact
    # By default, nothing changes the state that runs of earlier versions have saved.
    config = default_config()
    config.optimizer.name = name
    plain = OPTIMIZERS[name](lambda step: 0.1, config.optimizer)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(expected))


@pytest.mark.parametrize(
    ("name", "stages", "expected"),
    [
        ("resnet18", 1, "conv1 bn1"),
        ("resnet18", 3, "conv1 bn1 layer1 layer2"),
        ("resnet50", 5, "conv1 bn1 layer1 layer2 layer3 layer4"),
        ("vit_s16", 1, "patch_embed cls_token"),
        ("vit_s16", 3, "patch_embed cls_token blocks.0 blocks.1"),
        ("vit_s16", 13, "patch_embed cls_token blocks"),
    ],
)
def test_stages_are_those_of_torchvision_and_timm(name, stages, expected):
    config = default_config()
    config.backbone.update({"name": name, "frozen_stages": stages})
    params = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))[0]
    mask = jax.tree.broadcast(_frozen(config.backbone, params), params)
    assert not any(jax.tree.leaves(mask["projector"]))
    names = torch_names(config)
    found = {names[ours] for ours, frozen in tensors_by_name(mask["backbone"]).items() if frozen}
    parts = tuple(f"{part}." for part in expected.split())
    ours = tensors_by_name(params["backbone"])
    assert found == {names[x] for x in ours if f"{names[x]}.".startswith(parts)}


@pytest.mark.parametrize("step", [0, 3, 14, 15, 31, 34])
def test_the_schedule_is_that_of_the_config(step):
    config = default_config()
    config.batch_size, config.num_epochs = 96, 7
    config.optimizer.warmup_epochs = 3
    config.optimizer.final_scale = 0.02
    peak = 0.4 * 96 / 256
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 15) / 20))
    expected = peak * step / 15 if step < 15 else peak * (0.02 + 0.98 * cosine)
    assert _make_schedule(config, 5, 0.4)(step) == pytest.approx(expected, rel=1e-5)


def test_a_short_warmup_is_lengthened_to_its_least_steps():
    config = default_config()
    config.dataset.name = "digits"
    config.num_epochs, config.batch_size = 20, 256
    config.optimizer.warmup_epochs, config.optimizer.min_warmup_steps = 1, 100
    schedule = make_recipe(config, 12).schedule  # an epoch has 12 steps
    peak = config.optimizer.base_learning_rate
    assert schedule(50) == pytest.approx(peak / 2)
    assert schedule(100) == pytest.approx(peak)
    assert make_recipe(config, 200).schedule(200) == pytest.approx(peak)  # one epoch is longer
    assert make_recipe(config, 200).schedule(100) == pytest.approx(peak / 2)
    with pytest.raises(UserError, match="min_warmup_steps = 100 is not less than the 100 steps"):
        _ = make_recipe(config, 5).schedule
