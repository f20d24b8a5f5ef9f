"""The routed experts of a PyTorch model in expert slots, found through a step's table.

The bytes of a slot are those of the bundle. The plugin's kernels read them as they are; what they
have no kernel for is dequantised whenever it runs, one matrix at a time. Biases, and what is so
small that a bundle keeps it inside its graph, stay on the device.

An expert that is absent runs with scales of zero, which costs no branch: what it gives is not kept,
and nothing in its place leaves later layers a good guess at what they will choose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.runtimes.paging.expert_file import Extent
from medmoe_edge.runtimes.paging.store import Expert
from medmoe_edge.runtimes.slots.memory import Slot
from medmoe_edge.runtimes.slots.slots import ABSENT, Table
from medmoe_edge.runtimes.torch.weights import BundleWeights, Stored, dequantise

if TYPE_CHECKING:
    from medmoe_edge.runtimes.torch.kernels import StoredLinear

Part = Callable[[Tensor], Tensor]  # from a slot's bytes to one of the tensors in them


class SlotLinear(nn.Module):
    """In the place of `nn.Linear`: dequantises its matrix whenever it runs.

    `parts` are the matrix as it is stored, its scale if it has one, and the bias if there is one.
    """

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantised, self.bits, self.dtype = stored.scale is not None, stored.bits, dtype
        self.parts: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        matrix, *others = self.parts
        scale = others.pop(0) if self.quantised else None
        weight = dequantise(matrix, scale, self.bits).T.to(self.dtype)
        return nn.functional.linear(x, weight, *others)


class SlotExperts:
    """Gives the experts of a model that is still on `meta` modules that compute from slots.

    With `kernels` these are the plugin's for the formats that they take; those need Triton.
    """

    def __init__(
        self,
        model: MedMoE,
        weights: BundleWeights,
        extents: Mapping[Expert, Extent],
        slots: Sequence[Slot],
        dtype: torch.dtype,
        *,
        kernels: bool,
    ) -> None:
        self._slots = [torch.as_tensor(slot) for slot in slots]
        self._matrices: dict[Expert, list[_Matrix]] = {expert: [] for expert in extents}
        self._bound: dict[Expert, int] = dict.fromkeys(extents, ABSENT)
        for (index, number), extent in extents.items():
            layer = model.config.moe_layers[index]
            expert = model.moe_layer(layer).experts[number]
            for name in [name for name, _ in expert.named_children()]:
                full_name = f"decoder.layers.{layer}.ffn.experts.{number}.{name}"
                matrix = _Matrix.of(full_name, weights, extent, dtype, kernels)
                matrix.bind_nothing(self._slots[0])
                expert.set_submodule(name, matrix.linear)
                self._matrices[index, number].append(matrix)

    def bind(self, table: Table) -> None:
        """Have every expert compute from its slot in the table."""
        for expert, before in self._bound.items():
            slot = int(table[expert])
            if slot == before:
                continue
            self._bound[expert] = slot
            for matrix in self._matrices[expert]:
                if slot == ABSENT:
                    matrix.bind_nothing(self._slots[0])
                else:
                    matrix.bind(self._slots[slot])


@dataclass
class _Matrix:
    """A matrix of an expert: the module that computes with it, and how to find it in a slot."""

    linear: "StoredLinear | SlotLinear"
    parts: list[Part]  # the matrix, and its scale if it has one
    bias: list[Tensor]

    @classmethod
    def of(
        cls, name: str, weights: BundleWeights, extent: Extent, dtype: torch.dtype, kernels: bool
    ) -> Self:
        stored = weights.stored(f"{name}.weight")
        parts = [_part(tensor, extent, weights) for tensor in stored[:2] if tensor is not None]
        has_bias = f"{name}.bias" in weights
        bias = [weights.floats(f"{name}.bias").to(dtype)] if has_bias else []
        if not (kernels and stored.has_kernel):
            return cls(SlotLinear(stored, dtype), parts, bias)
        from medmoe_edge.runtimes.torch.kernels import StoredLinear  # needs Triton

        nothing = torch.empty(0)  # until it is bound
        return cls(StoredLinear(nothing, nothing, None, dtype), parts, bias)

    def bind(self, slot: Tensor) -> None:
        """Compute from this slot."""
        self.linear.parts = [*(part(slot) for part in self.parts), *self.bias]

    def bind_nothing(self, slot: Tensor) -> None:
        """Compute with zero, whatever the slot holds."""
        matrix, *scale = (part(slot) for part in self.parts)
        zeros = [torch.zeros_like(each) for each in scale]
        if not scale:
            matrix = matrix.new_zeros(()).expand(matrix.shape)
        self.linear.parts = [matrix, *zeros, *self.bias]


def _part(tensor: ir.TensorProtocol, extent: Extent, weights: BundleWeights) -> Part:
    """How to find a tensor in a slot that holds its expert."""
    if not isinstance(tensor, ir.ExternalTensor):
        resident = weights.tensor(tensor)
        return lambda slot: resident
    begin = (tensor.offset or 0) - extent.offset
    end, shape = begin + tensor.nbytes, tensor.shape.numpy()
    dtype = torch.from_numpy(np.empty(0, tensor.dtype.numpy())).dtype

    def part(slot: Tensor) -> Tensor:
        own = slot[begin:end]
        if begin % dtype.itemsize:  # a view would not be aligned
            own = own.clone()
        return own.view(dtype).view(shape)

    return part
