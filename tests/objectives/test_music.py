"""The MUSIC objective against the reference, its lower bound and its symmetries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import (
    joint_probability,
    music_loss,
    music_lower_bound,
    music_terms,
    segment_codes,
)
from tests.objectives.cases import EXTREMES as EXTREME_VIEWS
from tests.objectives.cases import cases, extreme_views, relative_error

CASES = cases("music_objective")


def case_arguments(number, dtype):
    case = CASES[number]
    options = {
        "num_segments": int(case["num_segments"]),
        "temperature": float(case["temperature"]),
    }
    return jnp.asarray(case["za"], dtype), jnp.asarray(case["zb"], dtype), options


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", CASES)
def test_value_terms_and_gradients_match_the_reference(number, dtype):
    case = CASES[number]
    with jax.enable_x64(dtype == "float64"):
        za, zb, options = case_arguments(number, dtype)
        step = jax.value_and_grad(functools.partial(music_loss, **options), (0, 1))
        loss, (gradient_a, gradient_b) = jax.jit(step)(za, zb)
        terms = music_terms(za, zb, **options)
    assert {x.dtype for x in (loss, *terms, gradient_a)} == {jnp.dtype(dtype)}
    tolerance = {"float32": 2e-5, "float64": 1e-10}[dtype]
    assert relative_error(loss, case["loss_f64"]) < tolerance
    for name in ("diagonal", "invariance"):
        assert relative_error(getattr(terms, name), case[f"{name}_f64"]) < tolerance
    assert relative_error(terms.cross_segment, case["off_f64"]) < tolerance
    assert relative_error(gradient_a, case["grad_a_f64"]) < tolerance
    assert relative_error(gradient_b, case["grad_b_f64"]) < tolerance


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 0.01, 0.03, 0.033, 0.5])
def test_the_float32_gradient_is_accurate_near_the_uniform_distribution(spread):
    """Covers differences of the logits that are lost in float32 probabilities."""
    rng = np.random.default_rng(0)
    za, zb = spread * rng.uniform(size=(2, 24, 30))

    def gradients(dtype):
        with jax.enable_x64(dtype == "float64"):
            step = jax.grad(functools.partial(music_loss, num_segments=5), (0, 1))
            return jax.jit(step)(jnp.asarray(za, dtype), jnp.asarray(zb, dtype))

    # Centered and plain ratios are equally accurate where they take over from each other, at 1/32.
    for found, expected in zip(gradients("float32"), gradients("float64"), strict=True):
        assert relative_error(found, expected) < (3e-6 if spread < 1 / 32 else 2e-5)


@pytest.mark.parametrize("spread", [0.01, 0.04, 0.2, 0.3])
def test_products_in_bfloat16_are_accurate_near_the_uniform_distribution(spread):
    """Where K p rounded to bfloat16 has one or two of the digits by which it differs from 1."""
    rng = np.random.default_rng(0)
    za, zb = jnp.asarray(spread * rng.uniform(size=(2, 64, 64)), jnp.float32)

    def term(za, zb, product_dtype):
        options = {"num_segments": 4, "product_dtype": product_dtype}
        return music_terms(za, zb, **options).cross_segment

    step = jax.value_and_grad(term, (0, 1))
    value, gradients = step(za, zb, jnp.bfloat16)
    exact_value, exact = step(za, zb, jnp.float32)
    for found, expected in zip(gradients, exact, strict=True):
        assert relative_error(found, expected) < 0.01
    assert abs(value - exact_value) < 2e-6


def test_each_weight_multiplies_its_term():
    za, zb, options = case_arguments("02", "float32")
    terms = music_terms(za, zb, **options)
    loss = functools.partial(music_loss, za, zb, **options)
    weights = {"diagonal_weight": 2.0, "cross_segment_weight": 3.0, "invariance_weight": 5.0}
    expected = 2 * terms.diagonal + 3 * terms.cross_segment + 5 * terms.invariance
    np.testing.assert_allclose(loss(**weights), expected, rtol=1e-6)
    for name, term in zip(weights, terms, strict=True):
        alone = loss(**(dict.fromkeys(weights, 0.0) | {name: 1.0}))
        np.testing.assert_allclose(alone, term, rtol=1e-6)


def test_float8_embeddings_have_products_in_float32():
    za, zb, options = case_arguments("02", "float32")
    narrow = [z.astype(jnp.float8_e4m3fn) for z in (za, zb)]
    expected = music_loss(*(z.astype(jnp.float32) for z in narrow), **options)
    np.testing.assert_allclose(music_loss(*narrow, **options), expected, rtol=1e-6)


def test_float64_arrays_of_numpy_are_float32_without_x64():
    za, zb, options = case_arguments("02", "float32")
    wide = [np.asarray(z, np.float64) for z in (za, zb)]
    loss, gradient = jax.value_and_grad(functools.partial(music_loss, **options))(*wide)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(loss, music_loss(za, zb, **options), rtol=1e-6)


def test_bfloat16_embeddings_give_a_float32_loss_and_an_accurate_gradient():
    za, zb, options = case_arguments("02", "bfloat16")
    step = jax.jit(jax.value_and_grad(functools.partial(music_loss, **options)))
    loss, gradient = step(za, zb)
    exact, exact_gradient = step(za.astype(jnp.float32), zb.astype(jnp.float32))
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert relative_error(loss, exact) < 1e-4
    assert relative_error(gradient, exact_gradient) < 1e-2


def test_float32_embeddings_with_bfloat16_products():
    za, zb, options = case_arguments("02", "float32")
    exact = music_loss(za, zb, **options)
    rounded = music_loss(za, zb, product_dtype=jnp.bfloat16, **options)
    assert rounded.dtype == jnp.float32
    assert 0 < relative_error(rounded, exact) < 1e-4
    program = jax.jit(functools.partial(music_loss, product_dtype="bfloat16", **options)).lower(
        za, zb
    )
    assert "(tensor<32x40xbf16>, tensor<32x40xbf16>) -> tensor<40x40xf32>" in program.as_text()


def test_float16_embeddings_keep_the_smallest_probability():
    za = jnp.asarray([[60.0, -60, 60, -60], [-60, 60, -60, 60]], jnp.float16)
    loss, gradient = jax.value_and_grad(music_loss)(za, -za, num_segments=2)
    expected = music_loss(za.astype(jnp.float32), -za.astype(jnp.float32), num_segments=2)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.float16)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_the_products_follow_the_default_matmul_precision():
    za, zb, options = case_arguments("02", "float32")
    function = functools.partial(music_loss, **options)
    with jax.default_matmul_precision("highest"):
        program = jax.jit(jax.grad(function, (0, 1))).lower(za, zb).as_text()
    assert program.count("precision = [HIGHEST, HIGHEST]") >= 3


EXTREMES = {
    "huge": lambda z: np.where(z > 0, 1e30, -1e30),
    "largest": lambda z: np.sign(z) * np.finfo(np.float32).max,
    "one huge": lambda z: np.where(np.arange(z.shape[1]) == 3, 1e30, z),
    "saturated": lambda z: 100 * z,
    "zero": lambda z: 0 * z,
    "collapsed": lambda z: np.broadcast_to(z[:1], z.shape),
    "tiny": lambda z: 1e-38 * z,
}


@pytest.mark.parametrize("temperature", [1.0, 1e-6, 1e-30, 1e6])
@pytest.mark.parametrize("name", EXTREMES)
def test_value_and_gradient_are_finite_for_any_finite_embeddings(name, temperature):
    z = np.random.default_rng(0).normal(size=(8, 12))
    za = EXTREMES[name](z).astype(np.float32)
    for zb in (za, -za, z.astype(np.float32)):
        loss, gradients = jax.value_and_grad(music_loss, (0, 1))(
            za, zb, num_segments=3, temperature=temperature
        )
        assert np.isfinite(loss)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_single_sample_has_a_value():
    """Of one sample the joint distribution is a product: its entropies are sums of segments'."""
    p = np.array([[0.25, 0.75], [0.5, 0.5]])
    z = jnp.asarray(np.log(p).reshape(1, 4), jnp.float32)
    terms = music_terms(z, z, num_segments=2)
    joint = p[0][:, None] * p[1][None, :]
    squares = p**2
    np.testing.assert_allclose(terms.cross_segment, (joint * np.log(joint)).sum(), rtol=1e-6)
    np.testing.assert_allclose(terms.diagonal, (squares * np.log(squares)).sum() / 2, rtol=1e-6)
    np.testing.assert_allclose(terms.invariance, -np.log(squares.sum(1)).mean(), rtol=1e-6)


