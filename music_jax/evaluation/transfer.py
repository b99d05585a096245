"""Transfer: the frozen backbone's features on another dataset."""

import dataclasses
import logging
from typing import Any

from ml_collections import config_dict

from music_jax.data import datasets
from music_jax.errors import UserError
from music_jax.evaluation.feature_protocols import knn, linear
from music_jax.evaluation.run import Run
from music_jax.evaluation.tables import say_without_label

_logger = logging.getLogger(__name__)


def transfer(runs: dict[str, Run]) -> dict[str, Any]:
    """Measures the linear probe and kNN on some datasets.

    Args:
      runs: What `on_dataset` returned, by dataset; emptied.

    Returns:
      The figures of both protocols by dataset.
    """
    found = {}
    for spec in list(runs):
        run = runs.pop(spec)  # so that the features of one dataset are held at a time
        _logger.info(f"transfer to {spec}")
        found[spec] = {"linear": linear(run), "knn": knn(run)}
        say_without_label(f"transfer to {spec}", found[spec]["linear"])
    return {"by_dataset": found}


def on_dataset(run: Run, spec: str) -> Run:
    """Returns a run with the images of another dataset, which are cut as its own.

    Args:
      run: The run.
      spec: `NAME:TRAIN:TEST` with the splits of TFDS, or `SET:SET`; see
        `datasets.parse_pair`.

    Raises:
      NotMeasurableError: the dataset has too few labels.
      UserError: it is not there or cannot be read.
    """
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
