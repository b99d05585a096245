"""The complete augmentation: its draws, what they depend on, and their effect."""

import dataclasses
import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from music_jax.data.augment import ViewAugmentation, _Draw, _draw_affine, _Randomness
from music_jax.data.augment import augment_views as augment
from music_jax.data.augment import normalize_images as normalize

FULL = ViewAugmentation(
    flip_probability=0.5,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_probability=0.2,
    blur_probability=0.5,
    solarize_probability=0.2,
    affine_probability=0.5,
    rotation_degrees=15.0,
    translation=0.1,
    scale=(0.9, 1.1),
    shear_degrees=5.0,
    noise_probability=0.5,
    noise_std=0.05,
)
# Without noise, and without a threshold that rounding may cross.
QUIET = dataclasses.replace(FULL, noise_probability=0.0, solarize_probability=0.0)
NOTHING = ViewAugmentation()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(count, channels=3, side=20, views=2):
    shape = (count, views, side, side, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# The same program, its machine code less optimized: these tests mostly wait for the compiler.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnames=("views", "dtype"))
def augmented(images, indices, key, *, views, dtype=jnp.float32):
    """Normalized with MEAN and STD, or of one channel not at all."""
    channels = images.shape[-1]
    mean, std = (MEAN, STD) if channels == 3 else ((0.0,), (1.0,))
    return augment(images, indices, key, views=views, mean=mean, std=std, dtype=dtype)


@pytest.fixture(name="key")
def fixture_key():
    return jax.random.key(7)


@pytest.fixture(name="batch", scope="module")
def fixture_batch():
    """(images, indices, augmented) of 16 samples with every operation in both views."""
    images, indices = images_of(16), np.arange(100, 116, dtype=np.int32)
    return images, indices, augmented(images, indices, jax.random.key(7), views=(FULL, FULL))


# What a sample's augmentation depends on.


def test_the_position_in_the_batch_does_not_matter(batch, key):
    images, indices, expected = batch
    order = np.random.default_rng(1).permutation(16)
    got = augmented(images[order], indices[order], key, views=(FULL, FULL))
    np.testing.assert_array_equal(got, expected[order])


def test_the_number_of_devices_does_not_matter_and_none_communicate(batch, key):
    images, indices, expected = batch
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    arguments = (*jax.device_put((images, indices), sharding), key)
    program = augmented.lower(*arguments, views=(FULL, FULL)).compile()
    text = program.as_text()
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [kind for kind in kinds if kind in text]
    got = program(*arguments)
    assert got.sharding.is_equivalent_to(sharding, got.ndim)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_jit_gives_the_same_as_eager_execution(key):
    images, indices = jnp.asarray(images_of(2, views=1)), jnp.arange(2)
    view = ViewAugmentation(jitter_probability=1.0, brightness=0.4, flip_probability=0.5)
    got = augment(images, indices, key, views=(view,), mean=MEAN, std=STD)
    expected = augmented(images, indices, key, views=(view,))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_key_the_index_and_the_view_each_change_the_result(batch, key):
    images, indices, expected = batch
    same = np.repeat(images[:, :1], 2, axis=1)
    views = augmented(same, indices, key, views=(FULL, FULL))
    others = (
        (views[:, 0], views[:, 1]),
        (expected, augmented(images, indices + 16, key, views=(FULL, FULL))),
        (expected, augmented(images, indices, jax.random.key(8), views=(FULL, FULL))),
    )
    for left, right in others:
        differs = np.abs(np.asarray(left - right)).reshape(16, -1).max(axis=1) > 0.1
        assert differs.mean() > 0.9


def test_the_batch_size_and_the_other_view_do_not_matter(batch, key):
    """A view without operations is exactly as it was, beside one that has them all."""
    images, indices, expected = batch
    images, indices = images[5:8], indices[5:8].astype(np.uint32)
    got = augmented(images, indices, key, views=(FULL, NOTHING))
    plain = quick_jit(functools.partial(normalize, mean=MEAN, std=STD))(images)
    np.testing.assert_allclose(got[:, 0], expected[5:8, 0], atol=2e-5)
    np.testing.assert_allclose(got[:, 1], plain[:, 1], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        ("affine_probability", "rotation_degrees", "translation", "scale", "shear_degrees"),
        ("flip_probability",),
        ("jitter_probability", "brightness", "contrast", "saturation", "hue"),
        ("grayscale_probability",),
        ("blur_probability", "blur_sigma"),
        ("solarize_probability",),
        ("noise_probability", "noise_std"),
    ],
    ids=lambda fields: fields[0].removesuffix("_probability"),
)
def test_an_operation_that_is_not_drawn_leaves_a_view_exactly_as_it_was(key, fields, dtype):
    """Half of the views are drawn; the others are those that are normalized only."""
    options = {name: getattr(FULL, name) for name in fields} | {fields[0]: 0.5}
    if "blur_sigma" in options:
        options["blur_sigma"] = (1.0, 2.0)  # less is hardly a blur
    images, indices = images_of(24, side=12), np.arange(24)
    got = augmented(images, indices, key, views=(ViewAugmentation(**options), NOTHING), dtype=dtype)
    plain = quick_jit(functools.partial(normalize, mean=MEAN, std=STD, dtype=dtype))(images)
    same = np.all(np.asarray(got == plain), axis=(2, 3, 4))
    assert same[:, 1].all()
    assert 4 < same[:, 0].sum() < 20
    difference = np.abs(np.asarray(got - plain, np.float32)).max(axis=(2, 3, 4))
    assert difference[~same].min() > 0.01  # as drawn, and not by rounding


