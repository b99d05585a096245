"""The forms in which a backbone leaves: what is in each, and how it is loaded."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np
from etils import epath

from music_jax.errors import UserError
from music_jax.exchange import torch_names
from music_jax.exchange.encoder import encode_crops
from music_jax.exchange.onnx_graph import onnx_model
from music_jax.exchange.tensors import Tensors, safetensors_bytes
from music_jax.exchange.trained import METADATA_KEY, TrainedBackbone
from music_jax.workdir.directory import check_checkpoint_path
from music_jax.workdir.files import new_path

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of writing a backbone.

    Attributes:
      title: what the model card calls it.
      ending: of the file's name; "" for a directory.
      write: writes a backbone to a path that is not there yet; `num_classes` is for a classifier.
      usage: the backbone and the file's name to the lines of Markdown that tell how to load it.
    """

    title: str
    ending: str
    write: Callable[[TrainedBackbone, epath.Path, int], None]
    usage: Callable[[TrainedBackbone, str, int], str]


def preprocessing(trained: TrainedBackbone) -> dict[str, Any]:
    """How an image becomes the backbone's input, in JSON's types."""
    config = trained.config
    return {
        "resize_shorter_side": config.crop.eval_resize,
        "center_crop": config.crop.size,
        "channels": config.dataset.num_channels,
        "channel_order": "RGB" if config.dataset.num_channels == 3 else "gray",
        "scale": "values / 255",
        "mean": list(config.dataset.mean),
        "std": list(config.dataset.std),
    }


def _metadata(trained: TrainedBackbone, layout: str) -> dict[str, str]:
    """What goes into a file beside the weights: text by name."""
    return {
        METADATA_KEY: json.dumps({**trained.description(), "layout": layout}),
        "preprocessing": json.dumps(preprocessing(trained)),
    }


def _write_safetensors(trained: TrainedBackbone, path: epath.Path, num_classes: int) -> None:
    del num_classes
    path.write_bytes(safetensors_bytes(trained.tensors, _metadata(trained, "music_jax")))


def _write_torchvision(trained: TrainedBackbone, path: epath.Path, num_classes: int) -> None:
    tensors: Tensors = torch_names.to_torch(
        trained.config, trained.tensors, num_classes=num_classes, step=trained.step
    )
    metadata = {"format": "pt", **_metadata(trained, "torchvision")}
    path.write_bytes(safetensors_bytes(tensors, metadata))


def _write_onnx(trained: TrainedBackbone, path: epath.Path, num_classes: int) -> None:
    del num_classes
    model = onnx_model(trained, _metadata(trained, "onnx"))
    path.write_bytes(model.SerializeToString())


def _write_stablehlo(trained: TrainedBackbone, path: epath.Path, num_classes: int) -> None:
    del num_classes
    path.write_bytes(bytes(exported_program(trained).serialize()))


def exported_program(trained: TrainedBackbone) -> jax.export.Exported:
    """The backbone with its weights and the normalization, for a batch of any size.

    From uint8 [batch, size, size, channels] to float32 [batch, features].
    """
    backbone = dataclasses.replace(trained, network=None)
    arrays = jax.tree.map(np.asarray, backbone.backbone_arrays())
    (batch,) = jax.export.symbolic_shape("batch")
    size, channels = trained.config.crop.size, trained.config.dataset.num_channels
    images = jax.ShapeDtypeStruct((batch, size, size, channels), np.uint8)
    program = jax.jit(lambda images: encode_crops(backbone, arrays, images)[0])
    return jax.export.export(program, platforms=_PLATFORMS)(images)


def _write_orbax(trained: TrainedBackbone, path: epath.Path, num_classes: int) -> None:
    import orbax.checkpoint as ocp

    del num_classes
    check_checkpoint_path(path)
    params, batch_stats = trained.backbone_arrays()
    tree = {"params": _text_keys(params), "batch_stats": _text_keys(batch_stats)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def _text_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _text_keys(value) for key, value in tree.items()}


def _safetensors_usage(trained: TrainedBackbone, name: str, num_classes: int) -> str:
    del trained, num_classes
    return f"""\
    import music_jax

    encoder = music_jax.load("{name}")
    features = encoder(["photo.jpg"])  # or uint8 [images, height, width, channels]"""


