"""A matrix behind `DequantizeLinear`, as lowerings read it: the integers of every other target.

Storing an integer in more bits, or a scale for several smaller groups, changes no weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from medmoe_edge.export.builder import tensor_of

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
        scale = node.inputs[1]
        assert scale is not None
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
        assert group is not None
        return np.repeat(self.scale.numpy().T, self.group // group, 1)


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
