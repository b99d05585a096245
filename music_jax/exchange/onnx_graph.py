"""Converts backbones to ONNX graphs with the standard operators of opset 17.

The input `images` is [batch, channels, size, size], normalized; the output `features` is [batch,
features]. Both are float32, for batches of any size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from music_jax.errors import UserError, require_extra
from music_jax.exchange.encoder import TrainedBackbone
from music_jax.models import BACKBONES
from music_jax.models.resnet import BATCH_NORM_EPSILON, inference_layers, pooling_cells
from music_jax.models.vision_transformer import EPSILON as LAYER_NORM_EPSILON
from music_jax.models.vision_transformer import sincos_positions

_OPSET = 17
_IR_VERSION = 8  # of ONNX 1.12, the first release with this opset


def onnx_model(trained: TrainedBackbone, metadata: dict[str, str]) -> Any:
    """Converts a backbone in inference mode to a checked `onnx.ModelProto`.

    Args:
      trained: Backbone.
      metadata: Texts by name to store in the model.

    Raises:
      UserError: The backbone is a registered one, whose layers are unknown.
    """
    name = trained.config.backbone.name
    if BACKBONES[name].is_registered:
        raise UserError(
            f"a registered backbone such as {name} cannot be exported as ONNX; use "
            "--format=stablehlo, safetensors or orbax"
        )
    with require_extra("export"):
        import onnx
    from onnx import TensorProto, helper

    graph = _Graph(trained)
    size, channels = trained.config.crop.size, trained.config.dataset.num_channels
    if "stage_sizes" in graph.sizes:
        graph.resnet(size)
    else:
        graph.vision_transformer(size)
    images, features = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in {
            "images": (channels, size, size),
            "features": (trained.backbone.num_features,),
        }.items()
    )
    model = helper.make_model(
        helper.make_graph(graph.nodes, "backbone", [images], [features], graph.initializers),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="music_jax",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and constants; the method of each layer adds its nodes and returns the output name."""

    def __init__(self, trained: TrainedBackbone):
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.sizes = BACKBONES[trained.config.backbone.name].sizes
        self._num_heads: int = trained.config.backbone.num_heads or self.sizes.get("num_heads", 0)
        self._stem = trained.config.backbone.stem or "imagenet"
        self._tensors = trained.tensors
        self._constants: set[str] = set()

    def resnet(self, size: int) -> None:
        outputs, sides = ["images"], [size]
        for layer in inference_layers(self.sizes, self._stem):
            x, side = outputs[layer.inputs[0]], sides[layer.inputs[0]]
            if layer.kind == "conv":
                x = self._batch_norm(self._conv(x, layer.conv, layer.stride), layer.norm)
                side = -(-side // layer.stride)
            elif layer.kind == "max_pool":
                x = self._node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
                side = -(-side // 2)
            elif layer.kind == "add":
                x = self._node("Add", x, outputs[layer.inputs[1]])
            else:
                self._pool(x, side, layer.grid)
            outputs.append(self._node("Relu", x) if layer.relu else x)
            sides.append(side)

    def _pool(self, x: str, size: int, grid: int) -> None:
        if grid == 1:
            self._node("Flatten", self._node("GlobalAveragePool", x), output="features")
            return
        means = np.zeros((size, grid), np.float32)
        for i, (start, end) in enumerate(pooling_cells(size, grid)):
            means[start:end, i] = 1 / (end - start)
        x = self._node("Reshape", x, self._integers((0, 0, size * size)))
        x = self._node("MatMul", x, self._constant("means", np.kron(means, means)))
        x = self._node("Transpose", x, perm=[0, 2, 1])  # [batch, cells, channels]
        self._node("Flatten", x, output="features")

    def vision_transformer(self, size: int) -> None:
        width, patch = self.sizes["width"], self.sizes["patch_size"]
        rows = size // patch
        kernel = self._tensors["patches.kernel"].reshape(patch, patch, -1, width)
        weights = self._constant("patches.kernel", kernel.transpose(3, 2, 0, 1))
        (bias,) = self._weights("patches", "bias")
        x = self._node("Conv", "images", weights, bias, strides=[patch, patch])
        x = self._node("Reshape", x, self._integers((0, width, rows * rows)))
        x = self._node("Transpose", x, perm=[0, 2, 1])
        positions = self._constant("positions", sincos_positions(rows, rows, width)[None])
        x = self._node("Add", x, positions)
        token = self._constant("class_token", self._tensors["class_token"].reshape(1, 1, width))
        batch = self._node("Slice", self._node("Shape", x), *map(self._integers, ([0], [1])))
        shape = self._node("Concat", batch, self._integers((1, width)), axis=0)
        x = self._node("Concat", self._node("Expand", token, shape), x, axis=1)
        for i in range(self.sizes["depth"]):
            x = self._transformer_block(x, f"blocks.{i}", width)
        first = self._node("Gather", x, self._constant("index0", np.int64(0)), axis=1)
        self._layer_norm(first, "norm", output="features")

    def _transformer_block(self, x: str, name: str, width: int) -> str:
        heads = self._num_heads
        y = self._linear(self._layer_norm(x, f"{name}.norm1"), f"{name}.attention.qkv")
        y = self._node("Reshape", y, self._integers((0, 0, 3, heads, width // heads)))
        y = self._node("Transpose", y, perm=[2, 0, 3, 1, 4])  # [3, batch, heads, tokens, size]
        query, key, value = (
            self._node("Gather", y, self._constant(f"index{i}", np.int64(i)), axis=0)
            for i in range(3)
        )
        key = self._node("Transpose", key, perm=[0, 1, 3, 2])
        scale = self._constant("scale", np.float32((width // heads) ** -0.5))
        scores = self._node("Mul", self._node("MatMul", query, key), scale)
        y = self._node("MatMul", self._node("Softmax", scores, axis=-1), value)
        y = self._node("Transpose", y, perm=[0, 2, 1, 3])
        y = self._node("Reshape", y, self._integers((0, 0, width)))
        x = self._node("Add", x, self._linear(y, f"{name}.attention.output"))
        y = self._linear(self._layer_norm(x, f"{name}.norm2"), f"{name}.mlp_in")
        y = self._linear(self._gelu(y), f"{name}.mlp_out")
        return self._node("Add", x, y)

    def _gelu(self, x: str) -> str:
        # x / 2 * (1 + erf(x / sqrt 2)): opset 17 has no operator for it.
        root, one, half = (
            self._constant(name, np.float32(value))
            for name, value in (("root", 2**-0.5), ("one", 1), ("half", 0.5))
        )
        cdf = self._node("Add", self._node("Erf", self._node("Mul", x, root)), one)
        return self._node("Mul", self._node("Mul", x, half), cdf)

    def _conv(self, x: str, name: str, stride: int) -> str:
        kernel = self._tensors[f"{name}.kernel"].transpose(3, 2, 0, 1)
        pads, weights = [kernel.shape[2] // 2] * 4, self._constant(f"{name}.kernel", kernel)
        return self._node("Conv", x, weights, strides=[stride, stride], pads=pads)

    def _batch_norm(self, x: str, name: str) -> str:
        weights = self._weights(name, "scale", "bias", "mean", "var")
        return self._node("BatchNormalization", x, *weights, epsilon=BATCH_NORM_EPSILON)

    def _layer_norm(self, x: str, name: str, output: str = "") -> str:
        weights = self._weights(name, "scale", "bias")
        options: dict[str, Any] = {"axis": -1, "epsilon": LAYER_NORM_EPSILON}
        return self._node("LayerNormalization", x, *weights, output=output, **options)

    def _linear(self, x: str, name: str) -> str:
        kernel, bias = self._weights(name, "kernel", "bias")
        return self._node("Add", self._node("MatMul", x, kernel), bias)

    def _weights(self, name: str, *leaves: str) -> list[str]:
        return [self._constant(f"{name}.{x}", self._tensors[f"{name}.{x}"]) for x in leaves]

    def _integers(self, values: Sequence[int]) -> str:
        return self._constant("i" + "_".join(map(str, values)), np.asarray(values, np.int64))

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Adds a constant, unless one of this name exists."""
        from onnx import numpy_helper

        if name not in self._constants:
            self._constants.add(name)
            self.initializers.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def _node(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output
