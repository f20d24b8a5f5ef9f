"""A portable bundle in PyTorch with its routed experts in slots, inside a memory budget.

Only the routed experts are paged; all else is as in `torch_bundle.py`. On CUDA slots lie in the
GPU's memory, filled by copies that run beside the compute (`device_memory_cuda.py`). On the CPU,
where memory is one, experts are read from the bundle straight into their slots.
"""

from typing import Any

import torch

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.models.moe import route
from medmoe_edge.runtimes.base import Cache, Floats, Step, check_room
from medmoe_edge.runtimes.paging.expert_file import ExpertFile
from medmoe_edge.runtimes.slots.memory import CpuMemory, DeviceMemory
from medmoe_edge.runtimes.slots.replay import Chosen
from medmoe_edge.runtimes.slots.requests import SlotRequests
from medmoe_edge.runtimes.slots.slots import Table
from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch.eager import TorchDevice
from medmoe_edge.runtimes.torch.slots import SlotExperts
from medmoe_edge.runtimes.torch.weights import BundleWeights


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
