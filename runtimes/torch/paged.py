"""A portable bundle in PyTorch with its routed experts in slots, inside a memory budget.

Only the routed experts are paged; all else is as in `bundle.py`. On CUDA slots lie in the GPU's
memory, filled by copies that run beside the compute (`slots/memory_cuda.py`). On the CPU, where
memory is one, experts are read from the bundle straight into their slots.

The bytes of a slot are those of the bundle. The plugin's kernels read them as they are; what they
have no kernel for is dequantised whenever it runs, one matrix at a time. Biases, and what is so
small that a bundle keeps it inside its graph, stay on the device.

An expert that is absent runs with scales of zero, which costs no branch: what it gives is not kept,
and nothing in its place leaves later layers a good guess at what they will choose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.models.decoder import route
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.runtimes.base import Cache, Step, check_room
from medmoe_edge.runtimes.paging.expert_file import ExpertFile, Extent
from medmoe_edge.runtimes.paging.pager import Expert
from medmoe_edge.runtimes.slots.memory import CpuMemory, DeviceMemory, Slot
from medmoe_edge.runtimes.slots.replay import Chosen, SlotRequests
from medmoe_edge.runtimes.slots.slots import ABSENT, Table
from medmoe_edge.runtimes.torch.bundle import BundleWeights, Stored, TorchBundleRuntime, dequantise
from medmoe_edge.runtimes.torch.eager import TorchDevice

if TYPE_CHECKING:
    from medmoe_edge.kernels.launch import StoredLinear

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
        from medmoe_edge.kernels.launch import StoredLinear  # needs Triton

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


class PagedTorchRuntime(TorchBundleRuntime):
    """The bundle with its routed experts in `budget` bytes, or as text: "1500MB", "50%".

    A step computes the same bits as the resident runtime. Where its tokens need more experts than
    fit, it is cut, and computes what the resident runtime does of the parts one after another.
    `drop_pages` is that of `ExpertFile`. Raises what that raises, `InputError` for a budget that is
    too small, and `BundleError` for a bundle that cannot be paged.
    """

    def __init__(
        self,
        bundle: Bundle,
        budget: int | str,
        device: TorchDevice = "cuda",
        dtype: torch.dtype | None = None,
        *,
        drop_pages: bool = False,
    ) -> None:
        self._budget, self._drop_pages = budget, drop_pages
        super().__init__(bundle, device, dtype)

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; a request begins here."""
        return self.requests.begin(super().encode_image, pixels)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S.

        Raises what reading an expert raises; the cache is then as it was.
        """
        check_room(cache, len(embeds))
        return self.requests.step(embeds, cache)

    def paging(self) -> dict[str, Any]:
        """The report on what ran since the last one or the image: see `SlotRequests`."""
        return self.requests.report()

    def _load(self, weights: BundleWeights) -> None:
        file = ExpertFile(weights.bundle, drop_pages=self._drop_pages)
        memory = memory_of(self.device)
        self.requests = SlotRequests(weights.bundle, file, memory, self._budget, self._run)
        self._bound = SlotExperts(
            *(self.model, weights, file.extents, self.requests.slots.store.slots, self.dtype),
            kernels=self.half,
        )
        super()._load(weights)

    def _run(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        self._bound.bind(table)
        step = super().step(embeds, cache)
        logits = torch.from_numpy(step.router_logits).to(self.device)
        assert self.config.moe is not None
        _, chosen = route(logits, self.config.moe.top_k)  # as its layers did, to the bit
        return step, chosen.cpu().numpy()


def memory_of(device: TorchDevice) -> DeviceMemory:
    """The memory of a device that PyTorch computes on."""
    if device == "cpu":
        return CpuMemory()
    from medmoe_edge.runtimes.slots.memory_cuda import CudaMemory

    return CudaMemory()
