"""The evaluation of a trained backbone, beside raw pixels and the backbone before training."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax import progress
from music_jax.data.datasets import EvaluationSources
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.errors import UserError
from music_jax.evaluation import linear_probe
from music_jax.evaluation.features import (
    Extractor,
    LabelledFeatures,
    backbone_extractor,
    extract_split,
    pixel_extractor,
    random_crop_batches,
)
from music_jax.evaluation.knn import knn_predict
from music_jax.evaluation.linear_probe import ProbeRecipe
from music_jax.json_files import read_json
from music_jax.mesh import is_main_process
from music_jax.models.network import Network, init_network
from music_jax.records import as_json, write_json

_LINEAR_FILE = "linear_eval.json"
_KNN_FILE = "knn.json"
_FIGURES = {
    "linear": ("top1", "top5", "random_init_top1", "raw_pixels_top1"),
    "knn": ("top1", "random_init_top1", "raw_pixels_top1"),
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
    """Runs the linear probe and kNN and writes linear_eval.json and knn.json.

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
    extractors = {"trained": backbone_extractor(network, params, batch_stats, config, mesh)}
    if config.linear_eval.random_init:
        initial = jax.jit(lambda key: init_network(config, key))(jax.random.key(config.seed))
        extractors["random_init"] = backbone_extractor(
            network, initial[0], initial[1], config, mesh
        )
    if config.linear_eval.raw_pixels:
        extractors["raw_pixels"] = pixel_extractor(config)

    linear, knn = {}, {}
    for name, extractor in extractors.items():
        representation = _Representation(
            name, extractor, sources.train, sources.test, config, mesh, skipped
        )
        linear[name] = representation.linear_probe()
        if config.knn.enabled:
            knn[name] = representation.knn()

    record = {
        **linear["trained"],
        "step": step,
        "protocol": protocol(config),
        "raw_pixels_top1": linear.get("raw_pixels", {}).get("top1"),
        "random_init_top1": linear.get("random_init", {}).get("top1"),
    }
    if is_main_process():
        if knn:
            write_json(workdir / _KNN_FILE, _knn_record(knn, step, config))
        write_json(workdir / _LINEAR_FILE, record)


def _knn_record(
    knn: dict[str, dict[str, Any]], step: int, config: config_dict.ConfigDict
) -> dict[str, Any]:
    return {
        **knn["trained"],
        "step": step,
        "k": config.knn.k,
        "temperature": config.knn.temperature,
        "raw_pixels_top1": knn.get("raw_pixels", {}).get("top1"),
        "random_init_top1": knn.get("random_init", {}).get("top1"),
    }


def protocol(config: config_dict.ConfigDict) -> dict[str, Any]:
    """What the figures depend on besides the checkpoint."""
    everything = as_json(config)
    parts = {key: everything[key] for key in ("evaluation", "linear_eval", "knn", "seed")}
    return parts | {
        "test_split": config.dataset.test_split,
        "dataset": config.dataset.path or config.dataset.name,
    }


def read_results(
    config: config_dict.ConfigDict, workdir: epath.Path, step: int
) -> dict[str, dict[str, Any]] | None:
    """The figures of a step by the config's protocol, if they have been written."""
    results = {}
    for name, file in (("linear", _LINEAR_FILE), ("knn", _KNN_FILE)):
        if name == "knn" and not config.knn.enabled:
            continue
        try:
            results[name] = read_json(workdir / file)
        except (OSError, ValueError):
            return None
        if not isinstance(results[name], dict) or results[name].get("step") != step:
            return None
        if not all(_is_figure(results[name], figure) for figure in _FIGURES[name]):
            return None
    return results if results["linear"].get("protocol") == protocol(config) else None


