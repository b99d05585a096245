"""The online probe: its step against SGD by hand, and a training that does not depend on it."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from listed_records import list_source
from processes import DIGITS, SMALL, checkpoint, metrics, run

from music_jax.checkpoint.manager import Checkpoints
from music_jax.config import default_config
from music_jax.data.datasets import EvaluationSources
from music_jax.data.skipped import SkippedImages
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.train.online_probe import _init_probe, _probe_step, make_online_probe

_PROBE = ("--config.online_probe.enabled=True", "--config.online_probe.batch_size=100")
_SELDOM = (*_PROBE, "--config.log_every_steps=11")


def _logged(workdir):
    return {x["step"]: x["online_top1"] for x in metrics(workdir) if "online_top1" in x}


def test_a_step_is_sgd_with_momentum_on_standardized_features():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, size=(3, 50, 8)).astype(np.float32)
    labels = jnp.asarray(rng.integers(4, size=(3, 50)), jnp.int32)
    settings = default_config().online_probe
    settings.update({"learning_rate": 0.5, "momentum": 0.9, "weight_decay": 0.1})
    step = jax.jit(lambda *arguments: _probe_step(*arguments, settings))
    probe = _init_probe(8, 4, settings)
    mean, variance = np.zeros(8), np.ones(8)
    head = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
    velocity = dict(head)
    correct = 0
    for x, y in zip(features, labels, strict=True):
        probe = step(probe, x, y)
        mean = 0.9 * mean + 0.1 * np.mean(x, axis=0)
        variance = 0.9 * variance + 0.1 * np.var(x, axis=0)
        z = jnp.asarray((x - mean) / np.sqrt(variance + 1e-6), jnp.float32)

        def loss(head, z=z, y=y):
            logits = z @ head["kernel"] + head["bias"][None]
            return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))

        scores = np.asarray(z @ head["kernel"] + head["bias"][None])
        second, best = np.sort(scores, axis=1)[:, -2:].T
        # Before the first step all scores are equal, and none counts as correct.
        correct += int(np.sum((scores.argmax(axis=1) == y) & (best > second)))
        grads = jax.grad(loss)(head)
        grads["kernel"] += 0.1 * head["kernel"]
        velocity = {name: 0.9 * velocity[name] + grads[name] for name in head}
        head = {name: head[name] - 0.5 * velocity[name] for name in head}
    np.testing.assert_allclose(probe.head["kernel"], head["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probe.head["bias"], head["bias"], rtol=1e-4, atol=1e-5)
    assert (float(probe.correct), float(probe.seen)) == (correct, 150)


def _recipe(num_features=4):
    network = types.SimpleNamespace(num_features=num_features)
    return types.SimpleNamespace(network=network, mean=(0.5,), std=(0.5,), dtype=jnp.float32)


def _refuse(*given, **options):
    raise UserError("it has another shape")


def test_the_probe_is_restored_with_a_checkpoint_and_starts_from_scratch_without(tmp_path, capsys):
    probe = _probe_of(tmp_path, range(10))
    checkpoints = Checkpoints(epath.Path(tmp_path))
    probe.start(0, 100, checkpoints)
    state = {"a": jnp.zeros(2)}
    trained = jax.tree.map(lambda x: x + 1, probe.state)
    checkpoints.save(4, {}, state=state, online_probe=trained)
    checkpoints.save(6, {}, state=state)
    checkpoints.wait()
    assert capsys.readouterr().out == ""
    probe.start(4, 100, checkpoints)
    for found, expected in zip(*map(jax.tree.leaves, (probe.state, trained)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert capsys.readouterr().out == ""
    unfit = types.SimpleNamespace(has=lambda *_: True, restore=_refuse)
    for source in (checkpoints, unfit):  # step 6 is as an earlier version saves it
        probe.start(6, 100, source)
        assert float(probe.state.mean.sum()) == 0
        assert "the online probe starts from scratch" in capsys.readouterr().out
    checkpoints.close()


def _probe_of(tmp_path, labels, *, multi_label=False):
    config = default_config()
    config.online_probe.enabled = True
    records = [{"image": b"", "label": label} for label in labels]
    source = list_source("numbers", records, 10, multi_label=multi_label)
    return make_online_probe(
        config,
        EvaluationSources(source, source),
        _recipe(),
        make_data_mesh(1),
        SkippedImages(epath.Path(tmp_path), max_share=1.0),
    )


def test_images_without_a_label_are_ignored(tmp_path, capsys):
    probe = _probe_of(tmp_path, [3, -1, 5, -1, -1, 7])
    source = probe._input._source
    assert [source.record(i)["label"] for i in range(len(source))] == [3, 5, 7]
    assert "online probe: 3 images without a label are ignored" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"only 1 of the 3 images.*online_probe\.train="):
        _probe_of(tmp_path, [-1, -1, 4])


def test_the_probe_is_off_for_images_of_several_classes(tmp_path, capsys):
    assert _probe_of(tmp_path, [[0, 1], [1, -1]], multi_label=True) is None
    assert "the online probe is off: the images of numbers may have" in capsys.readouterr().out


def test_a_probe_that_diverged_is_no_longer_reported(tmp_path, capsys):
    probe = _probe_of(tmp_path, [0, 1])
    probe.start(0, 100, None)
    seen = probe.state._replace(correct=jnp.asarray(3.0), seen=jnp.asarray(4.0))
    probe.state = seen
    assert probe.metrics() == {"online_top1": 0.75}
    assert probe.metrics() == {}
    infinite = {
        "head": jax.tree.map(lambda x: x.at[0].set(jnp.inf), seen.head),
        "mean": seen.mean.at[0].set(jnp.inf),
    }
    for name, value in infinite.items():
        probe.start(0, 100, None)
        probe.state = seen._replace(**{name: value})
        assert probe.metrics() == probe.metrics() == {}
        assert capsys.readouterr().out.count("the online probe diverged") == 1


@pytest.mark.slow
def test_the_backbone_is_the_same_bit_for_bit_with_the_probe_and_without(tmp_path):
    """Also where other images are labeled, and in one run as in two, of which one goes on."""
    data = f"--config.dataset.data_dir={tmp_path / 'tfds'}"
    common = (DIGITS, *SMALL, data)
    runs = {
        "without": ((),),
        "with": (_PROBE,),
        "others": ((*_PROBE, "--config.online_probe.train=mnist5k:train[:500]"),),
        "seldom": (_SELDOM,),
    }
    for name, calls in runs.items():
        for more in calls:
            code, _, err = run("music_jax.main", *common, *more, f"--workdir={tmp_path / name}")
            assert code == 0, err
    expected = checkpoint(tmp_path / "without", 22)
    for name in ("with", "others"):
        found = checkpoint(tmp_path / name, 22)
        assert found.keys() == expected.keys()
        for array, value in expected.items():
            assert found[array].tobytes() == value.tobytes(), array
        logged = [line["online_top1"] for line in metrics(tmp_path / name)]
        assert len(logged) == 22
        assert np.mean(logged[-5:]) > max(0.2, np.mean(logged[:5]))
    assert "online_top1" not in metrics(tmp_path / "without")[-1]

    # As if they had been stopped after step 20. Another line is logged after they resume.
    for name, more in (("with", _PROBE), ("seldom", _SELDOM)):
        workdir = tmp_path / name
        shutil.rmtree(workdir / "checkpoints" / "22")
        (workdir / "linear_eval.json").unlink()
        before = _logged(workdir)
        code, _, err = run("music_jax.main", *common, *more, f"--workdir={workdir}")
        assert code == 0, err
        assert _logged(workdir) == before
    assert 21 in [line["step"] for line in metrics(tmp_path / "seldom")]
