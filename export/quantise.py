"""Integers `[K, N]` behind `DequantizeLinear`: how a quantised model is specified.

Plain ONNX, the same numbers for every target. Per output channel the scales are fp32 `[N]`, and
8-bit integers keep `Format.pair_bound`: neighbours 2i and 2i + 1 along K sum to at most 128. In
groups along the input they are stored in fp16 `[K / group, N]` (`block_size` of DequantizeLinear,
opset 21). Lowerings for a target replace the pairs `DequantizeLinear -> MatMul` by what that target
runs fast.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.recorded import FLOAT, Marks, SignatureMaker, is_routed
from medmoe_edge.calibration.quantisers import Format, Quantised
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import initializer, tensor_of
from medmoe_edge.export.weights import MatrixTensor

PARTS = "qkv"
FUSED = re.compile(r"(.*\.attention\.)qkv(\.(?:weight|bias).*)")
CHANNELS_FIRST = (".packed", ".groups.scale")  # as MatMulNBits has them
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StoredMatrix:
    """Integers `[K, N]` with scales `[N]` per output channel or `[K / group, N]` in groups.

    Values are read only when they are asked for.
    """

    integers: ir.TensorProtocol
    scale: ir.TensorProtocol
    group: int | None

    @classmethod
    def behind(cls, weight: ir.Value | None) -> Self | None:
        """What `quantise_weights` stored for a weight; None for one that is not quantised."""
        node = weight.producer() if weight is not None else None
        if node is None or node.op_type != "DequantizeLinear":
            return None
        scale = there(node.inputs[1])
        cast = scale.producer()  # groups' scales are stored in fp16
        if cast is None:
            return cls(tensor_of(node.inputs[0]), tensor_of(scale), None)
        group = node.attributes["block_size"].as_int()
        return cls(tensor_of(node.inputs[0]), tensor_of(cast.inputs[0]), group)

    @property
    def bits(self) -> int:
        """Bits of an integer."""
        return int(self.integers.dtype.bitwidth)

    @property
    def width(self) -> int:
        """Input channels K."""
        return int(self.integers.shape.numpy()[0])

    @property
    def channels(self) -> int:
        """Output channels N."""
        return int(self.integers.shape.numpy()[1])

    def packed(self, bits: int) -> npt.NDArray[np.uint8]:
        """The integers, packed in `bits` each, `[N, K bits / 8]`; no fewer than they have."""
        return pack_rows(self.integers.numpy().T, bits)

    def scales(self, group: int | None) -> Array:
        """Scales `[N, K / group]`, or `[N]` for None; groups may be cut smaller, never joined."""
        if self.group is None:
            scale = self.scale.numpy()  # [N]
            return scale if group is None else np.repeat(scale[:, None], self.width // group, 1)
        return np.repeat(self.scale.numpy().T, self.group // there(group), 1)

    def in_blocks(self, block: int, bits: int, name: str) -> list[ir.LazyTensor]:
        """Integers `[N, blocks, bytes]` and scales `[N, blocks]` as `MatMulNBits` reads them.

        The scales are called by `name`.
        """
        shape, owner = [self.channels, self.width // block, block * bits // 8], self.integers.name
        return [
            lazy_tensor(
                f"{owner}.packed",
                lambda: self.packed(bits).reshape(shape),
                ir.DataType.UINT8,
                shape,
            ),
            lazy_tensor(f"{owner}.{name}", lambda: self.scales(block), self.scale.dtype, shape[:2]),
        ]


def lazy_tensor(
    name: str, make: Callable[[], Array], dtype: ir.DataType, shape: list[int]
) -> ir.LazyTensor:
    """A tensor that `make` computes when it is written."""

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(make()), name=name)

    return ir.LazyTensor(tensor, dtype, shape=ir.Shape(shape), name=name)


def no_values() -> Any:
    """Makes the values of a tensor that stands for a quantised one, of which only the shape is."""
    raise AssertionError("a quantised weight is read as integers")


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
    their marks when they are written, and those of routers and experts that stay floats. Raises
    `ConfigError` for groups that do not fit; weights that a format cannot hold raise
    `CheckpointError` when they are written.
    """
    chosen = [
        (value, found)
        for name, value in model.graph.initializers.items()
        if (found := policy(name)) is not None
    ]
    for value, (form, quantiser) in chosen:
        integers, scale = _Weight(value, form, quantiser, signature).tensors()
        insert_dequantise(model.graph, value, integers, scale)
    if signature is not None:
        _mark_floats(model, signature)
    return model, bool(chosen)


def _mark_floats(model: ir.Model, signature: SignatureMaker) -> None:
    """Mark routers and experts that are floats, as the graph has them, when they are written."""
    for name, value in model.graph.initializers.items():
        source = tensor_of(value)
        if source.dtype == ir.DataType.FLOAT and is_routed(name, source.shape.numpy()):
            read = partial(_read_marked, source, name, signature)
            shape = list(source.shape.numpy())
            value.const_value = lazy_tensor(name, read, ir.DataType.FLOAT, shape)


def _read_marked(source: ir.TensorProtocol, name: str, signature: SignatureMaker) -> Array:
    values: Array = source.numpy()
    rows = np.ascontiguousarray(values.T)  # [N, K]
    marks = Marks.of(rows, 1)
    signature.keep(name, FLOAT, rows.shape[1], marks, marks)
    return values


class _Weight:
    """Reads and quantises the weight when its integers are written; keeps scales for later."""

    def __init__(
        self,
        value: ir.Value,
        form: Format,
        quantiser: Quantiser,
        signature: SignatureMaker | None,
    ) -> None:
        self.name, self.source = str(value.name), tensor_of(value)
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
        parts, marks, stored = [], [], []
        for rows in self._rows():
            parts.append(self._quantised(rows))
            if self.signature is not None:
                groups = parts[-1].scale.shape[1]
                marks.append(Marks.of(rows, groups))
                stored.append(Marks.of(parts[-1].dequantise(), groups))
        if self.signature is not None:
            both = Marks.joined(marks), Marks.joined(stored)
            self.signature.keep(self.name, self.format.bits, self.shape[0], *both)
        self.scale = self._stored(np.concatenate([part.scale for part in parts]))
        integers = np.concatenate([part.integers for part in parts])  # [N, K]
        _, kind = INTEGERS[self.format.bits]
        return ir.tensor(np.ascontiguousarray(integers.T).astype(kind, copy=False))

    def _scales(self) -> ir.TensorProtocol:
        if self.scale is None:
            self._integers()
        return ir.tensor(there(self.scale))

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


def _part(name: str, tensor: ir.TensorProtocol, axis: int, place: int) -> ir.TensorProtocol:
    shape = list(tensor.shape.numpy())
    shape[axis] //= len(PARTS)

    def part() -> Array:
        return np.split(tensor.numpy(), len(PARTS), axis)[place]

    return lazy_tensor(name, part, tensor.dtype, shape)