def balanced_code(segments, units, logit=40.0):
    """One-hot, uniform and independent in pairs: all codes of two digits, and their sums."""
    digits = np.stack(np.meshgrid(np.arange(units), np.arange(units)), -1).reshape(-1, 2)
    code = np.stack([digits[:, 0], digits[:, 1], digits.sum(1) % units], 1)[:, :segments]
    return logit * np.eye(units, dtype=np.float32)[code].reshape(len(code), -1)  # [K², S K]


@pytest.mark.parametrize(("segments", "units"), [(2, 4), (3, 5), (3, 2)])
def test_a_balanced_code_reaches_the_lower_bound(segments, units):
    z = balanced_code(segments, units)
    loss, gradient = jax.value_and_grad(music_loss)(z, z, num_segments=segments)
    np.testing.assert_allclose(loss, music_lower_bound(units), atol=2e-6)
    assert np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 100.0])
def test_no_value_is_below_the_lower_bound(scale):
    rng = np.random.default_rng(0)
    loss = jax.jit(music_loss, static_argnames="num_segments")
    for segments, units, batch in [(2, 2, 4), (3, 4, 16), (4, 8, 5), (2, 16, 300)]:
        for agreement in (0.0, 0.9, 1.0):
            za, noise = rng.normal(size=(2, batch, segments * units)).astype(np.float32)
            zb = np.float32(agreement) * za + np.float32(1 - agreement) * noise
            value = loss(scale * za, scale * zb, num_segments=segments)
            assert value >= music_lower_bound(units) - 1e-5


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1.5, 1), (2, 1, 0.5)])
def test_curvature_at_the_uniform_distribution(weights):
    """The formulas of docs/theory.md: redundant segments cost nothing at second order."""
    diagonal, cross, invariance = weights
    names = ("diagonal_weight", "cross_segment_weight", "invariance_weight")
    options = {"num_segments": 3, **dict(zip(names, weights, strict=True))}
    u = np.random.default_rng(0).normal(size=(24, 3, 6))  # samples, segments, units
    u -= u.mean(axis=2, keepdims=True)
    common, rest = np.broadcast_to(u[:1], u.shape), u - u.mean(axis=0)
    redundant = np.broadcast_to(rest[:, :1], u.shape)
    unstable = (cross - invariance) / 6 - diagonal * (2 * np.log(6) - 3) / 36
    useful = -invariance / 6 - diagonal * (2 * np.log(6) - 1) / 36

    def loss(u):
        z = jnp.log1p(u).reshape(24, 18)
        return float(music_loss(z, z, **options))

    with jax.enable_x64(True):
        for direction, expected in ((common, unstable), (rest, useful), (redundant, useful)):
            step = 1e-2 * direction
            second = (loss(step) + loss(-step)) / 2 - loss(0 * step)
            np.testing.assert_allclose(second * 24 * 3 / np.sum(step**2), expected, rtol=1e-2)


