"""Checkpoint tensors as lazy ONNX tensors: each is read when it is written, then forgotten."""

from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from medmoe_edge.checkpoint import Checkpoint
from medmoe_edge.errors import CheckpointError


class WeightSource:
    """The parameters of a checkpoint, matrices transposed to `[in, out]` as MatMul reads them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def names_under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""
        names = self.checkpoint.names
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def tensor(self, name: str) -> ir.LazyTensor:
        """One parameter in fp32, read only when its values are needed."""
        shape = tuple(self.checkpoint.names[name].shape)
        return ir.LazyTensor(
            partial(self._read, name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(shape[::-1] if len(shape) == 2 else shape),
            name=name,
        )

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """One parameter in fp32, in the checkpoint's own layout; raises `CheckpointError`."""
        tensor = self.checkpoint.tensor(name).to(torch.float32)
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"The tensor {name} holds values that are infinite or no numbers.",
                "Its training diverged: use an earlier checkpoint.",
            )
        return tensor.numpy()

    def _read(self, name: str) -> ir.TensorProtocol:
        array = self.array(name)
        return ir.tensor(np.ascontiguousarray(array.T if array.ndim == 2 else array), name=name)
