"""Describes the network of a run for the page's scripts, which apply it to images."""

from typing import Any

import jax
import numpy as np

from music_jax.evaluation.results import Classifier
from music_jax.evaluation.run import Run
from music_jax.exchange.weights import tensors_by_name
from music_jax.metrics.knn import unit_length
from music_jax.models import BACKBONES
from music_jax.models.resnet import BATCH_NORM_EPSILON, Layer, inference_layers
from music_jax.report.measures import Sample

MAX_BYTES = 4_500_000  # of all networks of a page, before they are encoded as text
_MIN_GALLERY, _MAX_GALLERY = 16, 1000  # images among which neighbors are searched

Tensors = dict[str, np.ndarray]


def network_data(
    run: Run, sample: Sample, classifier: Classifier | None, *, max_bytes: int = MAX_BYTES
) -> dict[str, Any] | str:
    """Describes a network, its linear probe and the features of the report's images.

    Args:
      run: Run.
      sample: Images of the report.
      classifier: Linear probe, if there is one.
      max_bytes: Largest size of all arrays.

    Returns:
      JSON values and arrays by name; or the reason why there is no description, as the end of a
      sentence.
    """
    config, dataset = run.config, run.config.dataset
    channels, name = dataset.num_channels, config.backbone.name
    if dataset.pixel_type != "uint8" or channels not in (1, 3):
        return (
            f"the network takes images of {channels} channels of type {dataset.pixel_type}, and a "
            "page reads images of 1 or 3 channels of eight bits"
        )
    spec = BACKBONES[name]
    if spec.is_registered or not spec.stages or "block" not in spec.sizes:
        return f"the page has no scripts for the layers of the backbone {name}"
    params, others = jax.device_get((run.params, run.batch_stats))
    tensors = tensors_by_name(params["backbone"], others.get("backbone", {}))
    layers = inference_layers(spec.sizes, config.backbone.stem or "imagenet")
    data: dict[str, Any] = {
        "size": config.crop.size,
        "resize": config.crop.eval_resize,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "layers": [_layer(layer, tensors) for layer in layers],
        "head": [],
        "classifier": None,
    }
    if config.objective.name == "music":
        head = tensors_by_name(params["projector"], others.get("projector", {}))
        data["head"] = _head(head, len(config.projector.hidden_sizes))
    shape = run.step, run.network.num_features
    if classifier is not None and (classifier.step, len(classifier.kernel)) == shape:
        data["classifier"] = [_dense(0, kernel=classifier.kernel, bias=classifier.bias)]
    left = max_bytes - _num_bytes(data)
    count = min(len(sample.features), _MAX_GALLERY, left // (2 * sample.features.shape[1]))
    if count < min(len(sample.features), _MIN_GALLERY):
        return (
            f"the weights of the network take {_num_bytes(data) / 1e6:.1f} MB, and the page has "
            f"room for {max_bytes / 1e6:.1f} MB"
        )
    chosen = np.linspace(0, len(sample.features) - 1, count).round().astype(np.uint16)
    vectors = np.round(32767 * unit_length(sample.features[chosen])).astype(np.int16)
    return data | {"gallery": {"images": chosen, "vectors": vectors}}


def _layer(layer: Layer, tensors: Tensors) -> dict[str, Any]:
    """Returns a layer with its weights, batch normalization included."""
    data = {"kind": layer.kind, "inputs": layer.inputs, "relu": layer.relu, "grid": layer.grid}
    if layer.kind != "conv":
        return data
    kernel = tensors[f"{layer.conv}.kernel"]
    return data | {"stride": layer.stride} | _fold_norm(kernel, 0.0, layer.norm, tensors)


def _head(tensors: Tensors, num_hidden: int) -> list[dict[str, Any]]:
    """Returns the layers of the projection head: convolutions of a feature map of one pixel."""
    layers = []
    for i in range(num_hidden):
        kernel, bias = (tensors[f"hidden.{i}.{name}"] for name in ("kernel", "bias"))
        layers.append(_dense(i, relu=True, **_fold_norm(kernel, bias, f"norms.{i}", tensors)))
    kernel = tensors["output.kernel"]
    bias = -tensors["center.mean"] if "center.mean" in tensors else np.zeros(kernel.shape[1])
    return [*layers, _dense(num_hidden, kernel=kernel, bias=bias.astype(np.float32))]


def _dense(
    number: int, *, kernel: np.ndarray, bias: np.ndarray, relu: bool = False
) -> dict[str, Any]:
    weights = {"kernel": kernel[None, None], "bias": bias}
    return {"kind": "conv", "inputs": (number,), "stride": 1, "relu": relu} | weights


def _fold_norm(
    kernel: np.ndarray, bias: np.ndarray | float, norm: str, tensors: Tensors
) -> dict[str, np.ndarray]:
    """Returns the weights of a convolution and the batch normalization that follows it."""
    scale, offset, mean, var = (
        tensors[f"{norm}.{name}"].astype(np.float64) for name in ("scale", "bias", "mean", "var")
    )
    factor = scale / np.sqrt(var + BATCH_NORM_EPSILON)
    return {
        "kernel": (kernel * factor).astype(np.float32),
        "bias": (offset + (bias - mean) * factor).astype(np.float32),
    }


def _num_bytes(value: Any) -> int:
    """Returns the size of all arrays."""
    if isinstance(value, dict | list | tuple):
        return sum(map(_num_bytes, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, np.ndarray) else 0
