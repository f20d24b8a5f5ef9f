"""The bundle on ONNX Runtime's CPU with its experts paged, inside a memory budget.

The decoder runs in segments (`export/passes/ort_paged.py`). Between two of them the routed tokens
are gathered, each chosen expert runs on its own as soon as it is in memory, and the sum goes on.
The kernels and the rows that they see are those of the whole graph, so answers are the same bits.

Each expert is a session of its own, not part of one graph over mapped weights, because ONNX Runtime
packs the weights for its fast kernels onto the heap when a session starts. One graph would pack all
of them; without packing (`session.disable_prepacking`, the weights mapped in place) int8 decodes
1.6 to 14 times slower, by CPU, and int4 a hundred times. A packed form can be saved to a file that
is mapped, but it is for one kind of CPU and twice as large, since it holds the weights too; and the
weights are packed again to find it: a session of 35 MB opens in 35 to 45 ms instead of 50 to 75.

ONNX Runtime copies the weights that were read (`paging/expert_file.py`) and packs the copy, matrix
by matrix: the peak of a load is the packed bytes and up to twice the stored ones, which the budget
holds; afterwards exactly the packed ones, once `malloc_trim` has given back the rest. Handed over
as a file in memory, as its own interface for this has it, they would be copied twice, and a load
take a third (int8) to twice (int4) as long again. Most of what is left is new memory's pages, so
that buffers serve again until the store may `rest`.
"""

import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import DEFAULT, Bundle
from medmoe_edge.bundle.machine import call_glibc, return_free_memory
from medmoe_edge.config import Device
from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.base import Cache, Step
from medmoe_edge.runtimes.costs import COPIES
from medmoe_edge.runtimes.ort.runtime import (
    CPU,
    NO_FALLBACK,
    OPENED_AT_ONCE,
    VISION,
    OrtCache,
    OrtRuntime,
    not_opened,
    one_of_many,
    session_options,
)
from medmoe_edge.runtimes.paging.pager import (
    Budget,
    Check,
    Counts,
    Expert,
    ExpertFile,
    ExpertPager,
    Extent,
    PagedExperts,
)
from medmoe_edge.runtimes.paging.prediction import Ahead, RequestRouting, budget_bytes
from medmoe_edge.runtimes.slots.slots import (
    Chosen,
    CpuMemory,
    DeviceMemory,
    Kind,
    SlotPools,
    SlotRequests,
    Table,
)

SESSION = 2**18  # bytes that a session takes beside its weights
M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED = 10 * 2**20  # bytes: less than a matrix of a whole expert, more than most activations
SLACK = 2**20  # what is smaller than this, the allocator holds ready anyway


class OrtExpert:
    """An expert in memory."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session: ort.InferenceSession | None = session
        self.outputs = [value.name for value in session.get_outputs()]

    def __call__(self, given: Mapping[str, Floats]) -> dict[str, Floats]:
        """What the expert adds for some tokens, by the name of the sum; see `ort_paged`."""
        assert self.session is not None
        found = self.session.run(self.outputs, dict(given))
        return dict(zip(self.outputs, found, strict=True))


class OrtExpertStore:
    """Loads experts of a bundle; `check` and `drop_pages` are those of `ExpertFile`."""

    def __init__(self, bundle: Bundle, *, check: Check = "first", drop_pages: bool = False) -> None:
        self.file = ExpertFile(bundle, check=check, drop_pages=drop_pages)
        extents = self.file.extents
        if "graphs" not in bundle.manifest["paging"]:
            raise BundleError(
                f"{bundle.name} cannot be paged: it does not say where its experts' weights lie.",
                "Export the checkpoint again with this version.",
            )
        self._weights: Mapping[str, Mapping[str, Any]] = bundle.manifest["paging"]["graphs"]
        self._graphs = {name: bundle.path(name).read_bytes() for name in self._weights}
        self.sizes: Mapping[Expert, int] = {
            expert: extent.loaded_bytes + SESSION for expert, extent in extents.items()
        }
        self.stored = self.file.sizes
        self._largest = max(self.stored.values())
        self.scratch = COPIES * self._largest if self._largest >= SLACK else 0
        self._buffers: list[npt.NDArray[np.uint8]] = []  # that no load uses at the moment

    def load(self, expert: Expert) -> OrtExpert:
        """Read, check and load one; raises `BundleError` for bytes that are not the expert's."""
        try:
            content = self._buffers.pop()
        except IndexError:
            content = np.empty(self._largest, np.uint8)
        try:
            self.file.read(expert, content)
            return OrtExpert(self._session(self.file.extents[expert], content))
        finally:
            self._buffers.append(content)
            if self.scratch:
                return_free_memory()

    def rest(self) -> None:
        """Give back what loads held ready for the next one, and what else is free."""
        self._buffers.clear()
        if self.scratch:
            return_free_memory()

    def release(self, value: OrtExpert) -> None:
        """Free its session, whoever still knows the expert."""
        value.session = None
        if self.scratch:
            return_free_memory()

    def announce(self, experts: Sequence[Expert]) -> None:
        """Have the kernel read ahead what will be loaded."""
        self.file.announce(experts)

    def _session(self, extent: Extent, content: npt.NDArray[np.uint8]) -> ort.InferenceSession:
        options = one_of_many(session_options())
        try:
            weights = {  # copied when the session opens
                name: ort.OrtValue.ortvalue_from_numpy(
                    np.ndarray(about["shape"], about["type"], content, about["offset"])
                )
                for name, about in self._weights[extent.graph].items()
            }
            options.add_external_initializers(list(weights), list(weights.values()))
            graph = self._graphs[extent.graph]
            return ort.InferenceSession(graph, options, providers=[CPU], **NO_FALLBACK)
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise not_opened(extent.name, error, "Give it a smaller memory budget.") from error


