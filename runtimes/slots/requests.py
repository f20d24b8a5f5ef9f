"""Requests to a runtime whose experts are in slots: what the image tells, steps, and the report."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.runtimes.base import Cache, Floats, Step
from medmoe_edge.runtimes.paging.budget import budget_bytes
from medmoe_edge.runtimes.paging.expert_file import ExpertFile
from medmoe_edge.runtimes.paging.request import RequestRouting
from medmoe_edge.runtimes.paging.store import Counts, Expert
from medmoe_edge.runtimes.slots.memory import DeviceMemory
from medmoe_edge.runtimes.slots.replay import Replay, ReplayCounts, Run
from medmoe_edge.runtimes.slots.slots import ExpertSlots, slot_count


class SlotRequests:
    """The slots of a bundle's experts in `memory`, and the steps that `run` makes over them.

    The budget is in bytes, or text: "1500MB", "50%". Raises `InputError` for one that is too small,
    `ResourceError` where the device has not as much, and `BundleError` for a bundle that cannot be
    paged.
    """

    def __init__(
        self, bundle: Bundle, file: ExpertFile, memory: DeviceMemory, budget: int | str, run: Run
    ) -> None:
        moe = bundle.config.moe
        assert moe is not None
        if isinstance(budget, str):
            budget = budget_bytes(budget, len(file.sizes) * max(file.sizes.values()))
        count = slot_count(budget, file.sizes, len(moe.layers) * moe.top_k)
        self.slots = ExpertSlots(file, memory, count, (len(moe.layers), moe.num_experts))
        self.routing = RequestRouting(bundle, self.slots.experts)
        self.replay = Replay(self.slots, run)
        self._expected: Sequence[Expert] = ()

    def begin(self, encode_image: Callable[[Floats], Floats], pixels: Floats) -> Floats:
        """A request begins, about an image; returns its projected tokens `[N, D]`."""
        self.report()  # what came before belongs to no answer
        tokens = encode_image(pixels)
        self.routing.begin(tokens)
        self._expected = self.routing.expected()
        return tokens

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """A step of the runtime.

        Raises what reading an expert raises; the cache is then as it was.
        """
        step, chosen = self.replay.step(embeds, cache, self._expected)
        self._expected = ()
        self.routing.ran(chosen)
        return step

    def report(self) -> dict[str, Any]:
        """What ran since the last one or the image; fetches nothing more ahead.

        A miss is an expert for which a step was run again; `replays` counts these runs.
        """
        experts = self.slots.experts
        counts, experts.counts = experts.counts, Counts()
        replay, self.replay.counts = self.replay.counts, ReplayCounts()
        counts = replace(counts, hits=replay.hits, late=0, misses=replay.faults)
        report = self.routing.report(experts.pager.budget, counts)
        return {**report, "replays": replay.runs - replay.parts}
