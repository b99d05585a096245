"""Errors of all objectives: each has what was expected, what was given, and what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import (
    barlow_twins_loss,
    discrete_loss,
    joint_probability,
    music_loss,
    music_lower_bound,
    music_terms,
    segment_codes,
    segment_probabilities,
    sigreg_loss,
    simclr_loss,
    tcr_loss,
    vicreg_loss,
)

PAIRED = {
    "music_loss": functools.partial(music_loss, num_segments=2),
    "music_terms": functools.partial(music_terms, num_segments=2),
    "joint_probability": functools.partial(joint_probability, num_segments=2),
    "barlow_twins_loss": barlow_twins_loss,
    "vicreg_loss": vicreg_loss,
    "simclr_loss": simclr_loss,
    "sigreg_loss": functools.partial(sigreg_loss, key=jax.random.key(0)),
    "tcr_loss": tcr_loss,
    "discrete_loss": discrete_loss,
}
SINGLE = {
    "segment_probabilities": functools.partial(segment_probabilities, num_segments=2),
    "segment_codes": functools.partial(segment_codes, num_segments=2),
}
BAD_EMBEDDINGS = {
    "rank 1": (jnp.ones(4), r"\[batch, dim\], got \(4,\); flatten"),
    "rank 3": (jnp.ones((2, 2, 4)), r"\[batch, dim\], got \(2, 2, 4\); flatten"),
    "integers": (jnp.ones((2, 4), jnp.int32), "floating dtype, got int32; cast"),
    "complex": (jnp.ones((2, 4), jnp.complex64), "floating dtype, got complex64; cast"),
    "no samples": (jnp.ones((0, 4)), r"at least one sample and one unit, got \(0, 4\)"),
    "a list": ([[1.0, 2.0]], r"an array of shape \[batch, dim\], got list; convert"),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("kind", BAD_EMBEDDINGS)
def test_each_view_must_be_a_floating_array_of_batch_by_dim(name, kind):
    bad, message = BAD_EMBEDDINGS[kind]
    good = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=f"embeddings_a: expected .*{message}"):
        PAIRED[name](bad, good)
    with pytest.raises(ValueError, match=f"embeddings_b: expected .*{message}"):
        PAIRED[name](good, bad)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("kind", BAD_EMBEDDINGS)
def test_embeddings_must_be_a_floating_array_of_batch_by_dim(name, kind):
    bad, message = BAD_EMBEDDINGS[kind]
    with pytest.raises(ValueError, match=f"embeddings: expected .*{message}"):
        SINGLE[name](bad)


@pytest.mark.parametrize("name", PAIRED)
def test_the_views_must_have_equal_shapes_and_dtypes(name):
    z = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"equal shapes, got \(2, 4\) and \(3, 4\)"):
        PAIRED[name](z, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="equal dtypes, got float32 and bfloat16; cast"):
        PAIRED[name](z, z.astype(jnp.bfloat16))


SEGMENTED = [
    segment_codes,
    segment_probabilities,
    *(
        lambda z, function=function, **options: function(z, z, **options)
        for function in (joint_probability, music_loss, music_terms)
    ),
]


@pytest.mark.parametrize("function", SEGMENTED)
def test_the_segments_must_divide_the_embedding(function):
    with pytest.raises(ValueError, match=r"dim 10 and num_segments 4 \(remainder 2\); choose"):
        function(jnp.ones((2, 10)), num_segments=4)
    with pytest.raises(ValueError, match=r"num_segments: expected at least [12], got 0"):
        function(jnp.ones((2, 10)), num_segments=0)
    with pytest.raises(ValueError, match=r"num_segments: expected an int, got 2\.5"):
        function(jnp.ones((2, 10)), num_segments=2.5)


@pytest.mark.parametrize("function", [music_loss, music_terms])
def test_the_objective_requires_two_segments(function):
    with pytest.raises(ValueError, match="at least 2, got 1; the cross-segment term needs two"):
        function(jnp.ones((2, 4)), jnp.ones((2, 4)), num_segments=1)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan"), np.float32(0)])
@pytest.mark.parametrize(
    "function", [*SEGMENTED[1:], lambda z, num_segments, **options: discrete_loss(z, z, **options)]
)
def test_the_temperature_must_be_positive(function, temperature):
    with pytest.raises(ValueError, match=f"temperature: expected .*, got {temperature}"):
        function(jnp.ones((2, 4)), num_segments=2, temperature=temperature)


def test_the_temperature_and_the_number_of_segments_are_scalars():
    z = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="temperature: expected a positive finite number"):
        music_loss(z, z, num_segments=2, temperature=jnp.ones(2))
    with pytest.raises(ValueError, match="num_segments: expected an int"):
        music_loss(z, z, num_segments=np.array(2))
    assert float(music_loss(z, z, num_segments=np.int64(2), temperature=jnp.ones(()))) < 0


@pytest.mark.parametrize("loss", [barlow_twins_loss, vicreg_loss, simclr_loss])
def test_the_baselines_require_two_samples(loss):
    with pytest.raises(ValueError, match=f"{loss.__name__}: .* at least 2 samples.* got 1"):
        loss(jnp.ones((1, 4)), jnp.ones((1, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 0}, r"key: expected a single key, as by jax\.random\.key\(0\), got 0"),
        ({"key": jax.random.split(jax.random.key(0))}, "key: expected a single key"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "key: expected a single key"),
        ({"num_slices": 0}, "num_slices: expected an int of at least 1, got 0"),
        ({"num_slices": 1.5}, r"num_slices: expected an int of at least 1, got 1\.5"),
        ({"num_points": 1}, "num_points: expected an int of at least 2, got 1"),
        ({"t_max": 0.0}, r"t_max: expected a positive finite number, got 0\.0"),
        ({"t_max": float("nan")}, "t_max: expected a positive finite number, got nan"),
    ],
)
def test_the_options_of_sigreg(options, message):
    z = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=message):
        sigreg_loss(z, z, **({"key": jax.random.key(0)} | options))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), np.float32(0)])
def test_the_distortion_of_the_coding_rate_must_be_positive(value):
    z = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=f"epsilon_squared: expected a positive .*, got {value}"):
        tcr_loss(z, z, epsilon_squared=value)


def test_the_product_dtype_must_represent_the_smallest_probability():
    z = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"product_dtype: expected bfloat16.* got float16"):
        music_loss(z, z, num_segments=2, product_dtype=jnp.float16)


def test_the_lower_bound_requires_a_unit():
    with pytest.raises(ValueError, match="units_per_segment: expected at least 1, got 0"):
        music_lower_bound(0)


def test_errors_are_raised_under_jit():
    step = jax.jit(functools.partial(music_loss, num_segments=3))
    with pytest.raises(ValueError, match="dim 4 and num_segments 3"):
        step(jnp.ones((2, 4)), jnp.ones((2, 4)))
