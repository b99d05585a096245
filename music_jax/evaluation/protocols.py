"""Defines the evaluation protocols by name, and runs them: on a checkpoint, and after training."""

import dataclasses
import difflib
import functools
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import config_dict

from music_jax.config import normalize_path
from music_jax.data import datasets
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import from_main_process, is_main_process
from music_jax.errors import DivergedError, NotMeasurableError, UserError
from music_jax.evaluation import feature_protocols, finetune
from music_jax.evaluation.feature_protocols import knn, linear
from music_jax.evaluation.results import (
    Result,
    main_score,
    read_result,
    result_path,
    results_table,
)
from music_jax.evaluation.run import Run, Split, agreed_fingerprint
from music_jax.workdir.files import write_json
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

_Errors = dict[str, NotMeasurableError | DivergedError]


class Protocol(NamedTuple):
    """An evaluation protocol.

    Attributes:
      measure: Function from the run to the result; None for `transfer`, which runs others.
      settings: Fields and groups of the config that it depends on, by dotted name.
      labels: Splits whose labels it needs; images without a label are excluded and counted.
      segments: Whether it needs the segments of the MUSIC objective.
      multi_label: Whether it supports images of several classes.
    """

    measure: Callable[[Run], Result] | None
    settings: tuple[str, ...] = ()
    labels: tuple[Split, ...] = ("train", "test")
    segments: bool = False
    multi_label: bool = False


PROTOCOLS = {
    "linear": Protocol(
        functools.partial(linear, save_predictions=True), ("linear_eval",), multi_label=True
    ),
    "knn": Protocol(
        knn, ("knn", "linear_eval.raw_pixels", "linear_eval.random_init"), multi_label=True
    ),
    "fewshot": Protocol(feature_protocols.fewshot, ("few_shot",)),
    "retrieval": Protocol(feature_protocols.retrieval),
    "clustering": Protocol(feature_protocols.clustering, labels=("test",), segments=True),
    "label_free": Protocol(feature_protocols.label_free, labels=()),
    "segments": Protocol(feature_protocols.segments, labels=(), segments=True),
    "semi": Protocol(finetune.semi_supervised, ("semi_supervised",)),
    "finetune": Protocol(finetune.full_finetune, ("finetune",), multi_label=True),
    "transfer": Protocol(None, ("linear_eval", "knn"), labels=()),
}


def run_protocols(
    run: Run, names: Sequence[str], *, transfer_sets: Sequence[str] = (), force: bool = False
) -> dict[str, Result]:
    """Evaluates a run with some protocols, and writes the result of each into its workdir.

    Protocols that cannot measure the run, because it has no labels, no segments or too few images,
    are skipped, and a warning names them.

    Args:
      run: Run.
      names: Names of protocols.
      transfer_sets: Datasets for `transfer`; see `music_jax.data.datasets.parse_pair`.
      force: Whether to recompute existing results of the same weights, images and settings.

    Returns:
      The results, by protocol.

    Raises:
      DivergedError: A probe diverged; the other protocols have been run.
      UserError: A protocol is unknown, or none of those named can measure the run.
    """
    check_protocols(names, transfer_sets)
    results: dict[str, Result] = {}
    reasons: dict[str, list[str]] = {}  # protocols that cannot measure the run, by reason
    diverged = None
    for name in dict.fromkeys(names):
        try:
            results[name] = _run_protocol(run, name, transfer_sets, force)
        except NotMeasurableError as error:
            reasons.setdefault(str(error), []).append(name)
        except DivergedError as error:
            diverged = diverged or error
    not_measured = "; ".join(f"{', '.join(those)}: {reason}" for reason, those in reasons.items())
    if not (results or diverged):
        raise UserError(f"nothing can be measured: {not_measured}")
    if not_measured:
        _logger.warning(f"not measured: {not_measured}")
    if diverged:
        raise diverged
    return results


