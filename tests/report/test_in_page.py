"""Which networks a report can apply to images, and what it holds of them."""

import types

import numpy as np
import pytest
from small_runs import save_run, small_config

import music_jax
from music_jax.evaluation.results import Classifier
from music_jax.report.in_page import network_data


def _sample(images, features=1024):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(images, features)).astype(np.float32)
    return types.SimpleNamespace(features=values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    save_run(path, small_config())
    return music_jax.load(str(path)).trained


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"backbone.name": "vit_s16", "backbone.stem": None}, "the layers of the backbone vit_s16"),
        ({"dataset.num_channels": 4}, "4 channels of type uint8"),
        ({"dataset.pixel_type": "uint16"}, "1 channels of type uint16"),
    ],
)
def test_other_networks_have_a_reason(trained, fields, reason):
    config = trained.config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    run = types.SimpleNamespace(config=config)
    assert reason in network_data(run, _sample(20), None)


def test_a_network_that_is_too_large_has_a_reason(trained):
    reason = network_data(trained, _sample(20), None, max_bytes=400_000)
    assert reason == "the weights of the network take 0.4 MB, and the page has room for 0.4 MB"


def test_neighbors_are_searched_among_as_many_images_as_fit(trained):
    whole = network_data(trained, _sample(2000), None)
    images = whole["gallery"]["images"]
    assert (len(images), images[0], images[-1]) == (1000, 0, 1999)
    part = network_data(trained, _sample(2000), None, max_bytes=600_000)
    assert 16 <= len(part["gallery"]["images"]) < 1000


def test_a_classifier_belongs_to_the_step_and_the_features(trained):
    classifier = Classifier(np.ones((1024, 3), np.float32), np.ones(3, np.float32), trained.step)
    assert network_data(trained, _sample(20), classifier)["classifier"]
    for other in (
        classifier._replace(step=trained.step + 1),
        classifier._replace(kernel=np.ones((512, 3), np.float32)),
    ):
        assert network_data(trained, _sample(20), other)["classifier"] is None