# What is drawn.


def flags_and_changes(view, count, image, key):
    """Augments `count` copies of one image of one view; [count, height, width, channels]."""
    image = np.asarray(image, np.uint8)
    images = np.broadcast_to(image, (count, 1, *image.shape))
    got = np.asarray(augmented(images, np.arange(count), key, views=(view,)))[:, 0]
    return got * STD + MEAN if image.shape[-1] == 3 else got


def assert_rate(happened, probability):
    """Within four standard deviations of a binomial rate."""
    spread = np.sqrt(probability * (1 - probability) / happened.size)
    assert abs(happened.mean() - probability) < 4 * spread


COLORED = np.full((2, 2, 3), [200, 120, 40])


@pytest.mark.parametrize(
    ("options", "image", "happened"),
    [
        ({"flip_probability": 0.3}, [[[0], [255]]], lambda x: x[:, 0, 0, 0] > 0.5),
        (
            {"grayscale_probability": 0.3},
            COLORED,
            lambda x: np.ptp(x, axis=-1)[:, 0, 0] < 1e-3,
        ),
        ({"solarize_probability": 0.3}, [[[200]]], lambda x: x[:, 0, 0, 0] < 0.5),
        (
            {"blur_probability": 0.3, "blur_sigma": (1.0, 2.0)},
            [[[0], [255]], [[255], [0]]],
            lambda x: x[:, 0, 0, 0] > 0.01,
        ),
        (
            {"noise_probability": 0.3, "noise_std": 0.1},
            [[[128]]],
            lambda x: np.abs(x[:, 0, 0, 0] - 128 / 255) > 1e-5,
        ),
        (
            {"affine_probability": 0.3, "scale": (0.5, 0.6)},
            np.full((8, 8, 1), 255),
            lambda x: x[:, 0, 0, 0] < 0.5,
        ),
        (
            {"jitter_probability": 0.3, "brightness": 0.4},
            [[[100]]],
            lambda x: np.abs(x[:, 0, 0, 0] - 100 / 255) > 1e-5,
        ),
    ],
    ids=["flip", "grayscale", "solarize", "blur", "noise", "affine", "jitter"],
)
def test_operations_are_drawn_with_their_probabilities(options, image, happened, key):
    assert_rate(happened(flags_and_changes(ViewAugmentation(**options), 4000, image, key)), 0.3)


def assert_uniform(values, low, high):
    assert low - 1e-3 <= values.min()
    assert values.max() <= high + 1e-3
    assert scipy.stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


TWO_GRAYS = np.array([[[100], [140]]])


