"""Transfer: the frozen backbone's features on another dataset."""

import dataclasses
from typing import Any

from ml_collections import config_dict

from music_jax import progress
from music_jax.data import datasets
from music_jax.errors import UserError
from music_jax.evaluation.feature_protocols import knn, linear
from music_jax.evaluation.run import Run
from music_jax.evaluation.tables import say_without_label


def transfer(run: Run, sets: tuple[str, ...]) -> dict[str, Any]:
    """The linear probe and kNN on each of some datasets, its images cut as the run's.

    Args:
      run: the run.
      sets: of each dataset, the images to learn from and to test on: `NAME:TRAIN:TEST` with the
        splits of TFDS, or `SET:SET`; see `datasets.parse_pair`.

    Returns:
      The figures of both protocols by dataset.

    Raises:
      NotMeasurableError: a dataset has too few labels.
      UserError: a dataset is not there or cannot be read.
    """
    found = {}
    runs = {spec: _at(run, spec) for spec in sets}  # one that cannot be opened fails at once
    for spec, there in runs.items():
        progress.say(f"transfer to {spec}")
        found[spec] = {"linear": linear(there), "knn": knn(there)}
        say_without_label(f"transfer to {spec}", found[spec]["linear"])
    return {"by_dataset": found}


def _at(run: Run, spec: str) -> Run:
    config = config_dict.ConfigDict(run.config.to_dict())
    config.evaluation.train, config.evaluation.test = parse_set(spec)
    datasets.prepare(config, ("evaluation.train", "evaluation.test"))
    sources = datasets.evaluation_sources(config)
    return dataclasses.replace(run, config=config, sources=sources, images=sources.test)


def parse_set(spec: str) -> tuple[str, str]:
    """The training and the test part of a dataset, as `config.evaluation` names them.

    Raises:
      UserError: it is none of what `transfer` takes.
    """
    pair = datasets.parse_pair(spec)
    if pair is None:
        raise UserError(
            f"--transfer={spec}: expected NAME:TRAIN:TEST with the splits of a TFDS dataset, such "
            "as cifar10:train:test, or two sets with a colon between, each a folder that is there "
            "or NAME:SPLIT"
        )
    return pair
