"""Integers `[K, N]` behind `DequantizeLinear`: how a quantised model is specified.

Plain ONNX, the same numbers for every target. Per output channel the scales are fp32 `[N]`, and
8-bit integers keep `Format.pair_bound`: neighbours 2i and 2i + 1 along K sum to at most 128. In
groups along the input they are stored in fp16 `[K / group, N]` (`block_size` of DequantizeLinear,
opset 21). Lowerings for a target replace the pairs `DequantizeLinear -> MatMul` by what that target
runs fast.
"""

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medmoe_edge._types import Floats
from medmoe_edge.bundle.signature import Marks, SignatureMaker
from medmoe_edge.calibration.quantisers import Format, Quantised
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import initializer
from medmoe_edge.export.weights import MatrixTensor

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


Quantiser = Callable[[Floats], Quantised]
"""Quantises rows `[n, K]` of one weight, which may come in several blocks."""

Policy = Callable[[str], tuple[Format, Quantiser] | None]
"""How to store the weight of a name; None leaves it as it is."""


def quantise_weights(
    model: ir.Model, policy: Policy, signature: SignatureMaker | None = None
) -> tuple[ir.Model, bool]:
    """Quantise the initializers that `policy` wants, lazily; returns `(model, modified)`.

    They must be matrices `[K, N]` as MatMul reads them, the formats symmetric; `signature` gets
    their marks when they are written. Raises `ConfigError` for groups that do not fit; weights that
    a format cannot hold raise `CheckpointError` when they are written.
    """
    chosen = [
        (value, found)
        for name, value in model.graph.initializers.items()
        if (found := policy(name)) is not None
    ]
    for value, (form, quantiser) in chosen:
        integers, scale = _Weight(value, form, quantiser, signature).tensors()
        insert_dequantise(model.graph, value, integers, scale)
    return model, bool(chosen)


class _Weight:
    """Reads and quantises the weight when its integers are written; keeps scales for later."""

    def __init__(
        self,
        value: ir.Value,
        form: Format,
        quantiser: Quantiser,
        signature: SignatureMaker | None,
    ) -> None:
        assert value.const_value is not None
        self.name, self.source = str(value.name), value.const_value
        self.format, self.quantiser, self.signature = form, quantiser, signature
        self.shape = self.source.shape.numpy()  # (K, N)
        self.scale: npt.NDArray[Any] | None = None  # as stored

    def tensors(self) -> tuple[ir.LazyTensor, ir.LazyTensor]:
        """Integers and scales."""
        width, channels = self.shape
        kind, shape = ir.DataType.FLOAT, [channels]
        if self.format.group is not None:
            kind, shape = ir.DataType.FLOAT16, [self.format.groups(width), channels]
        integers, _ = INTEGERS[self.format.bits]
        return (
            ir.LazyTensor(self._integers, integers, shape=ir.Shape(self.shape), name=self.name),
            ir.LazyTensor(self._scales, kind, shape=ir.Shape(shape), name=f"{self.name}.scale"),
        )

    def _integers(self) -> ir.TensorProtocol:
        parts, marks = [], []
        for rows in self._rows():
            parts.append(self._quantised(rows))
            marks.append(Marks.of(rows, parts[-1].scale.shape[1]))
        if self.signature is not None:
            width = self.shape[0]
            self.signature.keep(self.name, self.format.bits, width, Marks.joined(marks))
        self.scale = self._stored(np.concatenate([part.scale for part in parts]))
        integers = np.concatenate([part.integers for part in parts])  # [N, K]
        _, kind = INTEGERS[self.format.bits]
        return ir.tensor(np.ascontiguousarray(integers.T).astype(kind, copy=False))

    def _scales(self) -> ir.TensorProtocol:
        if self.scale is None:
            self._integers()
        assert self.scale is not None
        return ir.tensor(self.scale)

    def _quantised(self, rows: Floats) -> Quantised:
        try:
            return self.quantiser(rows)
        except CheckpointError as error:  # it knows the numbers, not their name
            raise CheckpointError(f"{self.name}: {error.what}", error.remedy) from error

    def _stored(self, scale: Floats) -> npt.NDArray[Any]:
        if self.format.group is None:
            stored: npt.NDArray[Any] = scale[:, 0]  # [N]
        else:
            with np.errstate(over="ignore"):  # seen below
                stored = np.ascontiguousarray(scale.T.astype(np.float16))  # [K / group, N]
        if not (np.isfinite(stored).all() and stored.all()):
            raise CheckpointError(
                f"{self.name} would get scales that are 0 or not finite.",
                "Check the checkpoint: its weights may have diverged.",
            )
        return stored

    def _rows(self) -> Iterator[Floats]:
        if isinstance(self.source, MatrixTensor):
            yield from self.source.rows()
        else:
            yield np.ascontiguousarray(self.source.numpy().T)
