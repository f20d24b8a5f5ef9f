"""A bundle of TensorRT engines whose experts are in slots of the GPU's memory, inside a budget.

The engine takes the slots as inputs (`export/passes/tensorrt.py`). They are bound like the KV
cache, by addresses that stay, so that a captured decode step stays right too: it reads the table
from the device, as it reads where the token stands. Each launch is a whole step;
`slots/replay.py` runs it again until every expert that it chose was there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.runtimes.base import Cache, Step
from medmoe_edge.runtimes.paging.expert_file import ExpertFile
from medmoe_edge.runtimes.slots.replay import Chosen, SlotRequests
from medmoe_edge.runtimes.slots.slots import Kind, SlotPools, Table
from medmoe_edge.runtimes.tensorrt.device import Device
from medmoe_edge.runtimes.tensorrt.runtime import (
    Context,
    Engine,
    Lane,
    TensorRTCache,
    TensorRTRuntime,
)


class PagedTensorRTRuntime(TensorRTRuntime):
    """Runs a paged bundle's engines; `budget` is that of its routed experts, in bytes or as text.

    `drop_pages` is that of `ExpertFile`. Raises what `SlotRequests` and `TensorRTRuntime` raise.
    """

    def __init__(
        self,
        bundle: Bundle,
        budget: int | str,
        *,
        device: Device | None = None,
        open_engine: Callable[[str], Engine] | None = None,
        drop_pages: bool = False,
    ) -> None:
        kinds = Kind.all_of(bundle)
        super().__init__(bundle, device=device, open_engine=open_engine)
        self._pools = SlotPools(self._device, kinds)
        file = ExpertFile(bundle, drop_pages=drop_pages)
        self.requests = SlotRequests(bundle, file, self._pools, budget, self._run_with)

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; a request begins here."""
        return self.requests.begin(super().encode_image, pixels)

    def paging(self) -> dict[str, Any]:
        """The report on what ran since the last one or the image: see `SlotRequests`."""
        return self.requests.report()

    def _run(self, embeds: Floats, cache: TensorRTCache) -> Step:
        return self.requests.step(embeds, cache)

    def _run_with(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        assert isinstance(cache, TensorRTCache)
        lane = self._lane(len(embeds))
        lane.inputs["table"].host[:] = table
        step = super()._run(embeds, cache)
        assert self.config.moe is not None
        shape = len(embeds), self.config.moe.top_k
        chosen = [
            lane.outputs[f"chosen.{layer}"].host[: shape[0] * shape[1]].reshape(shape)
            for layer in range(len(table))
        ]
        # what is no number may be sent anywhere: the logits tell
        return step, np.stack(chosen, 1).clip(0, self.config.moe.num_experts - 1)

    def _new_lane(self, context: Context, tokens: int) -> Lane:
        lane, slots = super()._new_lane(context, tokens), self.requests.slots
        lane.inputs["table"] = self._device.mirror(slots.shape, np.int32)
        assert self.config.moe is not None
        for layer in range(slots.shape[0]):
            count = tokens * self.config.moe.top_k
            lane.outputs[f"chosen.{layer}"] = self._device.mirror((count,), np.int64)
        for kind in self._pools.kinds:
            lane.addresses[kind.name] = self._pools.addresses[kind.name]
            lane.shapes[kind.name] = (slots.count, *kind.shape)
        return lane
