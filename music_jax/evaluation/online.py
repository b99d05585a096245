"""Measures of a backbone during its training, on a fixed subset of images."""

import logging
import math
import time

import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import from_main_process, is_main_process
from music_jax.evaluation.features import FrozenNetwork, SplitFeatures
from music_jax.metrics.knn import knn_predict
from music_jax.metrics.label_free import lidar, rankme
from music_jax.models.network import Network, Tree

_logger = logging.getLogger(__name__)

_QUERIES = 5  # One image of so many is a query of kNN, the others are its neighbors.
_SECONDS_BEFORE_BAR = 10.0


class OnlineEvaluation:
    """Measures the features of a backbone: a function of its parameters and running statistics.

    The images depend on their number alone, not on the seed of the run. The queries of kNN are
    training images like its neighbors, so that a run, or a checkpoint, that is chosen by these
    measures is not chosen by the test images.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        source: Source,
        network: Network,
        mesh: Mesh,
        skipped: SkippedImages,
    ):
        """Draws the subset; all processes call this together.

        Args:
          config: Config of the run.
          source: Images to draw from, of which only the subset is read.
          network: The network.
          mesh: Devices.
          skipped: Record of images that cannot be decoded.
        """
        self._config, self._network, self._mesh, self._skipped = config, network, mesh, skipped
        rng = np.random.Generator(np.random.Philox(key=0))
        count = min(config.online.num_images, len(source))
        rows = rng.choice(len(source), count, replace=False)
        queries = rows[: -(-count // _QUERIES)]
        viewed = rng.choice(len(source), min(config.online.view_images, len(source)), replace=False)
        rows = np.sort(rows)  # The order in which they are stored.
        self._images, self._viewed = source.subset(rows), source.subset(np.sort(viewed))
        self._is_query = np.isin(rows, queries)
        self._measures = set(config.online.measures)
        if "knn" in self._measures:
            reason = from_main_process(lambda: _why_no_knn(self._images, self._is_query))
            if reason:
                _logger.info(f"online_knn is not measured: {reason}")
                self._measures.remove("knn")

    def __call__(self, params: Tree, batch_stats: Tree) -> dict[str, float]:
        """Returns `online_knn` etc. and `online_seconds`; all processes call this together.

        A measure that is not a number is missing, and all are if a feature is not finite. Only the
        main process computes them from the features.
        """
        started = time.monotonic()
        frozen = FrozenNetwork(
            self._config, self._network, params, batch_stats, self._mesh, self._skipped
        )
        found: dict[str, float] = {}
        if self._measures & {"knn", "rankme"}:
            extractor, name = frozen.extractor("trained"), self._images.name
            split = frozen.extract(
                extractor, self._images, f"features of {name}", delay=_SECONDS_BEFORE_BAR
            )
            if _are_usable(split.features):
                if "knn" in self._measures:
                    found["online_knn"] = self._knn(split)
                if "rankme" in self._measures:
                    found["online_rankme"] = rankme(split.features)
        if "lidar" in self._measures:
            views = frozen.extract_views(
                self._viewed,
                num_images=len(self._viewed),
                num_views=self._config.online.num_views,
                description=f"views of {self._viewed.name}",
                embeddings=False,
                delay=_SECONDS_BEFORE_BAR,
            )["features"]
            if _are_usable(views):
                found["online_lidar"] = lidar(views)
        found = {name: value for name, value in found.items() if math.isfinite(value)}
        return found | {"online_seconds": time.monotonic() - started}

    def _knn(self, split: SplitFeatures) -> float:
        """Returns the accuracy of kNN; NaN if no neighbor or no query can be decoded."""
        split, settings = split.labeled(), self._config.knn
        is_query = self._is_query[split.indices]
        bank, queries = (split.select(np.flatnonzero(x)) for x in (~is_query, is_query))
        if not (len(bank) and len(queries)):
            return math.nan
        predicted = knn_predict(
            bank.features,
            bank.labels,
            queries.features,
            num_classes=self._images.num_classes,
            k=settings.k,
            temperature=settings.temperature,
        )
        return float(np.mean(predicted == queries.labels))


def _why_no_knn(source: Source, is_query: np.ndarray) -> str:
    """Returns why images cannot be classified, or "" if they can be."""
    if source.multi_label:
        return f"the images of {source.name} may have several classes each"
    if source.num_classes < 2:
        return source.no_classes or f"the images of {source.name} have no labels"
    labels = source.labels()
    bank, queries = labels[~is_query], labels[is_query]
    if len(np.unique(bank[bank >= 0])) < 2 or not np.any(queries >= 0):
        return (
            f"of the {len(source):,} images of {source.name} that were drawn, "
            f"{np.sum(labels >= 0):,} have a label; a larger config.online.num_images draws more"
        )
    return ""


def _are_usable(features: np.ndarray) -> bool:
    """Returns whether to measure features, which is the task of the main process."""
    if not is_main_process():
        return False
    finite = bool(len(features)) and bool(np.all(np.isfinite(features)))
    if not finite:
        _logger.warning("online measures are missing: some features are not finite")
    return finite
