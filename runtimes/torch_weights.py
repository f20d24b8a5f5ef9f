"""A bundle's parameters as PyTorch's tensors, read from its own graphs one by one."""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from medmoe_edge.bundle import Bundle
from medmoe_edge.export.plugin.variant import TILES, group_of
from medmoe_edge.export.stored import GROUP_SCALE, PACKED, SCALE, StoredWeights


class BundleWeights:
    """The weights under the checkpoint's names, on a device."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        self.device = device
        self._vision = StoredWeights(bundle.path("vision.onnx"))
        self._decoder = StoredWeights(bundle.path("decoder.onnx"))
        self._names = {*self._vision.names_under(""), *self._decoder.names_under("")}

    def __contains__(self, name: str) -> bool:
        """Whether the graphs read it."""
        return name in self._names

    def floats(self, name: str) -> Tensor:
        """A parameter in fp32, matrices `[in, out]` as the graphs have them, maybe dequantised."""
        stored = self._decoder if name.startswith("decoder.") else self._vision
        quantised = stored.quantised(name)
        if quantised is None:
            return self._tensor(stored.tensor(name)).float()
        integers, scale = (self._tensor(tensor).float() for tensor in quantised)
        if scale.ndim == 1:
            return integers * scale
        groups = integers.view(len(scale), -1, scale.shape[1])  # [K / group, group, N]
        return (groups * scale[:, None]).flatten(0, 1)

    def has_kernel(self, name: str) -> bool:
        """Whether the plugin's kernels take this weight of the decoder as it is stored."""
        return self._stored(name) is not None

    def for_kernel(self, name: str) -> tuple[Tensor, Tensor]:
        """The bytes and scales of a weight that `has_kernel`, see `export.plugin`."""
        stored = self._stored(name)
        assert stored is not None
        matrix, scale = stored
        return self._tensor(matrix), self._tensor(scale)

    def _stored(self, name: str) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
        tensors, bits = self._decoder.tensors, self._decoder.bits
        if (scale := tensors.get(f"{name}{SCALE}")) is not None:
            return tensors[name], scale
        packed = tensors.get(f"{name}{PACKED}")
        if packed is None or bits[f"{name}{PACKED}"] != 4:
            return None
        if group_of(packed.shape.numpy()) not in TILES:
            return None
        return packed, tensors[f"{name}{GROUP_SCALE}"]

    def _tensor(self, tensor: ir.TensorProtocol) -> Tensor:
        array = tensor.numpy()
        if tensor.dtype in (ir.DataType.INT2, ir.DataType.INT4):  # which PyTorch does not know
            array = array.astype(np.int8)
        return torch.from_numpy(np.array(array)).to(self.device)  # a copy: the file is mapped