def _is_figure(result: dict[str, Any], name: str) -> bool:
    """Whether a result has a share under this name, or None where it may be left out."""
    value = result.get(name)
    if value is None:
        return name.endswith("_top1")
    return isinstance(value, float) and 0 <= value <= 1


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as a table, in percent."""
    linear, knn = results["linear"], results.get("knn", {})

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    rows = [
        (
            "trained backbone",
            percent(linear["top1"]),
            percent(linear["top5"]),
            percent(knn.get("top1")),
        )
    ]
    for key, label in (("random_init", "random backbone"), ("raw_pixels", "raw pixels")):
        values = [linear.get(f"{key}_top1"), knn.get(f"{key}_top1")]
        if values[0] is not None:
            rows.append((label, percent(values[0]), "", percent(values[1])))
    return progress.table(("", "linear top-1", "linear top-5", "kNN top-1"), rows)


@dataclasses.dataclass
class _Representation:
    """One way of turning images into features, with the features of both splits once extracted."""

    name: str
    extractor: Extractor
    train: Source
    test: Source
    config: config_dict.ConfigDict
    mesh: Mesh
    skipped: SkippedImages

    def __post_init__(self) -> None:
        self._cache: dict[str, LabelledFeatures] = {}
        settings = self.config.linear_eval
        self._random_crops = settings.random_crops
        self._seed = self.config.seed
        self._recipe = ProbeRecipe(
            num_epochs=settings.num_epochs,
            batch_size=settings.batch_size,
            base_learning_rates=tuple(settings.base_learning_rates),
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            drop_epochs=tuple(settings.drop_epochs),
        )

    def features(self, split: str) -> LabelledFeatures:
        """Features of the whole split, `train` or `test`."""
        if split not in self._cache:
            source = self.train if split == "train" else self.test
            self._cache[split] = self._extract(source, f"features of {self.name}, {split}")
        return self._cache[split]

    def _extract(self, source: Source, description: str) -> LabelledFeatures:
        found = extract_split(
            self.extractor,
            source,
            self.config,
            self.mesh,
            skipped=self.skipped,
            description=description,
        )
        if not len(found.rows()):
            raise UserError(f"none of the {len(found)} images of {source.name} has a label")
        if not np.all(np.isfinite(found.features)):
            raise UserError(f"some features of {source.name} are not finite; nothing to probe")
        return found

    def linear_probe(self) -> dict[str, Any]:
        """Chooses the learning rate on a part of the training split; tests on the test split."""
        rates = self._recipe.base_learning_rates
        if len(rates) > 1:
            rest, held_out = _split(len(self.train), self.config)
            heads, _ = self._fit(self._recipe, rest, f"learning rates for {self.name}")
            scores = linear_probe.accuracies(heads, *self._standardized(self._part(held_out)))
            rates = (rates[int(np.argmax(scores[:, 0]))],)
        recipe = dataclasses.replace(self._recipe, base_learning_rates=rates)
        everything = np.arange(len(self.train))
        heads, num_train = self._fit(recipe, everything, f"linear probe of {self.name}")
        test = self.features("test").rows()
        top1, top5 = linear_probe.accuracies(heads, *self._standardized(test))[0]
        return {
            "top1": float(top1),
            "top5": float(top5),
            "learning_rate": rates[0] * recipe.batch_size / 256,
            "num_train": num_train,
            "num_test": len(test),
        }

    def _part(self, rows: np.ndarray) -> LabelledFeatures:
        if self._random_crops:
            part = self.train.subset(rows)
            return self._extract(part, f"features of {self.name}, validation").rows()
        return self.features("train").rows(rows)

    def _standardized(self, part: LabelledFeatures) -> tuple[np.ndarray, np.ndarray]:
        features = part.features
        if self.config.linear_eval.standardize:
            train = self.features("train").rows().features
            features = (features - train.mean(axis=0)) / (train.std(axis=0) + 1e-6)
        return features, part.labels

    def _fit(self, recipe: ProbeRecipe, rows: np.ndarray, description: str) -> tuple[Any, int]:
        """Classifiers from the samples at these rows, and how many those are."""
        part = None if self._random_crops else self._part(rows)
        count = len(rows) if part is None else len(part)
        batch_size = min(recipe.batch_size, count) // self.mesh.size * self.mesh.size
        recipe = dataclasses.replace(recipe, batch_size=max(batch_size, 1))
        steps_per_epoch = count // recipe.batch_size
        if part is None:
            batches = random_crop_batches(
                self.extractor,
                self.train.subset(rows),
                self.config,
                self.mesh,
                batch_size=recipe.batch_size,
                num_epochs=recipe.num_epochs,
                seed=self._seed,
                skipped=self.skipped,
            )
            num_features = self.features("test").features.shape[1]
        else:
            features, labels = self._standardized(part)
            batches = linear_probe.shuffled_batches(features, labels, recipe, self._seed)
            num_features = features.shape[1]
        total = recipe.num_epochs * steps_per_epoch
        with progress.bar(total, unit="step", description=description) as bar:
            heads = linear_probe.fit(
                _counted(batches, bar),
                recipe,
                num_features=num_features,
                num_classes=self.train.num_classes,
                steps_per_epoch=steps_per_epoch,
                seed=self._seed,
            )
        return heads, count

    def knn(self) -> dict[str, Any]:
        """Top-1 accuracy of the weighted vote of the nearest training samples."""
        train, test = self.features("train").rows(), self.features("test").rows()
        predicted = knn_predict(
            train.features,
            train.labels,
            test.features,
            num_classes=self.train.num_classes,
            k=self.config.knn.k,
            temperature=self.config.knn.temperature,
        )
        top1 = float(np.mean(np.asarray(predicted) == test.labels))
        return {"top1": top1, "num_train": len(train), "num_test": len(test)}


def _counted(batches: Any, bar: Any) -> Any:
    for batch in batches:
        yield batch
        bar.update(1)


def _split(count: int, config: config_dict.ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Random disjoint indices: the rest, and the part held out for validation."""
    rng = np.random.Generator(np.random.Philox(key=[config.seed, 2**32]))
    order = rng.permutation(count)
    held_out = min(max(1, round(count * config.linear_eval.validation_fraction)), count - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