@pytest.mark.parametrize(
    ("options", "image", "measure", "low", "high"),
    [
        ({"brightness": 0.4}, [[[100]]], lambda x: x[:, 0, 0, 0] / (100 / 255), 0.6, 1.4),
        ({"brightness": 1.3}, [[[90]]], lambda x: x[:, 0, 0, 0] / (90 / 255), 0.0, 2.3),
        (
            {"contrast": 0.4},
            TWO_GRAYS,
            lambda x: (x[:, 0, 1, 0] - x[:, 0, 0, 0]) / (40 / 255),
            0.6,
            1.4,
        ),
        (
            {"saturation": 0.2},
            np.full((1, 1, 3), [150, 120, 90]),
            lambda x: (x[:, 0, 0, 0] - x[:, 0, 0, 2]) / (60 / 255),
            0.8,
            1.2,
        ),
        # From red, a turn by h < 1/6 raises green by 6 h, and one by -h raises blue.
        (
            {"hue": 0.1},
            np.full((1, 1, 3), [255, 0, 0]),
            lambda x: (x[:, 0, 0, 1] - x[:, 0, 0, 2]) / 6,
            -0.1,
            0.1,
        ),
    ],
    ids=["brightness", "brightness_above_1", "contrast", "saturation", "hue"],
)
def test_jitter_strengths_are_uniform(options, image, measure, low, high, key):
    view = ViewAugmentation(jitter_probability=1.0, **options)
    assert_uniform(measure(flags_and_changes(view, 2000, image, key)), low, high)


def centroids(images):
    """[count, 2] (x, y) of the mass of [count, side, side, 1], from the center."""
    side = images.shape[1]
    axis = np.arange(side) - (side - 1) / 2
    mass = images[..., 0]
    total = mass.sum(axis=(1, 2))
    x, y = np.einsum("nij,j->n", mass, axis), np.einsum("nij,i->n", mass, axis)
    return np.stack([x, y], axis=-1) / total[:, None]


def blob(row, column):
    """A Gaussian spot, wide enough for its centroid to survive resampling."""
    rows, columns = np.mgrid[:49, :49]
    distance = (rows - row) ** 2 + (columns - column) ** 2
    return np.rint(255 * np.exp(-distance / 18))[..., None]


def test_affine_strengths_are_uniform(key):
    # Of 49 pixels the center is number 24; a spot 8 beside it shows rotation, scale and shear.
    cases = (
        ({"translation": 0.2}, (24, 24), lambda c: c[:, 0] / 49, -0.2, 0.2),
        ({"translation": 0.2}, (24, 24), lambda c: c[:, 1] / 49, -0.2, 0.2),
        (
            {"rotation_degrees": 30.0},
            (24, 32),
            lambda c: np.degrees(np.arctan2(c[:, 1], c[:, 0])) / 30,
            -1,
            1,
        ),
        ({"scale": (0.8, 1.2)}, (24, 32), lambda c: c[:, 0] / 8, 0.8, 1.2),
        # Torchvision's shear moves what is below the center to the left.
        (
            {"shear_degrees": 20.0},
            (32, 24),
            lambda c: np.degrees(np.arctan(-c[:, 0] / 8)) / 20,
            -1,
            1,
        ),
    )
    views = tuple(ViewAugmentation(affine_probability=1.0, **case[0]) for case in cases)
    spots = np.stack([blob(*case[1]) for case in cases]).astype(np.uint8)
    images = np.broadcast_to(spots, (1000, *spots.shape))
    got = np.asarray(augmented(images, np.arange(1000), key, views=views))
    for v, (*_, measure, low, high) in enumerate(cases):
        values = measure(centroids(got[:, v]))
        spread = 0.02 * (high - low)  # what resampling and whole gray levels may move a centroid
        assert low - spread <= values.min() <= low + 2 * spread
        assert high - 2 * spread <= values.max() <= high + spread
        assert scipy.stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def test_blur_sigma_is_uniform_in_each_view_s_range(key):
    ranges = ((0.5, 1.5), (0.8, 1.0))
    views = tuple(ViewAugmentation(blur_probability=1.0, blur_sigma=sigma) for sigma in ranges)
    images = np.zeros((1000, 2, 60, 60, 1), np.uint8)
    images[:, :, 30, 30] = 255
    got = np.asarray(augmented(images, np.arange(1000), key, views=views))[:, :, 30, :, 0]
    for v, sigma in enumerate(ranges):
        # Of a Gaussian, the ratio of the center to its neighbor is exp(1 / (2 sigma²)).
        assert_uniform(np.sqrt(0.5 / np.log(got[:, v, 30] / got[:, v, 31])), *sigma)


