"""Pass: `DequantizeLinear -> MatMul` as ONNX Runtime runs it on a CPU.

Weights with a scale per output channel become W8A8 `DynamicQuantizeMatMul`: activations are
quantised to 8 bits as they arrive, products accumulate in int32. It takes one scale for its whole
input, so every token is divided by its largest magnitude before and multiplied with it after: that
gives each token a scale of its own, and its error no longer depends on its neighbours.
Weights in groups become `MatMulNBits`, whose activations are quantised to 8 bits in blocks of a row
(`accuracy_level` 4; at level 0 its 8-bit kernel is a hundred times slower).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from medmoe_edge.export.builder import CONTRIB, Builder, initializer, tensor_of

Array = npt.NDArray[Any]


def lower_matmul(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every pair, also inside branches; returns `(model, modified)`."""
    pairs = [
        (node, dequantise)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "MatMul" and (dequantise := _dequantises(node.inputs[1])) is not None
    ]
    peaks: dict[tuple[object, ir.Value], tuple[ir.Value, ir.Value]] = {}
    for node, dequantise in pairs:
        build, x, graph = Builder(), node.inputs[0], node.graph
        assert x is not None
        assert graph is not None
        if "block_size" in dequantise.attributes:
            new = _in_groups(build, model.graph, x, dequantise)
        else:
            if (graph, x) not in peaks:
                peaks[graph, x] = _per_token(build, x)
            scaled, peak = peaks[graph, x]
            y = build.op("DynamicQuantizeMatMul", scaled, *dequantise.inputs, domain=CONTRIB)
            new = build.op("Mul", y, peak)
        old = node.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.insert_before(node, build.nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        model.graph.opset_imports[CONTRIB] = 1
    if pairs:
        RemoveUnusedNodesPass()(model)
        NameFixPass()(model)  # branches and the graph around them share one name space
    return model, bool(pairs)


def _dequantises(weight: ir.Value | None) -> ir.Node | None:
    node = weight.producer() if weight is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _per_token(build: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x over each token's largest magnitude, and those magnitudes `[..., 1]`."""
    magnitude = build.op("ReduceMax", build.op("Abs", x), build.constant([-1]), keepdims=1)
    peak = build.op("Max", magnitude, build.constant(np.finfo(np.float32).tiny, np.float32))
    return build.op("Div", x, peak), peak


def _in_groups(build: Builder, graph: ir.Graph, x: ir.Value, dequantise: ir.Node) -> ir.Value:
    weight, floats = dequantise.inputs
    cast = floats.producer() if floats is not None else None
    assert cast is not None
    integers, scale = tensor_of(weight), tensor_of(cast.inputs[0])
    width, channels = integers.shape.numpy()
    group, bits = dequantise.attributes["block_size"].as_int(), int(integers.dtype.bitwidth)
    blocks = [channels, width // group, group * bits // 8]

    def packed() -> Array:
        return pack_rows(integers.numpy().T, bits).reshape(blocks)

    stored = [
        _lazy(f"{integers.name}.packed", packed, ir.DataType.UINT8, blocks),
        _lazy(f"{integers.name}.groups.scale", lambda: scale.numpy().T, scale.dtype, blocks[:2]),
    ]
    inputs = [initializer(tensor) for tensor in stored]
    for value in inputs:
        graph.register_initializer(value)
    per_row = ir.node("Cast", inputs[1:], {"to": int(ir.DataType.FLOAT)})
    graph.insert_before(dequantise, per_row)
    return build.op(
        "MatMulNBits",
        *(x, inputs[0], per_row.outputs[0]),
        domain=CONTRIB,
        K=width,
        N=channels,
        bits=bits,
        block_size=group,
        accuracy_level=4,
    )


def pack_rows(integers: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Rows of signed integers as MatMulNBits stores them: from zero up, the first one lowest."""
    unsigned = (integers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    parts = unsigned.reshape(len(unsigned), -1, 8 // bits)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts << _shifts(bits), axis=-1)
    return packed


def unpack_rows(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int8]:
    """The rows that `pack_rows` packed."""
    parts = (packed[..., None] >> _shifts(bits)) & (2**bits - 1)
    signed: npt.NDArray[np.int8] = (parts.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return signed.reshape(len(packed), -1)


def _shifts(bits: int) -> npt.NDArray[np.uint8]:
    return np.arange(0, 8, bits, dtype=np.uint8)


def _lazy(
    name: str, make: Callable[[], Array], dtype: ir.DataType, shape: list[int]
) -> ir.LazyTensor:
    def tensor() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(make()))

    return ir.LazyTensor(tensor, dtype, shape=ir.Shape(shape), name=name)
