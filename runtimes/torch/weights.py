"""A bundle's parameters as PyTorch's tensors, read from its own graphs one by one."""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.export.stored import GROUP_SCALE, PACKED, SCALE, StoredWeights
from medmoe_edge.kernels.variant import TILES, group_of


class Stored(NamedTuple):
    """A parameter as it lies in a bundle: floats, or integers of so many `bits` and their scale.

    Integers are int8 `[K, N]` with scales `[N]`, or unsigned and packed along K as `[N, groups,
    bytes]`, the first lowest, zero point in the middle, with scales `[N, groups]`.
    """

    matrix: ir.TensorProtocol
    scale: ir.TensorProtocol | None = None
    bits: int = 8

    @property
    def has_kernel(self) -> bool:
        """Whether the plugin's kernels take it as it is stored."""
        shape = self.matrix.shape.numpy()
        if self.scale is None or len(shape) == 2:
            return self.scale is not None
        return self.bits == 4 and group_of(shape) in TILES


class BundleWeights:
    """The weights under the checkpoint's names, on a device."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        self.bundle, self.device = bundle, device
        self._vision = StoredWeights(bundle.path("vision.onnx"))
        self._decoder = StoredWeights(bundle.path("decoder.onnx"))
        self._names = {*self._vision.names_under(""), *self._decoder.names_under("")}

    def __contains__(self, name: str) -> bool:
        """Whether the graphs read it."""
        return name in self._names

    def floats(self, name: str) -> Tensor:
        """A parameter in fp32, matrices `[in, out]` as the graphs have them, maybe dequantised."""
        matrix, scale, bits = self.stored(name)
        scales = None if scale is None else self.tensor(scale)
        return dequantise(self.tensor(matrix), scales, bits)

    def stored(self, name: str) -> Stored:
        """A parameter as the graphs store it; raises `BundleError` where its scale is missing."""
        weights = self._decoder if name.startswith("decoder.") else self._vision
        tensors, packed = weights.tensors, f"{name}{PACKED}"
        if weights.quantised(name) is None:
            return Stored(tensors[name])
        if packed in tensors:
            return Stored(tensors[packed], tensors[f"{name}{GROUP_SCALE}"], weights.bits[packed])
        return Stored(tensors[name], tensors[f"{name}{SCALE}"])

    def has_kernel(self, name: str) -> bool:
        """Whether the plugin's kernels take this weight of the decoder as it is stored."""
        return name.startswith("decoder.") and name in self and self.stored(name).has_kernel

    def for_kernel(self, name: str) -> tuple[Tensor, Tensor]:
        """The bytes and scales of a weight that `has_kernel`, see `export.plugin`."""
        matrix, scale, _ = self.stored(name)
        assert scale is not None
        return self.tensor(matrix), self.tensor(scale)

    def tensor(self, tensor: ir.TensorProtocol) -> Tensor:
        """What is stored, on the device."""
        return torch.from_numpy(np.array(tensor.numpy())).to(self.device)  # the file is mapped


def dequantise(matrix: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """What is `Stored` in fp32, a matrix as `[K, N]`."""
    if scale is None:
        return matrix.float()
    if scale.ndim == 1:
        return matrix.float() * scale
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=matrix.device)
    integers = (matrix[..., None] >> shifts) & (2**bits - 1)  # [N, groups, bytes, 8 / bits]
    centred = integers.flatten(2).float() - 2 ** (bits - 1)  # [N, groups, group]
    weight: Tensor = centred * scale.float()[..., None]
    return weight.flatten(1).T.contiguous()
