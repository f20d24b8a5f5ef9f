"""Pass: `DequantizeLinear -> MatMul` as ONNX Runtime runs it on a CPU.

Weights with a scale per output channel become W8A8 `DynamicQuantizeMatMul`: activations are
quantised to 8 bits as they arrive, one scale for the whole input; products accumulate in int32.
Weights in groups become `MatMulNBits`, whose activations are quantised to 8 bits in blocks of a row
(`accuracy_level` 4; at level 0 its 8-bit kernel is a hundred times slower).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medmoe_edge.export.builder import CONTRIB, initializer

Array = npt.NDArray[Any]


def lower_matmul(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every pair, also inside branches; returns `(model, modified)`."""
    pairs = [
        (node, dequantise)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "MatMul" and (dequantise := _dequantises(node.inputs[1])) is not None
    ]
    for node, dequantise in pairs:
        if "block_size" in dequantise.attributes:
            replacement = _in_groups(model.graph, node, dequantise)
        else:
            inputs = [node.inputs[0], *dequantise.inputs]
            replacement = ir.node("DynamicQuantizeMatMul", inputs, domain=CONTRIB)
        old, new = node.outputs[0], replacement.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, replacement)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        _remove_if_unused(model.graph, dequantise)
        model.graph.opset_imports[CONTRIB] = 1
    return model, bool(pairs)


def _dequantises(weight: ir.Value | None) -> ir.Node | None:
    node = weight.producer() if weight is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _in_groups(graph: ir.Graph, node: ir.Node, dequantise: ir.Node) -> ir.Node:
    weight, floats = dequantise.inputs
    cast = floats.producer() if floats is not None else None
    assert cast is not None
    integers, scale = _tensor(weight), _tensor(cast.inputs[0])
    width, channels = integers.shape.numpy()
    group, bits = dequantise.attributes["block_size"].as_int(), int(integers.dtype.bitwidth)
    blocks = [channels, width // group, group * bits // 8]

    def packed() -> Array:
        return _pack(integers.numpy().T, bits).reshape(blocks)

    stored = [
        _lazy(f"{integers.name}.packed", packed, ir.DataType.UINT8, blocks),
        _lazy(f"{scale.name}.rows", lambda: scale.numpy().T, scale.dtype, blocks[:2]),
    ]
    inputs = [initializer(tensor) for tensor in stored]
    for value in inputs:
        graph.register_initializer(value)
    per_row = ir.node("Cast", inputs[1:], {"to": int(ir.DataType.FLOAT)})
    graph.insert_before(dequantise, per_row)
    return ir.node(
        "MatMulNBits",
        [node.inputs[0], inputs[0], per_row.outputs[0]],
        {"K": width, "N": channels, "bits": bits, "block_size": group, "accuracy_level": 4},
        domain=CONTRIB,
    )


def _pack(integers: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Rows of signed integers as MatMulNBits stores them: from zero up, the first one lowest."""
    unsigned = (integers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    parts = unsigned.reshape(len(unsigned), -1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts << shifts, axis=-1)


def _lazy(
    name: str, make: Callable[[], Array], dtype: ir.DataType, shape: list[int]
) -> ir.LazyTensor:
    def tensor() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(make()))

    return ir.LazyTensor(tensor, dtype, shape=ir.Shape(shape), name=name)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _remove_if_unused(graph: ir.Graph, dequantise: ir.Node) -> None:
    if dequantise.outputs[0].uses():
        return
    inputs = list(dequantise.inputs)
    graph.remove(dequantise, safe=True)
    for value in inputs:
        cast = value.producer() if value is not None else None
        if cast is not None and not cast.outputs[0].uses():
            inputs += cast.inputs
            graph.remove(cast, safe=True)
    for value in inputs:
        if value is not None and value.name in graph.initializers and not value.uses():
            del graph.initializers[value.name]