def _torchvision_usage(trained: TrainedBackbone, name: str, num_classes: int) -> str:
    backbone = trained.config.backbone.name
    is_resnet = backbone in torch_names.TORCHVISION_NAMES
    theirs = torch_names.TIMM_NAMES[backbone]
    head = "fc" if is_resnet else "head"
    size = "" if is_resnet else f", img_size={trained.config.crop.size}"
    if trained.config.backbone.num_heads is not None:
        size += f", num_heads={trained.config.backbone.num_heads}"
    lines = ["    import safetensors.torch, timm, torch, torchvision", ""]
    lines += [f'    tensors = safetensors.torch.load_file("{name}")']
    if is_resnet:
        made = f"torchvision.models.{theirs}(num_classes={num_classes})"
        lines += [
            f"    model = {made}" if num_classes else f"    model = torchvision.models.{theirs}()"
        ]
        lines += ["    model.fc = torch.nn.Identity()"] if not num_classes else []
        lines += ["    # or, with the same tensors:"]
    lines += [f'    model = timm.create_model("{theirs}", num_classes={num_classes}{size})']
    lines += ["    model.load_state_dict(tensors, strict=True)"]
    if num_classes:
        lines += [f"    model.{head} = torch.nn.Identity()  # the classifier is zero: untrained"]
    lines += ["    features = model.eval()(images)  # float32 [batch, channels, height, width]"]
    return "\n".join(lines)


def _onnx_usage(trained: TrainedBackbone, name: str, num_classes: int) -> str:
    del num_classes
    size, channels = trained.config.crop.size, trained.config.dataset.num_channels
    return f"""\
    import onnxruntime

    session = onnxruntime.InferenceSession("{name}")
    # float32 [batch, {channels}, {size}, {size}], normalized; the preprocessing is in
    # session.get_modelmeta().custom_metadata_map
    (features,) = session.run(["features"], {{"images": images}})"""


def _stablehlo_usage(trained: TrainedBackbone, name: str, num_classes: int) -> str:
    del num_classes
    size, channels = trained.config.crop.size, trained.config.dataset.num_channels
    return f"""\
    import jax.export

    with open("{name}", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    features = program.call(images)  # uint8 [batch, {size}, {size}, {channels}]; normalizes them

It needs jax alone, and runs on {", ".join(_PLATFORMS)}."""


def _orbax_usage(trained: TrainedBackbone, name: str, num_classes: int) -> str:
    del trained, num_classes
    return f"""\
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore("/path/to/{name}")  # an absolute path

It holds `params` and `batch_stats` as nested dictionaries, named as in `music_jax`."""


FORMATS: dict[str, Format] = {
    "safetensors": Format(
        "safetensors, by music_jax's names", ".safetensors", _write_safetensors, _safetensors_usage
    ),
    "torchvision": Format(
        "safetensors, by the names of torchvision and timm",
        ".safetensors",
        _write_torchvision,
        _torchvision_usage,
    ),
    "onnx": Format("ONNX, opset 17", ".onnx", _write_onnx, _onnx_usage),
    "stablehlo": Format(
        "StableHLO, as jax.export serializes it", ".stablehlo", _write_stablehlo, _stablehlo_usage
    ),
    "orbax": Format("an Orbax checkpoint", "", _write_orbax, _orbax_usage),
}


def write(
    trained: TrainedBackbone, form: str, output: str, *, num_classes: int = 1000
) -> epath.Path:
    """Writes a backbone, so that a reader finds either the old file or the new one, whole.

    Args:
      trained: the backbone.
      form: one of `FORMATS`.
      output: the file, or for `orbax` the directory, which may not be there yet.
      num_classes: of the classifier, which is zero, in the form `torchvision`; 0 for none.

    Returns:
      Where it is.

    Raises:
      UserError: the form cannot hold this backbone, or the output cannot be written.
    """
    path = epath.Path(output).expanduser()
    if "://" not in output:
        path = epath.Path(path.parent.resolve()) / path.name
    directory = not FORMATS[form].ending
    if path.is_dir() or (directory and path.exists()):
        raise UserError(f"--output={output} is there already; name one that is not")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            FORMATS[form].write(trained, path, num_classes)
        else:
            with new_path(path) as temporary:
                FORMATS[form].write(trained, temporary, num_classes)
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error}") from error
    return path
