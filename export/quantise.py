"""Pass: chosen weights become int8 behind `DequantizeLinear`.

This is the quantised model's specification: plain ONNX, the same bytes for every target. Lowerings
for a target replace the pairs `DequantizeLinear -> MatMul` by what that target runs fast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from medmoe_edge.calibration.int8 import quantise_per_channel
from medmoe_edge.export.builder import initializer

Policy = Callable[[str], bool]


def decoder_policy(name: str) -> bool:
    """Every matrix of the decoder; routers and coefficients stay fp32, they decide who runs."""
    return name.endswith(".weight") and not any(
        part in name for part in ("norm.", ".router.", ".coefficient.")
    )


def quantise_weights(model: ir.Model, policy: Policy) -> tuple[ir.Model, bool]:
    """Quantise the initializers that `policy` names, lazily; returns `(model, modified)`."""
    chosen = [value for name, value in model.graph.initializers.items() if policy(name)]
    for value in chosen:
        _quantise(model.graph, value)
    return model, bool(chosen)


@dataclass
class _Lazy:
    """Reads the weight once: the integers when they are written, the scales kept for later."""

    source: ir.TensorProtocol
    axis: int
    scale: np.ndarray | None = field(default=None)

    def integers(self) -> ir.TensorProtocol:
        integers, self.scale = quantise_per_channel(self.source.numpy(), self.axis)
        return ir.tensor(integers)

    def scales(self) -> ir.TensorProtocol:
        if self.scale is None:
            self.integers()
        assert self.scale is not None
        return ir.tensor(self.scale)


def _quantise(graph: ir.Graph, value: ir.Value) -> None:
    source = value.const_value
    assert source is not None
    assert value.name is not None
    shape = [int(size) for size in source.shape.numpy()]
    axis = _channel_axis(value)
    lazy = _Lazy(source, axis)
    name = value.name
    integers = ir.LazyTensor(lazy.integers, ir.DataType.INT8, shape=ir.Shape(shape), name=name)
    scales = ir.LazyTensor(
        lazy.scales, ir.DataType.FLOAT, shape=ir.Shape([shape[axis]]), name=f"{name}.scale"
    )
    del graph.initializers[name]
    inputs = [initializer(tensor) for tensor in (integers, scales)]
    for stored in inputs:
        graph.register_initializer(stored)
    node = ir.node("DequantizeLinear", inputs, {"axis": axis})
    node.outputs[0].name = f"{name}.float"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
    graph.insert_before(graph[0], node)
    value.replace_all_uses_with(node.outputs[0])


def _channel_axis(value: ir.Value) -> int:
    """Convolutions and transposed Gemm weights keep output channels first, MatMul's last."""
    user = next(iter(value.uses())).node
    transposed = user.op_type == "Gemm" and user.attributes.get_int("transB") == 1
    return 0 if user.op_type == "Conv" or transposed else 1