def _run_protocol(run: Run, name: str, transfer_sets: Sequence[str], force: bool) -> Result:
    protocol, objective = PROTOCOLS[name], run.config.objective.name
    if protocol.segments and objective != "music":
        raise NotMeasurableError(f"the objective {objective} has no segments")
    if protocol.labels and not protocol.multi_label and run.multi_label:
        raise NotMeasurableError(
            f"the images of {run.evaluation_sources().train.name} may have several classes each"
        )
    about = provenance(name, run.config, run.step)
    if protocol.measure is None:
        runs, errors = _transfer_runs(run, transfer_sets)
        sources = [source for there in runs.values() for source in there.evaluation_sources()]
        measure = functools.partial(_transfer, runs, errors)
        about["data"] = {"sets": list(transfer_sets)}
    else:
        sources = list(run.evaluation_sources()) if protocol.labels else [run.images]
        measure = functools.partial(protocol.measure, run)
        if not protocol.labels:
            about["data"] = {"images": run.images.name}
    about["images_fingerprint"] = [agreed_fingerprint(source) for source in sources]
    about |= {"weights": run.weights_checksum, "compute_dtype": run.config.compute_dtype}
    path = result_path(run.workdir, name)
    result = None if force else from_main_process(lambda: read_result(run.workdir, name))
    if result is not None and about.items() <= result.items():
        _logger.info(f"{name}: using the existing result in {path}")
    else:
        result = measure() | run.count_unlabeled(protocol.labels) | about
        if is_main_process():
            write_json(path, result)
    _log_excluded(name, result)
    return result


def _log_excluded(name: str, result: Result) -> None:
    if counts := result.get("without_label"):
        images = " and ".join(f"{n:,} {split} images" for split, n in counts.items() if n)
        _logger.info(f"{name}: {images} without a label were excluded")
    for spec, reason in result.get("not_measured", {}).items():
        _logger.warning(f"{name} to {spec} was not measured: {reason}")


def _transfer_runs(run: Run, transfer_sets: Sequence[str]) -> tuple[dict[str, Run], _Errors]:
    """Returns the run with the images of each dataset, or the reason why these cannot be used."""
    runs: dict[str, Run] = {}
    errors: _Errors = {}
    for spec in transfer_sets:
        config = config_dict.ConfigDict(run.config.to_dict())
        config.evaluation.train, config.evaluation.test = _parse_transfer_set(spec)
        datasets.prepare(config, ("evaluation.train", "evaluation.test"))
        try:
            sources = datasets.evaluation_sources(config)
        except NotMeasurableError as error:
            errors[spec] = error
            continue
        runs[spec] = dataclasses.replace(run, config=config, sources=sources, images=sources.test)
    return runs, errors


def _transfer(runs: dict[str, Run], errors: _Errors) -> Result:
    """Runs the linear probe and kNN on each dataset; those that cannot be measured are skipped."""
    results = {}
    for spec, run in runs.items():
        _logger.info(f"transfer to {spec}")
        there = dataclasses.replace(run)  # a copy, whose features are freed before the next
        try:
            found = {"linear": linear(there), "knn": knn(there)}
        except (NotMeasurableError, DivergedError) as error:
            errors[spec] = error
            continue
        unlabeled = there.count_unlabeled(("train", "test"))
        results[spec] = {name: result | unlabeled for name, result in found.items()}
        _log_excluded(f"transfer to {spec}", unlabeled)
    reasons = {spec: str(error) for spec, error in errors.items()}
    if not results:
        diverged = any(isinstance(error, DivergedError) for error in errors.values())
        message = "; ".join(f"transfer to {spec}: {reason}" for spec, reason in reasons.items())
        raise (DivergedError if diverged else NotMeasurableError)(message)
    return {"by_dataset": results} | ({"not_measured": reasons} if reasons else {})


def check_protocols(names: Sequence[str], transfer_sets: Sequence[str] = ()) -> None:
    """Checks the names of protocols and of the datasets for `transfer`.

    Raises:
      UserError: There are none, a name is unknown, or `transfer` has no dataset.
    """
    for name in names:
        if name not in PROTOCOLS:
            nearest = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)
            raise UserError(
                f"unknown protocol {name!r}; did you mean {nearest[0]!r}? The protocols are "
                f"{', '.join(PROTOCOLS)}"
            )
    if not names:
        raise UserError(f"no protocols are named; name some of {', '.join(PROTOCOLS)}")
    if "transfer" in names and not transfer_sets:
        raise UserError(
            "the protocol transfer needs a dataset: --transfer=NAME:TRAIN:TEST, such as "
            "cifar10:train:test, or --transfer=FOLDER:FOLDER"
        )
    for spec in transfer_sets:
        _parse_transfer_set(spec)


def _parse_transfer_set(spec: str) -> tuple[str, str]:
    pair = datasets.parse_pair(spec)
    if pair is None:
        raise UserError(
            f"--transfer={spec}: expected NAME:TRAIN:TEST with the splits of a TFDS dataset, such "
            "as cifar10:train:test, or two sets with a colon between, each an existing folder or "
            "NAME:SPLIT"
        )
    return pair