def map_large_blocks() -> None:
    """Have glibc map blocks as large as a matrix each by itself, so that released ones are gone.

    Else it soon keeps them in one heap with the activations, and its holes are no room for others.
    Prefill takes a twelfth longer, as attention's scores are mapped anew in every layer.
    """
    call_glibc("mallopt", M_MMAP_THRESHOLD, MAPPED)


RESULTS = ["logits", "router_logits"]
HANDED = ("tokens", "gates", "chosen", "gate", "up", "fc1", "hidden")  # to a layer's experts


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
        if budget is not None and max(store.sizes.values()) >= MAPPED:
            map_large_blocks()
        pager = budget if isinstance(budget, ExpertPager) else _pager(budget, store)
        assert bundle.config.moe is not None
        # a budget that is too small is refused here, before any session is opened
        self.experts: PagedExperts[OrtExpert] = pager.open(store, bundle.config.moe.top_k)
        weakref.finalize(self, self.experts.close_later).atexit = False
        super().__init__(bundle)
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
                for name, summed in self._routed_sums(index, values).items():
                    values[f"{name}.{index}"] = ort.OrtValue.ortvalue_from_numpy(summed)
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

    def _routed_sums(self, index: int, values: dict[str, ort.OrtValue]) -> dict[str, Floats]:
        """What the next segment takes from the experts of layer `index` of those with some.

        That is `routed`, the weighted sum of the chosen experts `[1, S, D]`; of experts as deltas
        what they add to the output `[S, D]`, and `mixed`, the hidden layer `[S, F]` with theirs.
        """
        found = {
            name: values[own].numpy() for name in HANDED if (own := f"{name}.{index}") in values
        }
        gates, chosen = found.pop("gates"), found.pop("chosen")
        routed = np.zeros_like(found["tokens"])
        rows = {name: value.reshape(-1, value.shape[-1]) for name, value in found.items()}
        sums = {"part": routed.reshape(rows["tokens"].shape)}
        if "hidden" in rows:
            sums["hidden"] = rows.pop("hidden")  # in place: nobody else reads it
        for expert in map(int, np.unique(chosen)):
            share = np.where(chosen == expert, gates, np.float32(0)).sum(-1, keepdims=True)
            mine = np.flatnonzero(share)
            if not len(mine):
                continue
            # no copies where all tokens are of one expert, as those of one image mostly are
            at = slice(None) if len(mine) == len(share) else mine
            given = {name: value[at] for name, value in rows.items()} | {"share": share[at]}
            with self.experts.use((index, expert)) as (run,):
                for name, part in run(given).items():
                    sums[name][at] += part
        return {"routed": routed} | ({"mixed": sums["hidden"]} if "hidden" in sums else {})

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


class SlotOrtRuntime(OrtRuntime):
    """Runs a paged bundle's graphs; `budget` is that of its routed experts, in bytes or as text.

    `drop_pages` is that of `ExpertFile`. Raises what `SlotRequests` and `OrtRuntime` raise.

    The decoder takes the slots as inputs (`export/passes/ort_cuda.py`), which are bound by their
    addresses and not copied. ONNX Runtime has computed when a run returns, so that nothing else
    waits. On the CPU, where it is asked for, the same graph runs with slots in its memory; on CUDA
    there was no GPU to execute it on.
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
