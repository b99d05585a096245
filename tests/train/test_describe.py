"""What a run is warned of before it trains."""

import pytest

from music_jax.config import default_config
from music_jax.data.loader import TrainingOrder
from music_jax.train.describe import small_data_warnings


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs", "log_every_steps", "expected"),
    [
        (12_800, 256, 100, 50, []),  # 50 steps an epoch
        (12_900, 256, 100, 50, []),  # 100 images are left out, 0.8 %
        (
            301,
            256,
            100,
            50,
            [
                "an epoch of 301 images has only 1 step with config.batch_size = 256",
                "each epoch omits 45 of 301 images (15%)",
                "metrics are logged once in 50.0 epochs; a smaller config.log_every_steps",
            ],
        ),
        (2304, 256, 100, 9, ["an epoch of 2304 images has only 9 steps with"]),
        (2560, 256, 100, 10, []),
        (2560, 256, 4, 41, ["the run has fewer steps than config.log_every_steps = 41"]),
        (2560, 256, 4, 40, ["metrics are logged once in 4.0 epochs"]),
        (1437, 128, 100, 11, ["each epoch omits 29 of 1437 images (2%)"]),
    ],
)
def test_what_small_data_makes_of_the_defaults(
    images, batch_size, epochs, log_every_steps, expected
):
    config = default_config()
    config.batch_size, config.num_epochs = batch_size, epochs
    config.log_every_steps = log_every_steps
    warnings = small_data_warnings(config, TrainingOrder(images, batch_size, 0))
    assert len(warnings) == len(expected)
    for warning, beginning in zip(warnings, expected, strict=True):
        assert warning.startswith(beginning)
