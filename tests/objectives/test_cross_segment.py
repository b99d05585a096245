"""Blocks and tiles of the joint probability."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import cross_segment, joint_probability, music_loss, music_terms
from tests.objectives.cases import relative_error


def two_views(batch, dim, dtype=jnp.float32):
    return [2 * jax.random.normal(jax.random.key(view), (batch, dim), dtype) for view in (0, 1)]


@pytest.fixture
def block_elements(monkeypatch):
    def set_it(elements, itemsize=4):
        monkeypatch.setattr(cross_segment, "_BLOCK_BYTES", elements * itemsize)
        jax.clear_caches()  # compiled programs do not depend on the patched constant

    yield set_it
    jax.clear_caches()


def dense_terms(za, zb, num_segments):
    """Computes the terms by their definition, with the whole joint matrix."""
    batch, dim = za.shape
    joint = joint_probability(za, zb, num_segments=num_segments)
    entropies = joint * jnp.log(joint)
    segments = np.arange(dim) * num_segments // dim
    different = segments[:, None] != segments[None, :]
    cross = jnp.sum(jnp.where(different, entropies, 0.0)) / (num_segments * (num_segments - 1))
    pa, pb = (
        jnp.clip(jax.nn.softmax(z.reshape(batch, num_segments, -1), -1), min=1e-8) for z in (za, zb)
    )
    invariance = -jnp.mean(jnp.log(jnp.sum(pa * pb, -1)))
    return jnp.trace(entropies) / num_segments, cross, invariance


@pytest.mark.parametrize("elements", [1, 400])
# The last has probabilities below the clamp, the first is near to uniform.
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_value_and_gradient_match_the_dense_form_for_any_number_of_blocks(
    block_elements, elements, scale
):
    block_elements(elements)
    za, zb = (scale * z for z in two_views(10, 35))
    step = jax.value_and_grad(lambda a, b: music_terms(a, b, num_segments=5)[1], (0, 1))
    dense = jax.value_and_grad(lambda a, b: dense_terms(a, b, 5)[1], (0, 1))
    loss, gradients = jax.jit(step)(za, zb)
    with jax.enable_x64(True):
        expected, expected_gradients = jax.jit(dense)(*(z.astype(jnp.float64) for z in (za, zb)))
    np.testing.assert_allclose(music_terms(za, zb, num_segments=5)[1], expected, rtol=1e-6)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for gradient, dense_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, dense_gradient) < 1e-5


@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.parametrize("rows", [(0, 7), (3, 9), (13, 7)])
@pytest.mark.parametrize("columns", [(0, 20), (6, 5)])
def test_a_tile_at_any_position_sums_its_own_elements(rows, columns, center):
    batch, units = 4, 5
    rng = np.random.default_rng(0)
    low, high = (0.9, 1.1) if center else (0.1, 5)
    ra, rb = rng.uniform(low, high, size=(2, batch, 20)).astype(np.float32)
    joint = ra.T.astype(np.float64) @ rb / batch
    elements = joint * np.log(joint) - joint
    segments = np.arange(20) // units
    elements *= segments[:, None] != segments[None, :]
    window = [slice(start, start + count) for start, count in (rows, columns)]
    value = cross_segment.tile_divergence(
        cross_segment.Tile(batch, units, whole=False),
        (jnp.asarray(ra[:, window[0]] - center), jnp.asarray(rb[:, window[1]] - center)),
        jnp.float32(center),
        (jnp.int32(rows[0]), jnp.int32(columns[0])),
    )
    np.testing.assert_allclose(value, elements[window[0], window[1]].sum(), rtol=1e-5, atol=1e-6)


def test_the_value_takes_one_product_and_the_gradient_three():
    za, zb = two_views(8, 12)
    function = functools.partial(music_loss, num_segments=3)
    big = re.compile(r"dot_general.*tensor<(12x12xf32|8x12xf32)>$", re.MULTILINE)
    value, gradient = (
        sum("x3xf32" not in line for line in (m.group() for m in big.finditer(program)))
        for program in (
            jax.jit(function).lower(za, zb).as_text(),
            jax.jit(jax.grad(function, (0, 1))).lower(za, zb).as_text(),
        )
    )
    # The program contains them twice, for centered and plain ratios, and runs one of the two.
    assert (value, gradient) == (2 * 1, 2 * 3)


def test_no_matrix_of_dim_by_dim_is_held():
    dim = 4096
    za, zb = (jax.ShapeDtypeStruct((16, dim), jnp.float32) for _ in "ab")
    function = functools.partial(music_loss, num_segments=64)
    compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(za, zb).compile()
    assert f"[{dim},{dim}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * dim**2


@pytest.mark.parametrize(
    ("platform", "dim", "loops"),
    [("cpu", 4096, True), ("cuda", 4096, False), ("cuda", 12288, True), ("tpu", 1024, False)],
)
def test_gpus_compute_a_matrix_of_256_mib_at_once_and_others_one_of_16(platform, dim, loops):
    z = jax.ShapeDtypeStruct((4, dim), jnp.float32)
    step = jax.jit(jax.grad(functools.partial(music_loss, num_segments=64), (0, 1)))
    program = step.trace(z, z).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in program) == loops


@pytest.mark.parametrize("elements", [60, 10**6])
@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_match_the_dense_form(block_elements, elements, mode):
    block_elements(elements, itemsize=8)
    with jax.enable_x64(True):
        za, zb = two_views(5, 12, jnp.float64)
        direction = jnp.cos(zb)

        def product(function):
            gradient = jax.grad(lambda z: function(z, zb + z))
            if mode == "forward over reverse":
                return jax.jit(lambda z: jax.jvp(gradient, (z,), (direction,))[1])(za)
            return jax.jit(jax.grad(lambda z: jnp.vdot(gradient(z), direction)))(za)

        fused = product(functools.partial(music_loss, num_segments=3))
        dense = product(lambda a, b: sum(dense_terms(a, b, 3)))
        assert jnp.linalg.norm(dense) > 1e-3
        assert relative_error(fused, dense) < 1e-9


def test_forward_mode_of_the_loss_raises():
    za, zb = two_views(4, 6)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda z: music_loss(z, zb, num_segments=2), (za,), (za,))


def test_the_device_grid_is_nearly_square():
    grids = {n: cross_segment.device_grid(n) for n in (1, 2, 3, 4, 6, 8, 32, 256)}
    assert grids == {
        1: (1, 1),
        2: (1, 2),
        3: (1, 3),
        4: (2, 2),
        6: (2, 3),
        8: (2, 4),
        32: (4, 8),
        256: (16, 16),
    }


def test_the_excess_mass_of_clamped_probabilities():
    """Each segment sums to 1 + added, which is large here so that every term counts."""
    added_a, added_b = np.random.default_rng(0).uniform(0, 1, size=(2, 6, 4)).astype(np.float32)
    pairs = np.einsum("ns,nt->nst", 1 + added_a, 1 + added_b)
    pairs *= 1 - np.eye(4)  # different segments
    mass = cross_segment._clamped_mass(jnp.asarray(added_a), jnp.asarray(added_b))
    np.testing.assert_allclose(4 * 3 + mass, pairs.sum((1, 2)).mean(), rtol=1e-6)