def provenance(name: str, config: config_dict.ConfigDict, step: int) -> Result:
    """Returns the inputs of a protocol's result: data, hyperparameters, step and seed."""
    everything = as_json(config)
    dataset, evaluation = config.dataset, everything["evaluation"]
    own = normalize_path(dataset.path) or f"{dataset.name}:{dataset.train_split}"
    train = normalize_path(evaluation.pop("train")) or own
    test = normalize_path(evaluation.pop("test")) or (
        f"{dataset.name}:{dataset.test_split}" if dataset.test_split and not dataset.path else None
    )
    hyperparameters = {
        part: functools.reduce(operator.getitem, part.split("."), everything)
        for part in PROTOCOLS[name].settings
    }
    return {
        "protocol": name,
        "data": {"train": train, "test": test}
        if PROTOCOLS[name].labels
        else {"images": test or own},
        "hyper_parameters": hyperparameters | {"evaluation": evaluation},
        "step": step,
        "seed": config.seed,
    }


def final_protocols(config: config_dict.ConfigDict) -> list[str]:
    """Returns the protocols that are run at the end of training."""
    return ["linear", "knn"] if config.knn.enabled else ["linear"]


def read_final_results(
    config: config_dict.ConfigDict,
    workdir: epath.Path,
    step: int,
    fingerprints: Sequence[str],
) -> dict[str, Result] | None:
    """Reads the results of the final protocols; None if one is missing or has other provenance.

    Args:
      config: Config of the run.
      workdir: Workdir of the run.
      step: Last step of the training.
      fingerprints: Fingerprints of the images that the results must belong to.
    """
    images = {"images_fingerprint": list(fingerprints)}
    results = {}
    for name in final_protocols(config):
        result, expected = read_result(workdir, name), provenance(name, config, step) | images
        if result is None or not expected.items() <= result.items():
            return None
        results[name] = result
    return results


class FinalEvaluation:
    """The linear probe and kNN at the end of a training, if there are labeled images.

    Attributes:
      sources: Labeled images to learn from and to test on, or None.
    """

    def __init__(self, config: config_dict.ConfigDict, workdir: epath.Path, source: Source):
        """Opens the labeled images; all processes call this together.

        Args:
          config: The run's config.
          workdir: Workdir of the run.
          source: The training images.

        Raises:
          UserError: Images that `config.evaluation` names cannot be used, or only some of the
            processes find images.
        """
        self._config, self._workdir = config, workdir
        self.sources: datasets.EvaluationSources | None = None
        self._why_not = ""
        try:
            self.sources = datasets.evaluation_sources(config, source)
        except NotMeasurableError as error:
            if config.evaluation.train or config.evaluation.test:
                raise
            self._why_not = str(error)
            _logger.info(f"the backbone will not be probed: {error}")
        if from_main_process(lambda: self.sources is None) != (self.sources is None):
            raise UserError(
                "the processes do not find the same images to evaluate with; this one: "
                f"{self._why_not or 'there are some'}"
            )

    def is_done(self, step: int) -> bool:
        """Returns whether there is nothing to evaluate at a step; logs the results if so."""
        results: dict[str, Result] | None = {}
        if self.sources is not None:
            fingerprints = [agreed_fingerprint(source) for source in self.sources]
            results = from_main_process(
                lambda: read_final_results(self._config, self._workdir, step, fingerprints)
            )
        if results is None:
            return False
        done = "trained and evaluated" if results else "trained"
        _logger.info(f"{self._workdir} is done: {step} steps {done}")
        if results:
            progress.log_lines(_logger, results_table(results))
        return True

    def run(self, **fields: Any) -> dict[str, float]:
        """Evaluates a network, writes the results into the workdir and logs them.

        Args:
          **fields: `network`, `params`, `batch_stats`, `step`, `mesh` and `skipped`; see `Run`.

        Returns:
          The top-1 accuracies, or the mean average precisions, by name.
        """
        if self.sources is None:
            _logger.info(f"not probed: {self._why_not}")
            return {}
        run = Run(
            config=self._config,
            workdir=self._workdir,
            sources=self.sources,
            images=self.sources.test,
            **fields,
        )
        results = run_protocols(run, final_protocols(self._config), force=True)
        progress.log_lines(_logger, results_table(results))
        scores = {name: main_score(result) for name, result in results.items()}
        return {f"{name}_{metric}": value for name, (metric, value) in scores.items()}
