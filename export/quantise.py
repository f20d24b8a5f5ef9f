"""Pass: chosen weights become integers behind `DequantizeLinear`.

This is the quantised model's specification: plain ONNX, the same numbers for every target. Per
output channel the scales are fp32 `[N]`; in groups along the input they are stored in fp16
`[K / group, N]` (`block_size` of ONNX's DequantizeLinear, opset 21). Lowerings for a target replace
the pairs `DequantizeLinear -> MatMul` by what that target runs fast.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from medmoe_edge.calibration.formats import Floats, Format, Quantised
from medmoe_edge.export.builder import initializer
from medmoe_edge.export.weights import MatrixTensor

Quantiser = Callable[[Floats], Quantised]
"""Quantises rows `[n, K]` of one weight, which may come in several blocks."""

Policy = Callable[[str], tuple[Format, Quantiser] | None]
"""How to store the weight of a name; None leaves it as it is."""

INTEGERS: dict[int, tuple[ir.DataType, Any]] = {
    2: (ir.DataType.INT2, ml_dtypes.int2),
    4: (ir.DataType.INT4, ml_dtypes.int4),
    8: (ir.DataType.INT8, np.int8),
}


def quantise_weights(model: ir.Model, policy: Policy) -> tuple[ir.Model, bool]:
    """Quantise the initializers that `policy` wants, lazily; returns `(model, modified)`."""
    chosen = [
        (value, found)
        for name, value in model.graph.initializers.items()
        if (found := policy(name)) is not None
    ]
    for value, (form, quantiser) in chosen:
        _quantise(model.graph, value, form, quantiser)
    return model, bool(chosen)


class _Weight:
    """Reads and quantises the weight when its integers are written; keeps scales for later."""

    def __init__(
        self, source: ir.TensorProtocol, axis: int, form: Format, quantiser: Quantiser
    ) -> None:
        self.source, self.axis, self.format, self.quantiser = source, axis, form, quantiser
        self.shape = [int(size) for size in source.shape.numpy()]
        self.scale: Floats | None = None  # [N, G]

    def tensors(self, name: str) -> list[ir.LazyTensor]:
        """Integers and scales."""
        channels = self.shape[self.axis]
        groups = self.format.groups(math.prod(self.shape) // channels)
        kind, shape = ir.DataType.FLOAT, [channels]
        if self.format.group is not None:
            kind, shape = ir.DataType.FLOAT16, [groups, channels]
        integers, _ = INTEGERS[self.format.bits]
        return [
            ir.LazyTensor(self._integers, integers, shape=ir.Shape(self.shape), name=name),
            ir.LazyTensor(self._scales, kind, shape=ir.Shape(shape), name=f"{name}.scale"),
        ]

    def _integers(self) -> ir.TensorProtocol:
        parts = [self.quantiser(rows) for rows in self._rows()]
        self.scale = np.concatenate([part.scale for part in parts])
        integers = np.concatenate([part.integers for part in parts])  # [N, K]
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        own = np.moveaxis(integers.reshape(-1, *rest), 0, self.axis)
        _, kind = INTEGERS[self.format.bits]
        return ir.tensor(np.ascontiguousarray(own).astype(kind, copy=False))

    def _scales(self) -> ir.TensorProtocol:
        if self.scale is None:
            self._integers()
        assert self.scale is not None
        if self.format.group is None:
            return ir.tensor(self.scale[:, 0])
        return ir.tensor(np.ascontiguousarray(self.scale.T.astype(np.float16)))

    def _rows(self) -> Iterator[Floats]:
        if isinstance(self.source, MatrixTensor):
            yield from self.source.rows()
        else:
            array = np.moveaxis(self.source.numpy(), self.axis, 0)
            yield np.ascontiguousarray(array.reshape(len(array), -1))


def _quantise(graph: ir.Graph, value: ir.Value, form: Format, quantiser: Quantiser) -> None:
    source, name = value.const_value, value.name
    assert source is not None
    assert name is not None
    weight = _Weight(source, _channel_axis(value), form, quantiser)
    del graph.initializers[name]
    inputs = [initializer(tensor) for tensor in weight.tensors(name)]
    for stored in inputs:
        graph.register_initializer(stored)
    nodes, attributes = [], {"axis": weight.axis}
    if form.group is not None:
        cast = ir.node("Cast", [inputs[1]], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = f"{name}.scale.float"
        inputs[1] = cast.outputs[0]
        nodes.append(cast)
        attributes = {"axis": 0, "block_size": form.group}
    nodes.append(ir.node("DequantizeLinear", inputs, attributes))
    result = nodes[-1].outputs[0]
    result.name = f"{name}.float"
    result.dtype, result.shape = ir.DataType.FLOAT, ir.Shape(weight.shape)
    graph.insert_before(graph[0], nodes)
    value.replace_all_uses_with(result)


def _channel_axis(value: ir.Value) -> int:
    """Convolutions and transposed Gemm weights keep output channels first, MatMul's last."""
    user = next(iter(value.uses())).node
    transposed = user.op_type == "Gemm" and user.attributes.get_int("transB") == 1
    return 0 if user.op_type == "Conv" or transposed else 1
