"""Transfer: the frozen backbone's features on another dataset."""

import dataclasses
import os
from typing import Any

from ml_collections import config_dict

from music_jax import progress
from music_jax.data import datasets
from music_jax.errors import UserError
from music_jax.evaluation.feature_protocols import knn, linear
from music_jax.evaluation.run import Run


def transfer(runs: dict[str, Run]) -> dict[str, Any]:
    """Measures the linear probe and kNN on some datasets.

    Args:
      runs: What `on_dataset` returned, by dataset.

    Returns:
      The figures of both protocols by dataset.
    """
    found = {}
    for spec, run in runs.items():
        progress.say(f"transfer to {spec}")
        found[spec] = {"linear": linear(run), "knn": knn(run)}
    return {"by_dataset": found}


def on_dataset(run: Run, spec: str) -> Run:
    """Returns a run with the images of another dataset, which are cut as its own.

    Args:
      run: The run.
      spec: `NAME:TRAIN:TEST` with the splits of TFDS, or `FOLDER:FOLDER`.

    Raises:
      UserError: the dataset is not there, has no labels or cannot be read.
    """
    config = config_dict.ConfigDict(run.config.to_dict())
    config.evaluation.train, config.evaluation.test = parse_set(spec)
    datasets.prepare(config)
    sources = datasets.evaluation_sources(config, datasets.training_source(config))
    if sources is None:
        raise UserError(f"--transfer={spec}: there are no labelled images to test on")
    return dataclasses.replace(run, config=config, sources=sources, images=sources.test)


def parse_set(spec: str) -> tuple[str, str]:
    """The training and the test part of a dataset, as `config.evaluation` names them.

    Raises:
      UserError: it is neither `NAME:TRAIN:TEST` nor two folders.

    Example:
      >>> from music_jax.evaluation.transfer import parse_set
      >>> parse_set("cifar10:train[:90%]:test")
      ('cifar10:train[:90%]', 'cifar10:test')
    """
    parts = _split(spec)
    for i in range(1, len(parts)):
        pair = ":".join(parts[:i]), ":".join(parts[i:])
        if all(os.path.exists(os.path.expanduser(path)) for path in pair):
            return pair
    if len(parts) == 3 and all(parts):
        name, train, test = parts
        return f"{name}:{train}", f"{name}:{test}"
    raise UserError(
        f"--transfer={spec}: expected NAME:TRAIN:TEST with the splits of a TFDS dataset, such as "
        "cifar10:train:test, or FOLDER:FOLDER of images to learn from and to test on"
    )


def _split(spec: str) -> list[str]:
    """The parts between colons that are not in brackets, as in `train[:90%]`."""
    parts, depth = [""], 0
    for character in spec:
        depth += (character == "[") - (character == "]")
        if character == ":" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
