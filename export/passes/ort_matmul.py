"""Pass: `DequantizeLinear -> MatMul` as ONNX Runtime runs it on a CPU.

Weights with a scale per output channel become W8A8 `DynamicQuantizeMatMul`: activations are
quantised to 8 bits as they arrive, products accumulate in int32. It takes one scale for its whole
input, so every token is divided by its largest magnitude before and multiplied with it after: that
gives each token a scale of its own, and its error no longer depends on its neighbours.
On processors without VNNI its kernel (`vpmaddubsw`: AVX2, AVX-512) adds the products of stored
neighbours 2i and 2i + 1 along K in 16 bits, with saturation; activations go up to 255. So it is
exact there, and the same everywhere, if and only if |w_2i + w_2i+1| <= 128 in every column: the
bound of `calibration.formats.Format.pair_bound`, which every quantiser keeps while it chooses
integers, and which costs nothing at run time. Unsigned weights would be exact too, but have no VNNI
kernel; ONNX Runtime's `session.x64quantprecision` makes them of signed ones, but not of those that
the branch of an `If` takes from outside.
Weights in groups become `MatMulNBits`, whose activations are quantised to 8 bits in blocks of a row
(`accuracy_level` 4; at level 0 its 8-bit kernel is a hundred times slower); it is exact everywhere.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from medmoe_edge.export.builder import CONTRIB, Builder, initializer, replace_node
from medmoe_edge.export.stored_matrix import StoredMatrix, lazy_tensor


def lower_matmul(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every pair, also inside branches; returns `(model, modified)`."""
    pairs = [
        (node, matrix)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "MatMul" and (matrix := StoredMatrix.behind(node.inputs[1])) is not None
    ]
    peaks: dict[tuple[object, ir.Value], tuple[ir.Value, ir.Value]] = {}
    packed: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # some matrices have several readers
    for node, matrix in pairs:
        build, x, graph, weight = Builder(), node.inputs[0], node.graph, node.inputs[1]
        assert x is not None
        assert weight is not None
        assert graph is not None
        dequantise = weight.producer()
        assert dequantise is not None
        if matrix.group is not None:
            if weight not in packed:
                packed[weight] = _packed(model.graph, dequantise, matrix)
            new = _in_groups(build, x, packed[weight], matrix)
        else:
            if (graph, x) not in peaks:
                peaks[graph, x] = _per_token(build, x)
            scaled, peak = peaks[graph, x]
            y = build.op("DynamicQuantizeMatMul", scaled, *dequantise.inputs, domain=CONTRIB)
            new = build.op("Mul", y, peak)
        replace_node(node, build, new)
        model.graph.opset_imports[CONTRIB] = 1
    if pairs:
        RemoveUnusedNodesPass()(model)
        NameFixPass()(model)  # branches and the graph around them share one name space
    return model, bool(pairs)


def _per_token(build: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x over each token's largest magnitude, and those magnitudes `[..., 1]`."""
    magnitude = build.op("ReduceMax", build.op("Abs", x), build.constant([-1]), keepdims=1)
    peak = build.op("Max", magnitude, build.constant(np.finfo(np.float32).tiny, np.float32))
    return build.op("Div", x, peak), peak


def _packed(
    graph: ir.Graph, dequantise: ir.Node, matrix: StoredMatrix
) -> tuple[ir.Value, ir.Value]:
    """Integers `[N, groups, bytes]` and scales `[N, groups]` as `MatMulNBits` reads them."""
    bits, group, name = matrix.bits, matrix.group, matrix.integers.name
    assert group is not None
    blocks = [matrix.channels, matrix.width // group, group * bits // 8]
    stored = [
        lazy_tensor(
            f"{name}.packed", lambda: matrix.packed(bits).reshape(blocks), ir.DataType.UINT8, blocks
        ),
        lazy_tensor(
            f"{name}.groups.scale", lambda: matrix.scales(group), matrix.scale.dtype, blocks[:2]
        ),
    ]
    inputs = [initializer(tensor) for tensor in stored]
    for value in inputs:
        graph.register_initializer(value)
    per_row = ir.node("Cast", inputs[1:], {"to": int(ir.DataType.FLOAT)})
    graph.insert_before(dequantise, per_row)
    return inputs[0], per_row.outputs[0]


def _in_groups(
    build: Builder, x: ir.Value, packed: tuple[ir.Value, ir.Value], matrix: StoredMatrix
) -> ir.Value:
    return build.op(
        "MatMulNBits",
        *(x, *packed),
        domain=CONTRIB,
        K=matrix.width,
        N=matrix.channels,
        bits=matrix.bits,
        block_size=matrix.group,
        accuracy_level=4,
    )
