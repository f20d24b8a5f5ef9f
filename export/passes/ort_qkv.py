"""Pass: the three products before attention as one, whose result ONNX Runtime's op takes as it is.

A prefill quantises its tokens once instead of three times and multiplies a wider matrix: measured
at StableLM's size, 23 ms a layer instead of 28 for 640 tokens. The same for gate and up would have
to split the product, which copies it: that costs what it saves.

The fused weights are stored as `attention.qkv.*`, the channels of q, k and v one after the other.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge.export.builder import Builder, initializer, tensor_of
from medmoe_edge.export.dequantise import insert_dequantise
from medmoe_edge.export.stored_matrix import Array, StoredMatrix, lazy_tensor, no_values

PARTS = "qkv"
FUSED = re.compile(r"(.*\.attention\.)qkv(\.(?:weight|bias).*)")
CHANNELS_FIRST = (".packed", ".groups.scale")  # as MatMulNBits has them


class _Product(NamedTuple):
    """`x W`, plus the bias where there is one; W maybe behind `DequantizeLinear`."""

    x: ir.Value | None
    weight: ir.Value | None
    bias: ir.Value | None


def fuse_qkv(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse before every `GroupQueryAttention`; returns `(model, modified)`.

    A mixed export may store the three in several formats: those are left as they are.
    """
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    fused = [_fuse(model.graph, node) for node in attention]
    if any(fused):
        RemoveUnusedNodesPass()(model)
    return model, any(fused)


def split_fused(tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, ir.TensorProtocol]:
    """Stored tensors by name, those of `attention.qkv.*` lazily as those of q, k and v."""
    split: dict[str, ir.TensorProtocol] = {}
    for name, tensor in tensors.items():
        owners = owners_of(name)
        axis = 0 if name.endswith(CHANNELS_FIRST) else len(tensor.shape) - 1
        for place, own in enumerate(owners):
            split[own] = tensor if len(owners) == 1 else _part(own, tensor, axis, place)
    return split


def owners_of(name: str) -> list[str]:
    """The names of what is stored under one: its own, or those of q, k and v."""
    found = FUSED.fullmatch(name)
    return [f"{found[1]}{part}{found[2]}" for part in PARTS] if found else [name]


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    products = [_product(value) for value in node.inputs[: len(PARTS)]]
    matrices = [StoredMatrix.behind(product.weight) for product in products]
    quantised = [matrix for matrix in matrices if matrix is not None]
    formats = {(matrix.bits, matrix.group) for matrix in quantised}
    if len(quantised) < len(PARTS) or len(formats) > 1:
        return False
    integers = _joined([matrix.integers for matrix in quantised])
    shape = list(integers.shape.numpy())
    weight = initializer(lazy_tensor(str(integers.name), no_values, ir.DataType.FLOAT, shape))
    graph.register_initializer(weight)
    build = Builder()
    y = build.op("MatMul", products[0].x, weight)
    if products[0].bias is not None:
        bias = initializer(_joined([tensor_of(product.bias) for product in products]))
        graph.register_initializer(bias)
        y = build.op("Add", y, bias)
    graph.insert_before(node, build.nodes)
    insert_dequantise(graph, weight, integers, _joined([matrix.scale for matrix in quantised]))
    for place, value in enumerate((y, None, None)):
        node.replace_input_with(place, value)
    return True


def _product(value: ir.Value | None) -> _Product:
    assert value is not None
    node, bias = value.producer(), None
    assert node is not None
    if node.op_type == "Add":
        value, bias = node.inputs
        assert value is not None
        node = value.producer()
        assert node is not None
    return _Product(node.inputs[0], node.inputs[1], bias)


def _joined(parts: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """Tensors of q, k and v as one, along their last axis: the channels."""
    shape = list(parts[0].shape.numpy())
    shape[-1] *= len(parts)
    name = str(parts[0].name).replace(".attention.q.", f".attention.{PARTS}.")

    def join() -> Array:
        return np.concatenate([part.numpy() for part in parts], -1)

    return lazy_tensor(name, join, parts[0].dtype, shape)


def _part(name: str, tensor: ir.TensorProtocol, axis: int, place: int) -> ir.TensorProtocol:
    shape = list(tensor.shape.numpy())
    shape[axis] //= len(PARTS)

    def part() -> Array:
        return np.split(tensor.numpy(), len(PARTS), axis)[place]

    return lazy_tensor(name, part, tensor.dtype, shape)
