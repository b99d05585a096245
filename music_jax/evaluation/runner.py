"""The protocols by name, and what they leave in the workdir."""

import difflib
import functools
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.config.values import normalize_path
from music_jax.data.datasets import EvaluationSources
from music_jax.data.skipped import SkippedImages
from music_jax.distributed.mesh import from_main_process, is_main_process
from music_jax.errors import DivergedError, NotMeasurableError, UserError
from music_jax.evaluation import feature_protocols, image_protocols
from music_jax.evaluation.run import Run, agreed_fingerprint
from music_jax.evaluation.tables import results_table, say_without_label, summary_table
from music_jax.evaluation.transfer import on_dataset, transfer
from music_jax.models.network import Network
from music_jax.workdir.files import read_json, write_json
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

Figures = dict[str, Any]

_SHARES = ("top1", "top5", "random_init_top1", "raw_pixels_top1")

__all__ = ["PROTOCOLS", "evaluate", "measure", "read_results", "results_table"]


class Protocol(NamedTuple):
    """One way of evaluating a run.

    Attributes:
      measure: from the run to its figures, as JSON holds them.
      parts: of the config that say how, by dotted name.
      labels: whether it needs labeled images.
      segments: whether it needs the segments of the MUSIC objective.
      file: of the workdir, that the figures are written to; by default the protocol's own name.
    """

    measure: Callable[..., Figures]
    parts: tuple[str, ...] = ()
    labels: bool = True
    segments: bool = False
    file: str | None = None


PROTOCOLS = {
    "linear": Protocol(feature_protocols.linear_kept, ("linear_eval",), file="linear_eval.json"),
    "knn": Protocol(
        feature_protocols.knn, ("knn", "linear_eval.raw_pixels", "linear_eval.random_init")
    ),
    "fewshot": Protocol(feature_protocols.fewshot, ("few_shot",)),
    "retrieval": Protocol(feature_protocols.retrieval, ("retrieval",)),
    "clustering": Protocol(feature_protocols.clustering, ("clustering",), segments=True),
    "label_free": Protocol(feature_protocols.label_free, labels=False),
    "segments": Protocol(feature_protocols.segments, labels=False, segments=True),
    "semi": Protocol(image_protocols.semi_supervised, ("semi_supervised",)),
    "finetune": Protocol(image_protocols.full_finetune, ("finetune",)),
    "transfer": Protocol(transfer, ("linear_eval", "knn"), labels=False),
}


def evaluate(
    config: config_dict.ConfigDict,
    workdir: epath.Path,
    sources: EvaluationSources,
    *,
    skipped: SkippedImages,
    network: Network,
    params: dict,
    batch_stats: dict,
    step: int,
    mesh: Mesh,
) -> None:
    """What every training ends with: the linear probe and kNN.

    The test split is read only for the reported figures: learning rates are chosen on a part of the
    training split.

    Args:
      config: its parts `linear_eval` and `knn` say how.
      workdir: where the files go.
      sources: the images to learn from, and those to test on.
      skipped: takes note of images that cannot be decoded, which count in no figure.
      network: the network.
      params: its trained parameters.
      batch_stats: its trained statistics.
      step: of the checkpoint that they come from.
      mesh: the devices.
    """
    run = Run(
        config=config,
        workdir=workdir,
        sources=sources,
        images=sources.test,
        network=network,
        params=params,
        batch_stats=batch_stats,
        step=step,
        mesh=mesh,
        skipped=skipped,
    )
    measure(run, final_protocols(config), again=True)


def final_protocols(config: config_dict.ConfigDict) -> list[str]:
    """The protocols that a training ends with."""
    return ["linear", "knn"] if config.knn.enabled else ["linear"]


def measure(
    run: Run, names: Sequence[str], *, transfer_sets: tuple[str, ...] = (), again: bool = False
) -> dict[str, Figures]:
    """Measures a run by some protocols and writes each one's JSON file into its output directory.

    Protocols that cannot measure the run, which has no labels, no segments or too few images, are
    passed over with a line that says so.

    Args:
      run: the run.
      names: of the protocols.
      transfer_sets: the datasets of `transfer`; see `transfer.transfer`.
      again: measure anew what is there already, measured in the same way.

    Returns:
      What the files hold, by protocol.

    Raises:
      DivergedError: a probe diverged; the other protocols are measured.
      UserError: a protocol is unknown, or none of those named can measure the run.
    """
    check_names(names, transfer_sets)
    results: dict[str, Figures] = {}
    passed_over: dict[str, str] = {}
    diverged: list[DivergedError] = []
    for name in dict.fromkeys(names):
        about = envelope(name, run.config, run.step)
        measured: Callable[[], Figures] = functools.partial(PROTOCOLS[name].measure, run)
        sources = list((PROTOCOLS[name].labels and run.sources) or [run.images])
        if name == "transfer":
            about["data"] = {"sets": list(transfer_sets)}
        elif not PROTOCOLS[name].labels:
            about["data"] = {"images": run.images.name}
        try:
            if name == "transfer":
                there = {spec: on_dataset(run, spec) for spec in transfer_sets}
                measured = functools.partial(transfer, there)
                sources = [source for r in there.values() for source in r.evaluation_sources()]
            about["images_fingerprint"] = [agreed_fingerprint(source) for source in sources]
            before = functools.partial(_read, run.workdir, name)
            known = None if again else from_main_process(before)
            if known is not None and about.items() <= known.items():
                _logger.info(f"{name}: measured before, in {run.workdir / _file(name)}")
                results[name] = known
                say_without_label(name, known)
                continue
            _check_fit(run, name)
            results[name] = measured() | about
        except NotMeasurableError as error:
            passed_over[name] = str(error)
            continue
        except DivergedError as error:
            diverged.append(error)
            continue
        say_without_label(name, results[name])
        if is_main_process():
            write_json(run.workdir / _file(name), results[name])
    if not (results or diverged):
        raise UserError(f"nothing can be measured: {_by_reason(passed_over)}")
    if passed_over:
        _logger.info(f"not measured: {_by_reason(passed_over)}")
    if diverged:
        raise diverged[0]
    return results


