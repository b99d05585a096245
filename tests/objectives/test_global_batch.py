"""Each objective has one value and gradient on any number of devices, however it is called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from music_jax.objectives import (
    barlow_twins_loss,
    cross_segment,
    discrete_loss,
    music_loss,
    sigreg_loss,
    simclr_loss,
    tcr_loss,
    vicreg_loss,
)
from tests.objectives.cases import relative_error

# name: loss, and the widths of embedding to try it at. 21 units divide by no number of devices.
LOSSES = {
    "music": (functools.partial(music_loss, num_segments=3), (21, 24)),
    "centered": (functools.partial(music_loss, num_segments=3, center=True), (21, 24)),
    "barlow_twins": (barlow_twins_loss, (21, 6)),
    "vicreg": (vicreg_loss, (21, 6)),
    "simclr": (simclr_loss, (21, 6)),
    "sigreg": (functools.partial(sigreg_loss, key=jax.random.key(3), num_slices=5), (21, 6)),
    "tcr": (tcr_loss, (21, 6)),
    "discrete": (discrete_loss, (21, 6)),
}
BASELINES = [name for name in LOSSES if name not in ("music", "centered")]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@functools.cache
def problem(name, dim_index=0, batch=8):
    loss, dims = LOSSES[name]
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (batch, 2, 7))  # [N, views, features]
    weights = jax.random.normal(keys[1], (7, dims[dim_index]))

    def model(weights, images, **options):
        z = images @ weights
        return loss(z[:, 0], z[:, 1], **options)

    return model, weights, images, jax.jit(jax.value_and_grad(model))(weights, images)


def make_mesh(shape, names=("data",), types=None):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=types or (AUTO,) * len(shape), devices=devices)


def place(mesh, weights, images, axes="data"):
    return (
        jax.device_put(weights, NamedSharding(mesh, P())),
        jax.device_put(images, NamedSharding(mesh, P(axes))),
    )


def under_jit(model, weights, images, devices):
    weights, images = place(make_mesh((devices,)), weights, images)
    return jax.jit(jax.value_and_grad(model))(weights, images)


def in_shard_map(model, weights, images, devices, check_vma=True):
    mapped = jax.shard_map(
        functools.partial(model, axis_name="data"),
        mesh=make_mesh((devices,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(jax.value_and_grad(mapped))(weights, images)


def inside_shard_map(model, weights, images, devices):
    mapped = jax.shard_map(
        jax.value_and_grad(functools.partial(model, axis_name="data")),
        mesh=make_mesh((devices,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return jax.jit(mapped)(weights, images)


def in_pmap(model, weights, images, devices):
    def step(weights, images):
        loss, gradient = jax.value_and_grad(model)(weights, images, axis_name="data")
        return loss, jax.lax.pmean(gradient, "data")

    images = images.reshape(devices, -1, *images.shape[1:])  # [devices, N / devices, ...]
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:devices])
    losses, gradients = mapped(weights, images)
    np.testing.assert_array_equal(losses, losses[0])
    return losses[-1], gradients[-1]


WAYS = {
    "jit": under_jit,
    "shard_map": in_shard_map,
    "gradient inside shard_map": inside_shard_map,
    "shard_map unchecked": functools.partial(in_shard_map, check_vma=False),
    "pmap": in_pmap,
}


def check(found, expected):
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "dim_index", "devices"),
    [(name, 1, 4) for name in LOSSES]
    + [("music", 0, 2), ("centered", 0, 2)]
    + [pytest.param(name, 0, 2, marks=pytest.mark.slow) for name in BASELINES]
    + [pytest.param(name, 0, n, marks=pytest.mark.slow) for name in LOSSES for n in (1, 4)],
)
def test_value_and_gradient_match_one_device(name, dim_index, devices, way):
    model, weights, images, expected = problem(name, dim_index)
    check(WAYS[way](model, weights, images, devices), expected)


def test_three_devices_and_blocks_within_a_tile(monkeypatch):
    monkeypatch.setattr(cross_segment, "_BLOCK_BYTES", 160)
    jax.clear_caches()
    model, weights, images, expected = problem("music", batch=9)
    for way in WAYS.values():
        check(way(model, weights, images, 3), expected)
    jax.clear_caches()


def uses_the_sharded_form(step, *arguments):
    return "all-to-all" in step.lower(*arguments).compile().as_text()


@pytest.mark.parametrize("mesh_from", ["arrays", "set_mesh"])
def test_jit_uses_the_sharded_form(mesh_from):
    model, weights, images, expected = problem("music")
    mesh = make_mesh((4,))
    if mesh_from == "arrays":
        weights, images = place(mesh, weights, images)
    step = jax.jit(jax.value_and_grad(model))
    if mesh_from == "set_mesh":
        with jax.set_mesh(mesh):
            assert uses_the_sharded_form(step, weights, images)
            check(step(weights, images), expected)
    else:
        assert uses_the_sharded_form(step, weights, images)
        check(step(weights, images), expected)


def test_each_device_holds_only_its_tile():
    dim, mesh = 1024, make_mesh((4,))
    z = jax.ShapeDtypeStruct((8, dim), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    step = jax.jit(jax.grad(functools.partial(music_loss, num_segments=4), (0, 1)))
    compiled = step.lower(z, z).compile()
    assert "f32[512,512]" in compiled.as_text()
    assert f"f32[{dim},{dim}]" not in compiled.as_text()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("shape", "types", "axes"),
    [
        ((2, 2), (AUTO, AUTO), ("data", "model")),  # both split the batch
        ((2, 2), (AUTO, AUTO), "data"),  # the other holds copies
        ((1, 4), (AUTO, AUTO), "model"),
    ],
)
def test_a_mesh_of_two_axes(name, shape, types, axes):
    model, weights, images, expected = problem(name)
    placed = place(make_mesh(shape, ("data", "model"), types), weights, images, axes)
    check(jax.jit(jax.value_and_grad(model))(*placed), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_shard_map_over_two_axes_or_over_one_of_them(name):
    model, weights, images, expected = problem(name)
    mesh = make_mesh((2, 2), ("data", "model"))
    for axes in (("data", "model"), ("data",)):
        mapped = jax.shard_map(
            functools.partial(model, axis_name=axes),
            mesh=mesh,
            in_specs=(P(), P(axes)),
            out_specs=P(),
            axis_names=set(axes),
        )
        check(jax.jit(jax.value_and_grad(mapped))(weights, images), expected)


@pytest.mark.parametrize("types", [(EXPLICIT, EXPLICIT), (EXPLICIT, AUTO)])
def test_explicit_axes(types):
    model, weights, images, expected = problem("music")
    mesh = make_mesh((2, 2), ("data", "model"), types)
    weights, images = place(mesh, weights, images)
    check(jax.jit(jax.value_and_grad(model))(weights, images), expected)
    with jax.set_mesh(mesh):
        check(jax.jit(jax.value_and_grad(model))(weights, images), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_that_is_no_multiple_of_the_devices(name):
    model, weights, images, expected = problem(name, batch=6)
    mesh = make_mesh((4,))
    whole = [jax.device_put(x, NamedSharding(mesh, P())) for x in (weights, images)]
    check(jax.jit(jax.value_and_grad(model))(*whole), expected)


def test_shardings_known_only_to_the_compiler():
    """Neither the arrays nor the context have a mesh, so that the compiler shards the products."""
    model, weights, images, expected = problem("music")
    mesh = make_mesh((4,))
    shardings = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(jax.value_and_grad(model), in_shardings=shardings)
    check(step(np.asarray(weights), np.asarray(images)), expected)


def test_gradient_checkpointing_and_a_scan_over_steps():
    model, weights, images, expected = problem("music")
    placed = place(make_mesh((4,)), weights, images)
    check(jax.jit(jax.value_and_grad(jax.checkpoint(model)))(*placed), expected)

    def step(weights, _):
        loss, gradient = jax.value_and_grad(model)(weights, placed[1])
        return weights - gradient, (loss, gradient)

    _, (losses, gradients) = jax.jit(lambda w: jax.lax.scan(step, w, length=2))(placed[0])
    check((losses[0], gradients[0]), expected)
    assert losses[1] < losses[0]


def test_bfloat16_products_on_four_devices():
    model, weights, images, expected = problem("music", 1)
    model = functools.partial(model, product_dtype=jnp.bfloat16)
    loss, gradient = under_jit(model, weights, images, 4)
    assert relative_error(loss, expected[0]) < 3e-3
    assert relative_error(gradient, expected[1]) < 1e-2


@pytest.mark.parametrize("name", BASELINES)
def test_one_sample_per_device_is_a_valid_batch(name):
    model, weights, images, expected = problem(name, batch=4)
    check(in_shard_map(model, weights, images, 4), expected)
