"""The bundle on ONNX Runtime's CPU with its experts paged, inside a memory budget.

The decoder runs in segments (`export/passes/ort_paged.py`). Between two of them the routed tokens
are gathered, each chosen expert runs on its own as soon as it is in memory, and the sum goes on.
The kernels and the rows that they see are those of the whole graph, so answers are the same bits.
"""

import weakref
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime as ort

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.target import DEFAULT
from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.base import Floats, Step
from medmoe_edge.runtimes.ort.cache import OrtCache
from medmoe_edge.runtimes.ort.experts import OrtExpert, OrtExpertStore, map_large_blocks
from medmoe_edge.runtimes.ort.runtime import VISION, OrtRuntime
from medmoe_edge.runtimes.ort.sessions import OPENED_AT_ONCE, one_of_many, session_options
from medmoe_edge.runtimes.paging.budget import budget_bytes
from medmoe_edge.runtimes.paging.expert_file import Check
from medmoe_edge.runtimes.paging.pager import Budget, ExpertPager, PagedExperts
from medmoe_edge.runtimes.paging.request import Ahead, RequestRouting
from medmoe_edge.runtimes.paging.store import Counts

RESULTS = ["logits", "router_logits"]


class PagedOrtRuntime(OrtRuntime):
    """Runs a bundle's segments; `budget` is in bytes, as text ("1500MB", "50%"), or a pager.

    A pager may serve several runtimes, which then share its budget; with None all experts are
    resident, loaded in the background from the start. `check` and `drop_pages` are
    those of `OrtExpertStore`; without `prefetch` experts are loaded only when they are needed.
    Raises `InputError` for a budget that is too small, `BundleError` for a bundle that cannot be
    paged.
    """

    def __init__(
        self,
        bundle: Bundle,
        budget: Budget | None,
        *,
        check: Check = "first",
        drop_pages: bool = False,
        prefetch: bool = True,
    ) -> None:
        if bundle.target.name != DEFAULT:
            raise BundleError(
                f"{bundle.name} is made for {bundle.target}; experts are paged on the CPU.",
                "Give the portable bundle that it was made from, or leave the memory budget out.",
            )
        store = self._store = OrtExpertStore(bundle, check=check, drop_pages=drop_pages)
        if budget is not None and store.scratch:
            map_large_blocks()
        super().__init__(bundle)
        pager = budget if isinstance(budget, ExpertPager) else _pager(budget, store)
        assert bundle.config.moe is not None
        self.experts: PagedExperts[OrtExpert] = pager.open(store, bundle.config.moe.top_k)
        weakref.finalize(self, self.experts.close_later).atexit = False
        ahead: Ahead = "all" if budget is None else "expected"
        self._routing = RequestRouting(bundle, self.experts, ahead if prefetch else "none")

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; a request begins here."""
        self.paging()  # what came before belongs to no answer
        tokens = super().encode_image(pixels)
        self._routing.begin(tokens)
        return tokens

    def new_cache(self, capacity: int) -> OrtCache:
        """An empty cache for `capacity` positions."""
        return OrtCache(self.config.decoder, capacity, np.float32, "cpu")

    def _run(self, embeds: Floats, cache: OrtCache) -> Step:
        total = cache.length + len(embeds)
        values: dict[str, ort.OrtValue] = {
            "embeds": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(embeds[None])),
            "seqlens_k": ort.OrtValue.ortvalue_from_numpy(np.array([total - 1], np.int32)),
            "total_length": ort.OrtValue.ortvalue_from_numpy(np.array(total, np.int32)),
        }
        past = {f"past_{name}": buffer for name, buffer in cache.buffers.items()}
        chosen = []  # [S, K] of each layer with experts
        for index, segment in enumerate(self._segments):
            values |= segment.run(values | past, cache)
            if index < len(self._segments) - 1:
                chosen.append(values[f"chosen.{index}"].numpy())
                routed = self._routed_sum(index, values)
                values[f"routed.{index}"] = ort.OrtValue.ortvalue_from_numpy(routed)
            values = {name: value for name, value in values.items() if name in segment.kept}
        cache.length = total
        self._routing.ran(np.stack(chosen, 1))
        # copied, as the values' memory goes with them
        logits, router_logits = (np.array(values[name].numpy()[0]) for name in RESULTS)
        return Step(logits, router_logits)

    def paging(self) -> dict[str, Any]:
        """The report on what ran since the last one or the image."""
        counts, self.experts.counts = self.experts.counts, Counts()
        if counts.loads:
            self._store.rest()
        return self._routing.report(self.experts.pager.budget, counts)

    def _routed_sum(self, index: int, values: dict[str, ort.OrtValue]) -> Floats:
        """The weighted sum of the chosen experts `[1, S, D]`, layer `index` of those with some."""
        tokens = values[f"tokens.{index}"].numpy()  # [1, S, D]
        rows = tokens[0]
        gates, chosen = (values[f"{name}.{index}"].numpy() for name in ("gates", "chosen"))
        total = np.zeros_like(rows)
        for expert in map(int, np.unique(chosen)):
            share = np.where(chosen == expert, gates, np.float32(0)).sum(-1, keepdims=True)
            mine = np.flatnonzero(share)
            if not len(mine):
                continue
            with self.experts.use((index, expert)) as (run,):
                total[mine] += run(rows[mine], share[mine])
        summed: Floats = total[None]
        return summed

    def _graphs(self) -> dict[str, ort.SessionOptions]:
        count = self.bundle.manifest["paging"]["segments"]
        names = [VISION, *(f"segment.{index}.onnx" for index in range(count))]
        return {name: one_of_many(session_options()) for name in names}

    @cached_property
    def _segments(self) -> "list[_Segment]":
        _, *names = self._graphs()
        segments = [_Segment(self._opened(name)) for name in names]
        read = [segment.inputs for segment in segments[1:]] + [RESULTS]  # next
        later = frozenset[str]()
        for segment, soon in zip(reversed(segments), reversed(read), strict=True):
            segment.lasting = later
            segment.kept = later = later.union(soon)
        return segments


def _pager(budget: int | str | None, store: OrtExpertStore) -> ExpertPager:
    experts = sum(store.sizes.values())
    if budget is None:
        return ExpertPager(experts + OPENED_AT_ONCE * store.scratch, at_once=OPENED_AT_ONCE)
    return ExpertPager(budget if isinstance(budget, int) else budget_bytes(budget, experts))


class _Segment:
    """A session that takes its inputs from the values so far.

    Of these and its outputs, `kept` are read after it, and `lasting` also after the next one.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.inputs = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        self.present = [name for name in outputs if name.startswith("present_")]
        self.outputs = [name for name in outputs if not name.startswith("present_")]
        self.kept = self.lasting = frozenset[str]()

    def run(self, values: dict[str, ort.OrtValue], cache: OrtCache) -> dict[str, ort.OrtValue]:
        """Its outputs; the cache is written in place.

        What lasts is copied: an output holds on to its binding, and so to all inputs and outputs.
        """
        binding = self.session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in self.outputs:
            binding.bind_output(name)
        for name in self.present:
            binding.bind_ortvalue_output(name, cache.buffers[name.removeprefix("present_")])
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.outputs, binding.get_outputs(), strict=False))
        for name in self.lasting.intersection(found):
            found[name] = ort.OrtValue.ortvalue_from_numpy(np.array(found[name].numpy()))
        return found
