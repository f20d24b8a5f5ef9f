"""A portable bundle in PyTorch with its routed experts in slots, inside a memory budget.

Only the routed experts are paged; all else is as in `bundle.py`. On CUDA slots lie in the GPU's
memory, filled by copies that run beside the compute (`CudaMemory`). On the CPU, where
memory is one, experts are read from the bundle straight into their slots.

The bytes of a slot are those of the bundle. The plugin's kernels read them as they are; what they
have no kernel for is dequantised whenever it runs, one matrix at a time. Biases, and what is so
small that a bundle keeps it inside its graph, stay on the device.

An expert that is absent runs with scales of zero, which costs no branch: what it gives is not kept,
and nothing in its place leaves later layers a good guess at what they will choose.
"""

import mmap
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import BundleError, ResourceError, shown_bytes
from medmoe_edge.models.decoder import route
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.runtimes.base import Cache, Step, check_room
from medmoe_edge.runtimes.paging.pager import Bytes, Expert, ExpertFile, Extent
from medmoe_edge.runtimes.slots.slots import (
    ABSENT,
    Chosen,
    CpuBuffer,
    CpuMemory,
    DeviceMemory,
    Event,
    Kind,
    SlotPools,
    SlotRequests,
    Table,
)
from medmoe_edge.runtimes.torch.bundle import BundleWeights, Stored, TorchBundleRuntime, dequantise
from medmoe_edge.runtimes.torch.eager import TorchDevice

if TYPE_CHECKING:
    from medmoe_edge.kernels.launch import StoredLinear

ALIGNED = 64  # bytes: where a slot begins, so that its weights can be read as they are

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

    `slots` `[count, bytes]` are all slots. With `kernels` the modules are the plugin's for the
    formats that they take; those need Triton.
    """

    def __init__(
        self,
        model: MedMoE,
        weights: BundleWeights,
        extents: Mapping[Expert, Extent],
        slots: Tensor,
        dtype: torch.dtype,
        *,
        kernels: bool,
    ) -> None:
        self._slots = slots
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
        if "experts" in weights.bundle.manifest["quantisation"]:
            raise BundleError(
                f"{weights.bundle.name} holds experts as deltas, which torch does not page.",
                "Leave the memory budget out, or page them with --runtime onnxruntime.",
            )
        file = ExpertFile(weights.bundle, drop_pages=self._drop_pages)
        size = -(-max(file.sizes.values()) // ALIGNED) * ALIGNED
        pools = SlotPools(memory_of(self.device), [Kind("experts", "uint8", (size,), size)])
        self.requests = SlotRequests(weights.bundle, file, pools, self._budget, self._run)
        self._bound = SlotExperts(
            *(self.model, weights, file.extents),
            *(_rows(pools, self.device), self.dtype),
            kernels=self.half,
        )
        super()._load(weights)

    def _run(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        self._bound.bind(table)
        step = super().step(embeds, cache)
        logits = torch.from_numpy(step.router_logits).to(self.device)
        moe = there(self.config.moe)
        _, chosen = route(logits, moe.top_k, rows=moe.own_rows)  # as its layers did, to the bit
        return step, chosen.cpu().numpy()


def memory_of(device: TorchDevice) -> DeviceMemory:
    """The memory of a device that PyTorch computes on."""
    return CpuMemory() if device == "cpu" else CudaMemory()


def _rows(pools: SlotPools, device: TorchDevice) -> Tensor:
    """The slots of pools with one kind, as a tensor `[count, bytes]`."""
    (pool,) = pools.pools
    if isinstance(pool, CudaBuffer):
        pool = pool.tensor
    elif device == "cuda":  # unified: the GPU reads the host's
        pool = cuda_bytes(pool.ctypes.data, pool.nbytes)
    else:
        pool = torch.from_numpy(pool.array if isinstance(pool, CpuBuffer) else pool)
    rows: Tensor = pool.view(-1, pools.slot_bytes)
    return rows


class CudaMemory:
    """Memory of the current CUDA device, through PyTorch.

    Copies run on a stream of their own from page-locked host memory. Written against PyTorch's and
    CUDA's documentation; there was no GPU to execute it on.
    """

    def __init__(self) -> None:
        self.unified = bool(torch.cuda.get_device_properties("cuda").is_integrated)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def zeros(self, size: int) -> "CudaBuffer":
        """So many bytes, all zero; raises `ResourceError`."""
        try:
            return CudaBuffer(torch.zeros(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"The GPU has no {shown_bytes(size)} of memory for experts.",
                "Give a smaller memory budget.",
            ) from error

    def pinned(self, size: int) -> Bytes:
        """Zeros on the host, page-locked; raises `ResourceError`.

        PyTorch's own would be rounded up to a power of two.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        try:
            array = np.frombuffer(mmap.mmap(-1, size), np.uint8)
            torch.cuda.check_error(runtime.cudaHostRegister(array.ctypes.data, size, 0))
        except (OSError, RuntimeError) as error:
            raise ResourceError(
                f"The system locks no {shown_bytes(size)} of memory for an expert.",
                "Free memory, or raise the limit on locked memory (ulimit -l).",
            ) from error
        weakref.finalize(array, runtime.cudaHostUnregister, array.ctypes.data)
        return array

    def send(self, source: Bytes, address: int) -> Event:
        """Put a copy on the copy stream."""
        with torch.cuda.stream(self._stream):
            there = cuda_bytes(address, source.nbytes)
            there.copy_(torch.from_numpy(source), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _CudaCopy(event)

    def synchronise(self) -> None:
        """Wait for the stream that this thread computes on."""
        torch.cuda.current_stream().synchronize()


class CudaBuffer:
    """Memory of the GPU as a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()


class _CudaCopy:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def cuda_bytes(address: int, size: int) -> Tensor:
    """Memory that the GPU sees at an address, as a tensor; who owns it keeps it.

    By Numba's CUDA Array Interface, version 3.
    """

    class Bytes:
        __cuda_array_interface__: ClassVar[dict[str, Any]] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Bytes(), device="cuda")