def test_noise_is_gaussian_and_independent(key):
    view = ViewAugmentation(noise_probability=1.0, noise_std=0.1)
    noise = flags_and_changes(view, 20, np.full((16, 16, 3), 128), key) - 128 / 255
    assert scipy.stats.kstest(noise.ravel() / 0.1, "norm").pvalue > 1e-3
    channels = np.corrcoef(noise.reshape(-1, 3).T)
    samples = np.corrcoef(noise.reshape(20, -1))
    for correlation, limit in ((channels, 0.07), (samples, 0.18)):
        assert np.abs(correlation - np.eye(len(correlation))).max() < limit


def test_values_stay_in_range(key):
    images = images_of(16, channels=1)
    strong = ViewAugmentation(
        jitter_probability=1.0, brightness=2.0, contrast=2.0, noise_probability=1.0, noise_std=0.5
    )
    got = np.asarray(augmented(images, np.arange(16), key, views=(strong, strong)))
    assert got.min() == 0.0
    assert got.max() == 1.0


def test_order_is_flip_grayscale_blur_solarize(key):
    view = ViewAugmentation(
        flip_probability=1.0,
        grayscale_probability=1.0,
        blur_probability=1.0,
        blur_sigma=(1.5, 1.5),
        solarize_probability=1.0,
    )
    images = images_of(3, views=1)
    got = np.asarray(augmented(images, np.arange(3), key, views=(view,))) * STD + MEAN
    for n, image in enumerate(images[:, 0, :, ::-1] / 255):
        gray = image @ np.array([0.299, 0.587, 0.114])
        blurred = cv2.GaussianBlur(gray, (3, 3), 1.5, borderType=cv2.BORDER_REFLECT_101)
        expected = np.where(blurred >= 0.5, 1 - blurred, blurred)
        np.testing.assert_allclose(got[n, 0], np.stack([expected] * 3, axis=-1), atol=1e-5)


# What is left out.


def test_no_augmentation_is_the_identity_and_compiles_to_nothing(key):
    images = images_of(4)
    # Probabilities without strengths, and strengths without probabilities.
    idle = ViewAugmentation(
        jitter_probability=1.0, affine_probability=1.0, noise_probability=1.0, hue=0.0
    )
    views = (NOTHING, idle)
    got = np.asarray(augmented(images, np.arange(4), key, views=views))
    plain = quick_jit(functools.partial(normalize, mean=MEAN, std=STD))(images)
    np.testing.assert_array_equal(got, plain)
    np.testing.assert_array_equal(np.rint((got * STD + MEAN) * 255), images)
    text = augmented.lower(images, np.arange(4), key, views=views).compile().as_text()
    assert not [word for word in ("xor", "gather", " dot(", "reverse", "clamp") if word in text]


def test_normalization_matches_numpy():
    images = images_of(4)
    got = quick_jit(functools.partial(normalize, mean=MEAN, std=STD))(images)
    np.testing.assert_allclose(got, (images / 255 - MEAN) / STD, atol=1e-6)
    half = normalize(jnp.asarray(images), mean=MEAN, std=STD, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, got.astype(jnp.bfloat16))


def test_one_channel_goes_through_every_operation(key):
    """Gray pictures in three channels stay gray, and are what one channel gives."""
    images, indices = images_of(16, channels=1), np.arange(16, dtype=np.int32)
    one = np.asarray(augmented(images, indices, key, views=(QUIET, QUIET)))
    assert one.shape == images.shape
    assert np.abs(one - images / 255).max() > 0.1
    three = augmented(np.repeat(images, 3, axis=-1), indices, key, views=(QUIET, QUIET))
    for channel in range(3):
        plane = three[..., channel] * STD[channel] + MEAN[channel]
        np.testing.assert_allclose(plane, one[..., 0], atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"grayscale_probability": 1.0},
        {"solarize_probability": 1.0},
        {"jitter_probability": 1.0, "brightness": 0.4, "contrast": 0.4, "hue": 0.1},
    ],
)
def test_four_channels_have_no_colors_to_change(key, options):
    images, indices = images_of(4, channels=4), np.arange(4, dtype=np.int32)
    statistics = {"mean": (0.5,) * 4, "std": (0.2,) * 4}
    plain, changed = (
        augment(images, indices, key, views=(view, view), dtype=jnp.float32, **statistics)
        for view in (ViewAugmentation(), ViewAugmentation(**options))
    )
    np.testing.assert_array_equal(changed, plain)


