"""Checkpoint tensors as lazy ONNX tensors: each is read when it is written, then forgotten."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from medmoe_edge._types import Floats
from medmoe_edge.calibration.stream import check_finite
from medmoe_edge.checkpoint.reader import Checkpoint

CHUNK_BYTES = 2**26  # of fp32 rows in memory at a time


@dataclass(frozen=True)
class Factors:
    """What a tensor is multiplied with: its first axis by `rows`, its last by `columns`."""

    rows: Floats | None = None
    columns: Floats | None = None


class MatrixTensor(ir.LazyTensor):
    """A matrix as MatMul reads it, `[in, out]`, that can also be had row by row of `[out, in]`."""

    def __init__(self, name: str, source: "WeightSource") -> None:
        self.source = source
        shape = ir.Shape(source.checkpoint.names[name].shape[::-1])
        super().__init__(self._whole, ir.DataType.FLOAT, shape=shape, name=name)

    def rows(self) -> Iterator[Floats]:
        """Blocks `[n, in]` of output channels, in order."""
        assert self.name is not None
        return self.source.rows(self.name)

    def _whole(self) -> ir.TensorProtocol:
        assert self.name is not None
        return ir.tensor(np.ascontiguousarray(self.source.array(self.name).T), name=self.name)


class WeightSource:
    """The parameters of a checkpoint in fp32, times the factors that calibration folds in."""

    def __init__(self, checkpoint: Checkpoint, factors: Mapping[str, Factors] | None = None):
        self.checkpoint = checkpoint
        self.factors = factors or {}

    def names_under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""
        names = self.checkpoint.names
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def tensor(self, name: str) -> ir.LazyTensor:
        """One parameter, read only when its values are needed; matrices transposed."""
        if len(self.checkpoint.names[name].shape) == 2:
            return MatrixTensor(name, self)
        return self.untransposed(name)

    def untransposed(self, name: str) -> ir.LazyTensor:
        """One parameter in the checkpoint's own layout, read only when its values are needed."""
        shape = ir.Shape(self.checkpoint.names[name].shape)
        return ir.LazyTensor(partial(self._read, name), ir.DataType.FLOAT, shape=shape, name=name)

    def array(self, name: str) -> Floats:
        """One parameter in the checkpoint's own layout; raises `CheckpointError`."""
        return self._finished(name, self.checkpoint.tensor(name), slice(None))

    def rows(self, name: str) -> Iterator[Floats]:
        """A matrix in blocks of its rows, each as `array` would give it."""
        rows, width = self.checkpoint.names[name].shape
        step = max(CHUNK_BYTES // (4 * width), 1)
        if rows <= step:
            yield self.array(name)
            return
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            yield self._finished(name, self.checkpoint.rows(name, block.start, block.stop), block)

    def _finished(self, name: str, tensor: torch.Tensor, block: slice) -> Floats:
        check_finite(tensor, name)
        array: Floats = tensor.to(torch.float32, copy=True).numpy()
        factors = self.factors.get(name, Factors())
        if factors.rows is not None:
            array *= factors.rows[block].reshape(-1, *[1] * (array.ndim - 1))
        if factors.columns is not None:
            array *= factors.columns
        return array

    def _read(self, name: str) -> ir.TensorProtocol:
        return ir.tensor(self.array(name), name=name)