def test_gradient_descent_approaches_the_lower_bound():
    za = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda z: music_loss(z, z, num_segments=2)))
    for _ in range(300):
        loss, gradient = step(za)
        za -= 20.0 * gradient
        assert loss >= music_lower_bound(4) - 1e-5
    assert loss < music_lower_bound(4) + 0.1


def test_the_loss_is_invariant_to_permutations_of_samples_segments_and_units():
    case = CASES["02"]
    options = {"num_segments": 8}
    loss = music_loss(case["za"], case["zb"], **options)
    rng = np.random.default_rng(0)
    samples, segments, units = (rng.permutation(size) for size in (32, 8, 5))
    each_its_own = np.stack([rng.permutation(5) for _ in range(8)])[None]
    permutations = {
        "samples": lambda z: z[samples],
        "segments": lambda z: z.reshape(32, 8, 5)[:, segments].reshape(32, 40),
        "units": lambda z: z.reshape(32, 8, 5)[..., units].reshape(32, 40),
        "units of each segment": lambda z: np.take_along_axis(
            z.reshape(32, 8, 5), each_its_own, -1
        ).reshape(32, 40),
    }
    for name, permute in permutations.items():
        permuted = music_loss(permute(case["za"]), permute(case["zb"]), **options)
        np.testing.assert_allclose(permuted, loss, rtol=1e-6, err_msg=name)
    across = rng.permutation(40)  # units that leave their segment do count
    assert abs(music_loss(case["za"][:, across], case["zb"][:, across], **options) - loss) > 1e-3


