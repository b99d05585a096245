"""What self-supervised features are compared with: pixels, gradients, random features, labels."""

import dataclasses

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax.claims.cells import Cell, Result
from music_jax.claims.probe import Probe, hog_features, logistic_probe, support_vector_machine
from music_jax.data import datasets
from music_jax.data.datasets import EvaluationSources, load_images
from music_jax.data.skipped import open_skipped
from music_jax.distributed.mesh import make_data_mesh
from music_jax.evaluation.features import Model, SplitFeatures
from music_jax.evaluation.finetune import logit_extractor, train_classifier
from music_jax.evaluation.run import Run
from music_jax.metrics.few_shot import few_shot
from music_jax.metrics.knn import knn_predict
from music_jax.models.network import INIT_COMPILER_OPTIONS, init_network, make_network

Arrays = dict[str, np.ndarray]

_SUPERVISED_RATE = 0.1


def samples(found: SplitFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and labels."""
    return found.features, found.labels


def probe_result(probe: Probe) -> Result:
    """Returns the part of a result that tells about a probe."""
    return {
        "validation_top1": probe.validation_top1,
        "penalty": probe.penalty,
        "converged": probe.converged,
    }


def with_test(run: Run, split: str) -> Run:
    """Returns the run with the images of another split to test with."""
    config = config_dict.ConfigDict(run.config.to_dict())
    config.dataset.test_split = split
    sources = datasets.evaluation_sources(config)
    return dataclasses.replace(run, config=config, sources=sources, images=sources.test)


def classify(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    run: Run,
) -> tuple[Result, Arrays]:
    """Measures features [samples, features] with labels [samples] by all classifiers."""
    probe = logistic_probe(train, validation, test[0])
    knn = knn_predict(
        *train,
        test[0],
        num_classes=run.num_classes,
        k=run.config.knn.k,
        temperature=run.config.knn.temperature,
    )
    shots = few_shot(
        *train,
        *test,
        shots=run.config.few_shot.shots[0],
        draws=run.config.few_shot.draws,
        seed=run.config.seed,
    )
    assert probe.predictions is not None
    result = probe_result(probe) | {
        "linear_top1": float(np.mean(probe.predictions == test[1])),
        "knn_top1": float(np.mean(knn == test[1])),
        "ten_shot_top1": float(np.mean(shots)),
    }
    return result, {"linear": probe.predictions, "knn": knn, "labels": test[1]}


def measure_reference(
    cell: Cell,
    config: config_dict.ConfigDict,
    workdir: epath.Path,
    test_split: str,
    validation: str,
) -> tuple[Result, Arrays]:
    """Measures a reference: pixels, gradients' histograms, random features, or labels."""
    config.dataset.test_split = validation
    datasets.prepare(config)
    run = _untrained(config, workdir)
    tested = with_test(run, test_split)
    if cell.reference == "hog_svm":
        train, held_out, test = (
            (hog_features(images), labels)
            for images, labels in (
                load_images(config, "train"),
                load_images(config),
                load_images(tested.config),
            )
        )
        probe = support_vector_machine(train, held_out, test[0])
        assert probe.predictions is not None
        top1 = float(np.mean(probe.predictions == test[1]))
        return probe_result(probe) | {"linear_top1": top1}, {
            "linear": probe.predictions,
            "labels": test[1],
        }
    if cell.reference == "supervised":
        return _supervised(run, tested)
    model: Model = "raw_pixels" if cell.reference == "raw_pixels" else "random_init"
    parts = run.train(model), run.test(model), tested.test(model)
    train, held_out, test = map(samples, parts)
    return classify(train, held_out, test, run)


def _untrained(config: config_dict.ConfigDict, workdir: epath.Path) -> Run:
    """Returns a run whose backbone has its initial weights."""
    init = jax.jit(lambda key: init_network(config, key), compiler_options=INIT_COMPILER_OPTIONS)
    params, batch_stats = init(jax.random.key(config.seed))
    sources: EvaluationSources = datasets.evaluation_sources(config)
    return Run(
        config=config,
        network=make_network(config),
        params=params,
        batch_stats=batch_stats,
        mesh=make_data_mesh(),
        skipped=open_skipped(workdir, config),
        workdir=workdir,
        sources=sources,
        images=sources.test,
        step=0,
    )


def _supervised(run: Run, tested: Run) -> tuple[Result, Arrays]:
    """Trains the backbone with the labels, for as many epochs and with as many images a step."""
    config, train = run.config, run.evaluation_sources().train
    batches = run.random_crop_batches(
        train,
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        description="training with labels",
    )
    classifier, batch_stats = train_classifier(
        run,
        batches,
        num_steps=config.num_epochs * (len(train) // config.batch_size),
        learning_rates=(_SUPERVISED_RATE,) * 2,
        momentum=0.9,
        weight_decay=5e-4,
    )
    extractor, found = logit_extractor(run, classifier, batch_stats), {}
    for name, source in (
        ("validation", run.evaluation_sources().test),
        ("test", tested.evaluation_sources().test),
    ):
        split = run.extract(extractor, source, f"{name}, with labels")
        found[name] = split.arrays["logits"].argmax(axis=1), split.labels
    (held_out, held_out_labels), (predicted, labels) = found["validation"], found["test"]
    result = {
        "validation_top1": float(np.mean(held_out == held_out_labels)),
        "linear_top1": float(np.mean(predicted == labels)),
    }
    return result, {"linear": predicted, "labels": labels}
