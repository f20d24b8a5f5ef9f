"""Integers `[K, N]` behind `DequantizeLinear`: how a quantised model is specified.

Plain ONNX, the same numbers for every target. Per output channel the scales are fp32 `[N]`, and
8-bit integers keep `Format.pair_bound`: neighbours 2i and 2i + 1 along K sum to at most 128. In
groups along the input they are stored in fp16 `[K / group, N]` (`block_size` of DequantizeLinear,
opset 21). Lowerings for a target replace the pairs `DequantizeLinear -> MatMul` by what that target
runs fast.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from medmoe_edge.export.builder import initializer

INTEGERS: dict[int, tuple[ir.DataType, Any]] = {
    2: (ir.DataType.INT2, ml_dtypes.int2),
    4: (ir.DataType.INT4, ml_dtypes.int4),
    8: (ir.DataType.INT8, np.int8),
}


def insert_dequantise(
    graph: ir.Graph, value: ir.Value, integers: ir.TensorProtocol, scale: ir.TensorProtocol
) -> None:
    """Put `DequantizeLinear` of integers `[K, N]` in the place of the initializer `value`.

    Scales are `[N]`, or `[K / group, N]` in groups.
    """
    name, inputs = str(value.name), [initializer(integers), initializer(scale)]
    del graph.initializers[name]
    for stored in inputs:
        graph.register_initializer(stored)
    shape = integers.shape.numpy()
    nodes, attributes = [], {"axis": 1}
    if len(scale.shape) > 1:
        cast = ir.node("Cast", [inputs[1]], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = f"{scale.name}.float"
        inputs[1] = cast.outputs[0]
        nodes.append(cast)
        attributes = {"axis": 0, "block_size": shape[0] // scale.shape.numpy()[0]}
    nodes.append(ir.node("DequantizeLinear", inputs, attributes))
    result = nodes[-1].outputs[0]
    result.name = f"{name}.float"
    result.dtype, result.shape = ir.DataType.FLOAT, ir.Shape(shape)
    graph.insert_before(graph[0], nodes)
    value.replace_all_uses_with(result)
