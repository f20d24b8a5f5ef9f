"""A portable bundle in PyTorch with its routed experts in slots, inside a memory budget.

Only the routed experts are paged; all else is as in `torch_bundle.py`. On CUDA slots lie in the
GPU's memory, filled by copies that run beside the compute (`device_memory_cuda.py`). On the CPU,
where memory is one, experts are read from the bundle straight into their slots.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from medmoe_edge.bundle import Bundle
from medmoe_edge.models.moe import route
from medmoe_edge.runtimes.base import Cache, Floats, Step, check_room
from medmoe_edge.runtimes.device_memory import CpuMemory, DeviceMemory
from medmoe_edge.runtimes.eager import TorchDevice
from medmoe_edge.runtimes.expert_file import ExpertFile
from medmoe_edge.runtimes.paging_budget import budget_bytes
from medmoe_edge.runtimes.paging_request import RequestRouting
from medmoe_edge.runtimes.paging_store import Counts, Expert
from medmoe_edge.runtimes.slots import ExpertSlots, Table, slot_count
from medmoe_edge.runtimes.slots_replay import Chosen, Replay, ReplayCounts
from medmoe_edge.runtimes.torch_bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch_slots import SlotExperts
from medmoe_edge.runtimes.torch_weights import BundleWeights


class PagedTorchRuntime(TorchBundleRuntime):
    """The bundle with its routed experts in `budget` bytes, or as text: "1500MB", "50%".

    A step computes the same bits as the resident runtime. Where its tokens need more experts than
    fit, it is cut, and computes what the resident runtime does of the parts one after another.
    Raises what that raises, `InputError` for a budget that is too small, and `BundleError` for a
    bundle that cannot be paged.
    """

    def __init__(
        self,
        bundle: Bundle,
        budget: int | str,
        device: TorchDevice = "cuda",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._budget = budget
        super().__init__(bundle, device, dtype)
        self._routing = RequestRouting(bundle, self.slots.experts)
        self._replay = Replay(self.slots, self._run)
        self._expected: Sequence[Expert] = ()

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; a request begins here."""
        self.paging()  # what came before belongs to no answer
        tokens = super().encode_image(pixels)
        self._routing.begin(tokens)
        self._expected = self._routing.expected()
        return tokens

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S.

        Raises what reading an expert raises; the cache is then as it was.
        """
        check_room(cache, len(embeds))
        step, chosen = self._replay.step(embeds, cache, self._expected)
        self._expected = ()
        self._routing.ran(chosen)
        return step

    def paging(self) -> dict[str, Any]:
        """The report on what ran since the last one or the image; fetches nothing more ahead.

        A miss is an expert for which a step was run again; `replays` counts these runs.
        """
        experts = self.slots.experts
        counts, experts.counts = experts.counts, Counts()
        replay, self._replay.counts = self._replay.counts, ReplayCounts()
        counts = replace(counts, hits=replay.hits, late=0, misses=replay.faults)
        report = self._routing.report(experts.pager.budget, counts)
        return {**report, "replays": replay.runs - replay.parts}

    def _load(self, weights: BundleWeights) -> None:
        file, moe = ExpertFile(weights.bundle), self.config.moe
        assert moe is not None
        budget = self._budget
        if isinstance(budget, str):
            budget = budget_bytes(budget, len(file.sizes) * max(file.sizes.values()))
        count = slot_count(budget, file.sizes, len(moe.layers) * moe.top_k)
        shape = len(moe.layers), moe.num_experts
        self.slots = ExpertSlots(file, memory_of(self.device), count, shape)
        self._bound = SlotExperts(
            *(self.model, weights, file.extents, self.slots.store.slots, self.dtype),
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
    from medmoe_edge.runtimes.device_memory_cuda import CudaMemory

    return CudaMemory()