def envelope(name: str, config: config_dict.ConfigDict, step: int) -> Figures:
    """What the figures of a protocol depend on: protocol, data, hyper-parameters, step and seed."""
    everything = as_json(config)
    dataset, evaluation = config.dataset, everything["evaluation"]
    own = normalize_path(dataset.path) or f"{dataset.name}:{dataset.train_split}"
    train = normalize_path(evaluation.pop("train")) or own
    test = normalize_path(evaluation.pop("test")) or (
        f"{dataset.name}:{dataset.test_split}" if dataset.test_split and not dataset.path else None
    )
    return {
        "protocol": name,
        "data": {"train": train, "test": test}
        if PROTOCOLS[name].labels
        else {"images": test or own},
        "hyper_parameters": {
            part: functools.reduce(operator.getitem, part.split("."), everything)
            for part in PROTOCOLS[name].parts
        }
        | {"evaluation": evaluation},
        "step": step,
        "seed": config.seed,
    }


def check_names(names: Sequence[str], transfer_sets: Sequence[str] = ()) -> None:
    """Checks the names of protocols.

    Raises:
      UserError: there are none, one is unknown, or `transfer` has no dataset to go to.
    """
    for name in names:
        if name not in PROTOCOLS:
            nearest = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.0)
            raise UserError(
                f"there is no protocol {name!r}; the nearest one is {nearest[0]!r}, and all are "
                f"{', '.join(PROTOCOLS)}"
            )
    if not names:
        raise UserError(f"name some protocols: {', '.join(PROTOCOLS)}")
    if "transfer" in names and not transfer_sets:
        raise UserError(
            "the protocol transfer needs a dataset to go to: --transfer=NAME:TRAIN:TEST, such as "
            "cifar10:train:test, or --transfer=FOLDER:FOLDER"
        )


def _check_fit(run: Run, name: str) -> None:
    """Raises NotMeasurableError if a run has no labels, or no segments, that a protocol needs."""
    if PROTOCOLS[name].labels:
        run.evaluation_sources()
    objective = run.config.objective.name
    if PROTOCOLS[name].segments and objective != "music":
        raise NotMeasurableError(f"the objective {objective} has no segments")


def _by_reason(passed_over: dict[str, str]) -> str:
    """The protocols that were passed over, those with the same reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in passed_over.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(those)}: {reason}" for reason, those in names.items())


def _file(name: str) -> str:
    return PROTOCOLS[name].file or f"{name}.json"


def _read(workdir: epath.Path, name: str) -> Figures | None:
    try:
        found = read_json(workdir / _file(name))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and _may_be_meant(name, found) else None


def _may_be_meant(name: str, figures: Figures) -> bool:
    """Whether a file, which anyone may have changed, holds a protocol's figures."""
    shares = [figures[share] for share in _SHARES if figures.get(share) is not None]
    if not all(isinstance(share, float) and 0 <= share <= 1 for share in shares):
        return False
    counts = figures.get("without_label", {})
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        return False
    try:
        summary_table({name: figures})
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


def read_all(workdir: epath.Path) -> dict[str, Figures]:
    """All that has been measured of a run, by protocol, whatever step it was measured at."""
    found = {name: _read(workdir, name) for name in PROTOCOLS}
    return {name: figures for name, figures in found.items() if figures is not None}


def read_results(
    config: config_dict.ConfigDict,
    workdir: epath.Path,
    step: int,
    fingerprints: Sequence[str] = (),
) -> dict[str, Figures] | None:
    """What a training ends with, if it has been written for a step and the config's protocols.

    With `fingerprints`, those of the evaluation's sources, the figures must have been measured on
    these images.
    """
    results = {}
    images = {"images_fingerprint": list(fingerprints)} if fingerprints else {}
    for name in final_protocols(config):
        found = _read(workdir, name)
        # Figures of older versions do not name the images.
        if (
            found is None
            or not (envelope(name, config, step) | images).items() <= (images | found).items()
        ):
            return None
        results[name] = found
    return results