def test_float_images_are_inverted_at_half_of_one(key):
    """Their values before the standardization are taken as they are."""
    images = np.random.default_rng(0).uniform(0, 1, (4, 2, 8, 8, 3)).astype(np.float32)
    view = ViewAugmentation(solarize_probability=1.0)
    got = augment(
        images, np.arange(4), key, views=(view, view), mean=MEAN, std=STD, dtype=jnp.float32
    )
    expected = np.where(images >= 0.5, 1 - images, images)
    got = np.asarray(got)
    np.testing.assert_allclose(got * np.array(STD) + np.array(MEAN), expected, atol=1e-5)


def test_bfloat16_is_float32_but_for_rounding(key):
    images, indices = images_of(16), np.arange(16, dtype=np.int32)
    exact = augmented(images, indices, key, views=(QUIET, QUIET))
    half = augmented(images, indices, key, views=(QUIET, QUIET), dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert half.shape == exact.shape
    error = np.abs(np.asarray(half.astype(jnp.float32) - exact)) * np.asarray(STD) * 255
    assert error.max() < 3.0
    assert error.mean() < 0.5


def test_the_number_of_each_draw_is_fixed():
    """Two draws of one number would depend on each other."""
    names = "AFFINE ROTATION TRANSLATION_X TRANSLATION_Y SCALE SHEAR FLIP JITTER BRIGHTNESS"
    names += " CONTRAST SATURATION HUE GRAYSCALE BLUR BLUR_SIGMA SOLARIZE NOISE"
    assert {n: int(d) for n, d in _Draw.__members__.items()} == {
        name: i for i, name in enumerate(names.split())
    }


def test_shifts_are_fractions_of_each_side(key):
    view = ViewAugmentation(affine_probability=1.0, translation=0.25)
    random = _Randomness(key, jnp.arange(500), (view,), 0)
    shifts = np.abs(_draw_affine(random, 12, 80))[:, 0, :, 2]  # along x and y
    assert np.all(shifts <= [20, 3])
    assert np.all(shifts.max(axis=0) > [19, 2.85])


def test_nothing_is_drawn_by_default():
    view = ViewAugmentation()
    names = ("affine", "flip", "jitter", "grayscale", "blur", "solarize", "noise")
    assert {getattr(view, f"{name}_probability") for name in names} == {0.0}


def test_mismatched_arguments_are_errors():
    images, indices = jnp.zeros((4, 2, 8, 8, 3), jnp.uint8), jnp.arange(4)
    key = jax.random.key(7)
    run = functools.partial(augment, views=(NOTHING, NOTHING), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match="expected uint8, uint16 or float32 images, got int16"):
        run(images.astype(jnp.int16), indices, key)
    for other in (images[:, 0], images[None]):
        with pytest.raises(ValueError, match="expected images of shape"):
            run(other, indices, key)
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"of each of 2 views, got {count}"):
            run(images, indices, key, views=(NOTHING,) * count)
    with pytest.raises(ValueError, match="expected integer sample_indices of shape"):
        run(images, indices[:3], key)
    for other in (jax.random.PRNGKey(0), jax.random.split(key, 2)):
        with pytest.raises(ValueError, match="expected one typed key"):
            run(images, indices, other)
    with pytest.raises(ValueError, match="expected mean to hold one number for each of 3 channels"):
        run(images, indices, key, mean=(0.5,))
    with pytest.raises(ValueError, match="expected uint8, uint16 or float32 images, got int16"):
        normalize(images.astype(jnp.int16), mean=(0.5,) * 3, std=(0.5,) * 3)
