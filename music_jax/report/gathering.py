"""From a workdir to all that the report shows of it."""

import dataclasses
import logging
from typing import Any

import numpy as np

from music_jax.errors import MusicError
from music_jax.evaluation.load_run import load_run
from music_jax.evaluation.run import Run
from music_jax.report import measures
from music_jax.report.images import Seen, look, packed, sprite
from music_jax.report.reading import Recorded, said

_logger = logging.getLogger(__name__)

_NAME = 80  # characters of an image's name


@dataclasses.dataclass(frozen=True)
class Shown:
    """A run as the report shows it.

    Attributes:
      recorded: what its files say.
      seen: its images; None if they, or the network, could not be opened.
      why_not: in that case, why.
      segments: what the segments do; None without images, or if there are none.
      maps: of the features and the embeddings, by name.
      neighbors: rows and similarities.
      confusion: of the linear probe, if it left its predictions.
      num_training_images: if they are known.
    """

    recorded: Recorded
    seen: Seen | None = None
    why_not: str = ""
    segments: measures.Segments | None = None
    maps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    neighbors: tuple[np.ndarray, np.ndarray] | None = None
    confusion: measures.Confusion | None = None
    num_training_images: int | None = None


def gather(
    recorded: Recorded, num_images: int, overrides: dict[str, object] | None = None
) -> Shown:
    """Opens a run's network and images, if they can be opened, and measures what is to be seen.

    Args:
      recorded: What the run's files say.
      num_images: Number of images to show and measure.
      overrides: Config fields, by dotted name, to open the run with in place of its own.
    """
    classes: list[str] = []
    try:
        run = load_run(str(recorded.path), read_only=True, overrides=overrides)
        seen = look(run, num_images)
    except (MusicError, OSError) as error:
        why_not = " ".join(str(error).split())
        _logger.info(f"{recorded.name}: no images are shown: {why_not}")
        return Shown(recorded, why_not=why_not, confusion=_confusion(recorded, classes))
    classes = [said(name, _NAME) for name in seen.class_names]
    segments = None
    if recorded.segments is not None:
        segments = measures.segments(
            seen,
            num_segments=run.config.objective.num_segments,
            temperature=run.config.objective.temperature,
        )
    maps = {"embedding": seen.embeddings, "features": seen.features}
    _logger.info(f"{recorded.name}: map of {len(seen.indices):,} images")
    placed = {name: measures.flat_map(vectors) for name, vectors in maps.items()}
    return Shown(
        recorded,
        seen=seen,
        segments=segments,
        maps={name: place for name, place in placed.items() if place is not None},
        neighbors=measures.neighbors(seen.features),
        confusion=_confusion(recorded, classes),
        num_training_images=_num_training_images(run),
    )


def _confusion(recorded: Recorded, classes: list[str]) -> measures.Confusion | None:
    if recorded.predictions is None:
        return None
    return measures.confusion(recorded.predictions, classes)


def _num_training_images(run: Run) -> int | None:
    if run.sources is None:
        return len(run.images)
    return None if run.config.evaluation.train else len(run.sources.train)


def payload(shown: Shown, *, tile: int, matrix: int) -> tuple[dict[str, Any], dict[str, str]]:
    """What the page's scripts draw the run from.

    Args:
      shown: the run.
      tile: largest side of a thumbnail, in pixels.
      matrix: largest side of the joint-probability matrix.

    Returns:
      What JSON holds, and the image files that it names, as data URLs.
    """
    seen, found = shown.seen, shown.segments
    data: dict[str, Any] = {"confusion": _confusion_data(shown.confusion)}
    if seen is None:
        return data, {}
    thumbs = sprite(seen.pixels, tile=tile)
    shape = seen.views.shape
    views = sprite(seen.views.reshape(-1, *shape[2:]), tile=2 * tile, columns=shape[1])
    test_indices = seen.indices if _probed_on(shown) else np.full(len(seen.indices), -1)
    data |= {
        "images": {
            **thumbs.described(),
            "count": len(seen.indices),
            "side": seen.pixels.shape[1],
            "names": [said(name, _NAME) for name in seen.names],
            "labels": packed(seen.labels.astype(np.int16)),
            "predicted": packed(
                measures.predicted(shown.recorded.predictions, test_indices).astype(np.int16)
            ),
        },
        "classes": [said(name, _NAME) for name in seen.class_names]
        or [str(i) for i in range(seen.num_classes)],
        "views": {**views.described(), "count": shape[0], "pairs": (shape[1] - 1) // 2},
        "maps": {
            name: packed(np.round(60000 * place).astype(np.uint16))
            for name, place in shown.maps.items()
        },
        "segments": None,
    }
    if shown.neighbors is not None:
        rows, similarities = shown.neighbors
        data["neighbors"] = {
            "rows": packed(rows.astype(np.uint16)),
            "similarity": packed(np.round(1000 * similarities).astype(np.int16)),
        }
    if found is not None:
        temperature = float(shown.recorded.field("objective.temperature", 1.0))
        count, units = found.counts.shape
        joint = measures.joint(
            seen, found.order, num_segments=count, temperature=temperature, largest=matrix
        )
        data["segments"] = {
            "count": count,
            "units": units,
            "order": found.order.tolist(),
            "usage": packed(found.measures.usage.astype(np.float32)),
            "counts": packed(found.counts),
            "codes": packed(found.codes.astype(np.uint8 if units <= 256 else np.uint16)),
            "top": packed(found.top),
            "certainty": packed(np.round(255 * found.certainty).astype(np.uint8)),
            "labelNmi": None if found.label_nmi is None else _floats(found.label_nmi),
            "entropy": _floats(found.measures.usage_entropy),
            "confidence": _floats(found.measures.confidence),
            "information": packed(found.measures.mutual_information.astype(np.float32)),
            "joint": {
                "shown": joint.shown.tolist(),
                "levels": packed(joint.levels),
                "low": joint.low,
                "high": joint.high,
                "pairs": len(seen.pair),
            },
        }
    return data, {"thumbs": thumbs.url, "views": views.url}


def _probed_on(shown: Shown) -> bool:
    """Whether the probe's test images are those that are shown."""
    seen, found = shown.seen, shown.recorded.predictions
    if seen is None or found is None:
        return False
    known = dict(zip(found.indices.tolist(), found.labels.tolist(), strict=True))
    pairs = zip(seen.indices.tolist(), seen.labels.tolist(), strict=True)
    return all(known.get(index, label) == label for index, label in pairs)


def _confusion_data(found: measures.Confusion | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"names": found.names, "counts": packed(found.counts.astype(np.uint32))}


def _floats(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