def test_swapping_the_views_keeps_the_value_and_swaps_the_gradients():
    za, zb, options = case_arguments("01", "float32")
    step = jax.value_and_grad(functools.partial(music_loss, **options), (0, 1))
    loss, (gradient_a, gradient_b) = step(za, zb)
    swapped, (swapped_b, swapped_a) = step(zb, za)
    np.testing.assert_allclose(swapped, loss, rtol=1e-6)
    assert relative_error(swapped_a, gradient_a) < 1e-5
    assert relative_error(swapped_b, gradient_b) < 1e-5
    joint = joint_probability(za, zb, **options)
    np.testing.assert_allclose(joint_probability(zb, za, **options), joint.T, rtol=1e-5)


def test_gradient_descent_leaves_a_collapsed_embedding():
    rng = np.random.default_rng(0)
    collapsed = np.broadcast_to(rng.normal(size=(1, 12)), (32, 12))
    z = jnp.asarray(collapsed + 1e-2 * rng.normal(size=(32, 12)), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda z: music_loss(z, z, num_segments=3)))
    start = step(z)[0]
    assert len(np.unique(segment_codes(z, num_segments=3), axis=0)) == 1
    for _ in range(400):
        loss, gradient = step(z)
        z -= 20.0 * gradient
    codes = segment_codes(z, num_segments=3)
    assert loss < start - 1
    assert loss < 0.8 * music_lower_bound(4)
    assert len(np.unique(codes, axis=0)) >= 8
    assert all(len(np.unique(codes[:, segment])) == 4 for segment in range(3))


@pytest.mark.parametrize("name", [*EXTREME_VIEWS, "offset"])
def test_centering_subtracts_the_mean_of_each_view(name):
    views = extreme_views("random" if name == "offset" else name, 12, 10)
    if name == "offset":
        views = [z + np.linspace(-50, 50, 10, dtype=np.float32) for z in views]
    plain = functools.partial(music_loss, num_segments=2)
    doubles = [np.asarray(z, np.float64) for z in views]
    with jax.enable_x64(True):
        centered = [z - z.mean(0) for z in doubles]
        expected, wanted = jax.value_and_grad(plain, (0, 1))(*centered)
        total = np.sum(music_terms(*doubles, num_segments=2, center=True))
    step = jax.jit(jax.value_and_grad(functools.partial(plain, center=True), (0, 1)))
    found, gradients = step(*views)
    np.testing.assert_allclose(total, expected, rtol=1e-10)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for gradient, want in zip(gradients, map(np.array, wanted), strict=True):
        want -= want.mean(axis=0)
        bound = 2e-5 * np.abs(want).max() + (0 if name == "tiny" else 5e-8)
        np.testing.assert_allclose(gradient, want, rtol=0, atol=bound)


def test_a_collapsed_embedding_is_a_stationary_point_unless_it_is_centered():
    """The samples differ, but their softmax is saturated at the same unit of each segment."""
    rng = np.random.default_rng(0)
    za, zb = 40 * np.eye(8)[[0, 3, 5, 6]].reshape(1, 32) + rng.normal(size=(2, 64, 32))

    def norm(center):
        loss = functools.partial(music_loss, num_segments=4, center=center)
        return np.linalg.norm(jax.grad(loss)(np.float32(za), np.float32(zb)))

    assert norm(center=False) < 1e-12
    assert norm(center=True) > 1e-2


def test_the_loss_maps_over_a_leading_axis():
    za, zb = (np.stack([CASES["04"][name], CASES["05"][name]]) for name in ("za", "zb"))
    step = jax.value_and_grad(functools.partial(music_loss, num_segments=4), (0, 1))
    losses, gradients = jax.vmap(step)(za, zb)
    for index in range(2):
        loss, expected = step(za[index], zb[index])
        np.testing.assert_allclose(losses[index], loss, rtol=1e-6)
        for gradient, single in zip(gradients, expected, strict=True):
            assert relative_error(gradient[index], single) < 1e-5


def test_lower_bound():
    assert music_lower_bound(1) == 0
    assert abs(music_lower_bound(80) + 13.146080) < 1e-6
