"""A bundle for CUDA on ONNX Runtime whose experts are in slots, inside a memory budget.

The decoder takes the slots as inputs (`export/passes/ort_cuda.py`), which are bound by their
addresses and not copied. ONNX Runtime has computed when a run returns, so that nothing else waits.
On the CPU, where it is asked for, the same graph runs with slots in its memory; on CUDA there was
no GPU to execute it on.
"""

from typing import Any

import numpy as np

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.runtimes.base import Cache, Step
from medmoe_edge.runtimes.ort.runtime import OrtCache, OrtRuntime
from medmoe_edge.runtimes.ort.sessions import Device
from medmoe_edge.runtimes.paging.expert_file import ExpertFile
from medmoe_edge.runtimes.slots.memory import CpuMemory, DeviceMemory
from medmoe_edge.runtimes.slots.replay import Chosen, SlotRequests
from medmoe_edge.runtimes.slots.slots import Kind, SlotPools, Table


class SlotOrtRuntime(OrtRuntime):
    """Runs a paged bundle's graphs; `budget` is that of its routed experts, in bytes or as text.

    `drop_pages` is that of `ExpertFile`. Raises what `SlotRequests` and `OrtRuntime` raise.
    """

    def __init__(
        self,
        bundle: Bundle,
        budget: int | str,
        *,
        device: Device = "auto",
        drop_pages: bool = False,
    ) -> None:
        kinds = Kind.all_of(bundle)
        super().__init__(bundle, device=device)
        self._pools = SlotPools(_memory_of(self.choice.device), kinds)
        file = ExpertFile(bundle, drop_pages=drop_pages)
        self.requests = SlotRequests(bundle, file, self._pools, budget, self._run_with)

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; a request begins here."""
        return self.requests.begin(super().encode_image, pixels)

    def paging(self) -> dict[str, Any]:
        """The report on what ran since the last one or the image: see `SlotRequests`."""
        return self.requests.report()

    def _run(self, embeds: Floats, cache: OrtCache) -> Step:
        return self.requests.step(embeds, cache)

    def _run_with(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        assert isinstance(cache, OrtCache)
        binding = self._decoder.io_binding()
        binding.bind_cpu_input("table", table)
        for kind in self._pools.kinds:
            shape = [self.requests.slots.count, *kind.shape]
            place = self.choice.device, 0, np.dtype(kind.dtype).type, shape
            binding.bind_input(kind.name, *place, self._pools.addresses[kind.name])
        names = [f"chosen.{layer}" for layer in range(len(table))]
        step, chosen = self._run_bound(embeds, cache, binding, names)
        return step, np.stack([each[0] for each in chosen], 1)


def _memory_of(device: str) -> DeviceMemory:
    if device == "cpu":
        return CpuMemory()
    from medmoe_edge.runtimes.tensorrt.device import CudaDevice

    return CudaDevice("gpu")
