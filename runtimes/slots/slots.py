"""Experts in a fixed number of slots of a device's memory, and the table that finds them.

The pager (`paging/pager.py`) decides who stays, as for every other runtime: its budget is the
slots. What computes is a whole step, which cannot stop to wait for an expert. So before it runs,
the experts that it may read are held in their slots, and it is given a table of them, `[M, E]`
int32: the slot of each expert, -1 for one that it may not read. If it turns out to need another, it
is run again (`Replay`).

Two rules keep slots and compute apart. A load ends when its copy has passed its event, so what the
table names is there. And experts are let go only when the compute that read them is over
(`SlotPools.finish`), so no slot is written that is still being read. A copy that nobody waits
for any more, after an interrupt, may still be under way into a slot that is free again: copies run
in order, so the next one lands on top of it.

Graphs take the parts of slots as pools, one array per kind of weight: the input `slots.<kind>`
`[slots, ...]`, where slot s is row s. The pools never move, so that what was bound to them, or
recorded in a CUDA graph, stays right: only their contents change.

On a GPU with memory of its own, what it computes from is filled by copies from page-locked host
memory, on a stream of their own beside the compute. Where CPU and GPU share one DRAM, as on a
Jetson, the host writes where the GPU reads, and nothing is kept or copied twice.

Whole steps over expert slots, replayed until every expert that they chose was there.

A step is run with a table of the experts present. Afterwards the experts that it chose
are compared with the table. One that was absent is a fault: the step is run again with it. That is
harmless, for a step writes the same cache positions again, and the cache's length counts it only
when it was right.

Why that ends. Say the first fault is in layer f. All layers before had their experts, so the input
of layer f and its choice are those of a resident model. The next run holds what was chosen up to
layer f, so its first fault comes later: a step of M layers with experts runs at most M + 1 times.
What later layers chose on top of a fault is only a guess, but mostly a good one: it is fetched too,
as far as there is room.

Where the tokens of a step need more experts than there are slots, as a prefill may, the step is cut
to its longest beginning that needs no more, and goes on after it in the same way. A single token
needs at most M * k, which is the least number of slots. Tokens do not look ahead, so those that are
left choose as before, and the count of runs holds for a part too, unless rounding in another number
of rows tips a choice; then it holds from that cut on, and there are fewer cuts than tokens.
"""

import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import BundleError, InputError, ResourceError
from medmoe_edge.runtimes.base import Cache, Step
from medmoe_edge.runtimes.paging.pager import (
    Bytes,
    Counts,
    Expert,
    ExpertFile,
    ExpertPager,
    PagedExperts,
)
from medmoe_edge.runtimes.paging.prediction import RequestRouting, budget_bytes


class Event(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Return when the copy has ended; raises what it failed with."""


class Buffer(Protocol):
    """Memory of the device, freed with the object."""

    address: int


class DeviceMemory(Protocol):
    """Memory that a device computes from. May be used from several threads."""

    @property
    def unified(self) -> bool:
        """Whether the CPU has the same memory: then `pinned` is all that is needed."""
        ...

    def zeros(self, size: int) -> Buffer:
        """So many bytes of the device's own memory, all zero; raises `ResourceError`."""
        ...

    def pinned(self, size: int) -> Bytes:
        """Zeros on the host, page-locked, which the device sees at the same address."""
        ...

    def send(self, source: Bytes, address: int) -> Event:
        """Begin to copy page-locked bytes to the device; copies end in the order they began."""
        ...

    def synchronise(self) -> None:
        """Wait until the device has computed and filled with zeros all that it was told to."""
        ...


class CpuMemory:
    """The CPU's own, which is unified. Made with `unified=False` it behaves as a GPU's does: it is
    filled by copies that a thread makes one after another.
    """

    def __init__(self, *, unified: bool = True) -> None:
        self.unified = unified
        self._stream = ThreadPoolExecutor(1, "expert-copy")  # starts with its first copy

    def zeros(self, size: int) -> "CpuBuffer":
        """So many bytes, all zero."""
        return CpuBuffer(size)

    def pinned(self, size: int) -> Bytes:
        """So many bytes, all zero."""
        return np.zeros(size, np.uint8)

    def send(self, source: Bytes, address: int) -> Event:
        """Have the thread copy."""

        def copy() -> None:
            ctypes.memmove(address, source.ctypes.data, source.nbytes)

        return self.queue(copy)

    def queue(self, work: Callable[[], Any]) -> Event:
        """Have the thread work, after all that it was told before."""
        return _Queued(self._stream.submit(work))

    def synchronise(self) -> None:
        """Nothing: what the CPU computed has ended when it returns."""


class CpuBuffer:
    """Memory of the CPU as an array."""

    def __init__(self, size: int) -> None:
        self.array: Bytes = np.zeros(size, np.uint8)
        self.address = self.array.ctypes.data


class _Queued:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


Table = npt.NDArray[np.int32]
ABSENT = -1


@dataclass(frozen=True)
class Kind:
    """One kind of weight: the graph's input, and what one expert has of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @classmethod
    def all_of(cls, bundle: Bundle) -> list[Self]:
        """Those of a bundle, as they follow each other in an expert's extent.

        Raises `BundleError` for a bundle whose experts are not paged in slots.
        """
        slots = bundle.manifest.get("paging", {}).get("slots")
        if not slots:
            raise BundleError(
                f"{bundle.name} is made for {bundle.target} with all experts in its graph.",
                "Leave the memory budget out, or export it with --paged.",
            )
        return [
            cls(name, kind["dtype"], tuple(kind["shape"]), kind["bytes"])
            for name, kind in slots.items()
        ]


class SlotPools:
    """Slots with parts of these kinds in a device's memory: a slot is its number.

    `pools` holds the buffers of the kinds, or arrays of the host where memory is unified.
    """

    def __init__(self, memory: DeviceMemory, kinds: Sequence[Kind]) -> None:
        self.memory, self.kinds = memory, kinds
        self.slot_bytes = sum(kind.bytes for kind in kinds)
        self.addresses: dict[str, int] = {}
        self.pools: list[Any] = []

    def allocate(self, count: int) -> None:
        """Make so many slots, all zero, once; raises `ResourceError`."""
        for kind in self.kinds:
            if self.memory.unified:
                pool: Any = self.memory.pinned(count * kind.bytes)
                self.addresses[kind.name] = pool.ctypes.data
            else:
                pool = self.memory.zeros(count * kind.bytes)
                self.addresses[kind.name] = pool.address
            self.pools.append(pool)
        self.memory.synchronise()  # copies do not wait for the zeros

    def in_place(self, slot: int) -> Sequence[Bytes]:
        """The parts of a slot of unified memory as the host sees them."""
        rows = zip(self.pools, self.kinds, strict=True)
        return [pool[slot * kind.bytes : (slot + 1) * kind.bytes] for pool, kind in rows]

    def copy(self, source: Bytes, slot: int) -> Event:
        """Begin to copy an expert's parts, page-locked and one behind the other, to their rows."""
        ends = list(itertools.accumulate(kind.bytes for kind in self.kinds))
        for kind, end in zip(self.kinds, ends, strict=True):
            address = self.addresses[kind.name] + slot * kind.bytes
            event = self.memory.send(source[end - kind.bytes : end], address)
        return event  # in order: when the last one has ended, all have

    def finish(self) -> None:
        """Wait until all that was computed has read its slots."""
        self.memory.synchronise()


class Source(Protocol):
    """Where experts' bytes are read from."""

    @property
    def sizes(self) -> Mapping[Expert, int]:
        """Bytes of each expert."""
        ...

    def announce(self, experts: Iterable[Expert]) -> None:
        """Hear which will be read, in order."""

    def read(self, expert: Expert, *into: Bytes) -> None:
        """Read one to the front of `into`, buffers that follow one another; raises what fails."""


class SlotStore:
    """A pager's store whose experts lie in slots; what it loads is the number of the slot.

    Each slot holds the largest expert. Where the device has a memory of its own, what was read once
    stays on the host, to be copied again.
    """

    def __init__(self, source: Source, pools: SlotPools, count: int) -> None:
        self.source, self.pools = source, pools
        self.stored = source.sizes
        self.size = pools.slot_bytes
        self.sizes = dict.fromkeys(self.stored, self.size)
        self.scratch = 0
        pools.allocate(count)
        self._free = list(range(count))
        self._on_host: dict[Expert, Bytes] = {}

    @property
    def host_bytes(self) -> int:
        """Bytes of experts that are kept on the host."""
        return sum(len(copy) for copy in self._on_host.values())

    def announce(self, experts: Sequence[Expert]) -> None:
        """Have those read ahead that are not on the host."""
        self.source.announce(expert for expert in experts if expert not in self._on_host)

    def load(self, expert: Expert) -> int:
        """Fill a free slot; raises what the source and the memory raise."""
        slot = self._free.pop()
        try:
            if self.pools.memory.unified:
                self.source.read(expert, *self.pools.in_place(slot))
            else:
                self.pools.copy(self._host_copy(expert), slot).wait()
        except BaseException:
            self._free.append(slot)
            raise
        return slot

    def release(self, value: int) -> None:
        """The slot is free again."""
        self._free.append(value)

    def _host_copy(self, expert: Expert) -> Bytes:
        if expert not in self._on_host:
            copy = self.pools.memory.pinned(self.stored[expert])
            self.source.read(expert, copy)
            self._on_host[expert] = copy
        return self._on_host[expert]


class ExpertSlots:
    """One model's experts, M layers of E, in so many slots. May be used from several threads."""

    def __init__(
        self, source: Source, pools: SlotPools, count: int, shape: tuple[int, int]
    ) -> None:
        self.count, self.shape = count, shape
        self.store = SlotStore(source, pools, count)
        pager = ExpertPager(count * self.store.size)
        self.experts: PagedExperts[int] = pager.open(self.store, 1)

    @contextmanager
    def hold(self, wanted: Sequence[Expert]) -> Iterator[Table]:
        """The table of `wanted`, of which those that do not fit are left out, and of what is there.

        They are held for as long as the context lasts; no other `hold` inside.
        """
        held = list(dict.fromkeys((*wanted, *self._there())))[: self.count]
        table = np.full(self.shape, ABSENT, np.int32)
        with self.experts.use(*held) as slots:
            for expert, slot in zip(held, slots, strict=True):
                table[expert] = slot
            try:
                yield table
            finally:
                self.store.pools.finish()

    def _there(self) -> list[Expert]:
        """The experts in memory, those that are worth most first."""
        pager = self.experts.pager
        with pager.changed:
            there = [slot for slot in pager.slots.values() if slot.value is not None]
            there.sort(key=lambda slot: slot.worth, reverse=True)
        return [slot.expert for slot in there]


def slot_count(budget: int, size: int, experts: int, least: int) -> int:
    """Slots of `size` bytes in a budget of bytes, no more than there are experts.

    Raises `InputError` where they are fewer than `least`, what a single token may need.
    """
    if budget < least * size:
        raise InputError(
            f"A memory budget of {budget:,} bytes is too small for this model.",
            f"The experts of a single token take {least * size:,} bytes: allow as many.",
        )
    return min(budget // size, experts)


Chosen = npt.NDArray[np.int64]  # [S, M, K]
Run = Callable[[Floats, Cache, Table], tuple[Step, Chosen]]
"""Runs `[S, D]` embeddings as `Runtime.step` does, and says which experts it chose.

Experts whose entry in the table is -1 may give anything.
"""


@dataclass
class ReplayCounts:
    """What it took to run steps.

    `runs` were made of the `parts` that steps were cut into. Of the experts that a part needed,
    `hits` were there in its first run and `faults` were not.
    """

    parts: int = 0
    runs: int = 0
    hits: int = 0
    faults: int = 0


class Replay:
    """Runs steps over slots, one at a time."""

    def __init__(self, slots: ExpertSlots, run: Run) -> None:
        self.slots, self._run = slots, run
        self.counts = ReplayCounts()

    def step(self, embeds: Floats, cache: Cache, expected: Sequence[Expert] = ()) -> "Replayed":
        """One step of a `Runtime`, which begins with the experts `expected`.

        Raises what fetching an expert raises; the cache is then as it was.
        """
        begin, steps, chosen = cache.length, [], []
        done, length = 0, len(embeds)
        try:
            while done < len(embeds):
                step, own = self._part(embeds[done : done + length], cache, expected)
                steps.append(step)
                chosen.append(own)
                done += len(own)
                # once cut, longer parts are tried with care: one that is too long costs a run
                length, expected = 2 * len(own), ()
        except BaseException:
            cache.length = begin
            raise
        routing = np.concatenate([step.router_logits for step in steps])
        return Replayed(Step(steps[-1].logits, routing), np.concatenate(chosen))

    def _part(self, embeds: Floats, cache: Cache, wanted: Sequence[Expert]) -> tuple[Step, Chosen]:
        """The step of the longest beginning of `embeds` whose experts fit into the slots."""
        begin, last, there = cache.length, -1, None
        while True:
            self.counts.runs += 1
            with self.slots.hold(wanted) as table:
                step, chosen = self._run(embeds, cache, table)
            there = table if there is None else there
            layer = first_fault(chosen, table)
            if layer is None:
                self._count(chosen, there)
                return step, chosen
            cache.length = begin
            length, wanted = next_try(chosen, layer, self.slots.shape[1], self.slots.count)
            if length < len(embeds):
                embeds, last = embeds[:length], -1
            elif layer > last:
                last = layer
            else:
                raise ResourceError(
                    "A step that was run again chose other experts than before.",
                    "This device does not compute the same twice: leave the memory budget out.",
                )

    def _count(self, chosen: Chosen, there: Table) -> None:
        needed = np.zeros(there.shape, np.bool_)
        needed[np.arange(len(there))[:, None], chosen] = True
        self.counts.parts += 1
        self.counts.hits += int((needed & (there != ABSENT)).sum())
        self.counts.faults += int((needed & (there == ABSENT)).sum())


class Replayed(NamedTuple):
    """A step, and the experts that its tokens chose, `[S, M, K]`."""

    step: Step
    chosen: Chosen


def first_fault(chosen: Chosen, table: Table) -> int | None:
    """The first layer that chose an expert which the table says was absent."""
    slots = table[np.arange(len(table))[:, None], chosen]  # [S, M, K]
    layers = np.flatnonzero((slots == ABSENT).any((0, 2)))
    return int(layers[0]) if len(layers) else None


def next_try(chosen: Chosen, layer: int, experts: int, room: int) -> tuple[int, list[Expert]]:
    """How many tokens to run again after a first fault in `layer`, and with which experts.

    The tokens are the most whose experts up to that layer fit into `room` slots. Those experts come
    first, then what the tokens seem to need in later layers, most tokens first.
    """
    uses = chosen[..., None] == np.arange(experts)  # [S, M, K, E]
    uses = uses.any(2)  # [S, M, E]
    first = np.where(uses.any(0), uses.argmax(0), len(uses))  # the first token to use each
    certain = _named(first[: layer + 1] < len(uses))
    certain.sort(key=lambda expert: first[expert])
    length = len(uses) if len(certain) <= room else int(first[certain[room]])
    tokens = uses[:length].sum(0)
    guesses = [expert for expert in _named(tokens > 0) if expert[0] > layer]
    guesses.sort(key=lambda expert: tokens[expert], reverse=True)
    return length, [*certain[:room], *guesses]


def _named(mask: npt.NDArray[np.bool_]) -> list[Expert]:
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(mask)]


class SlotRequests:
    """The slots of a bundle's experts in `pools`, and the steps that a runtime's `run` makes.

    The budget is in bytes, or text: "1500MB", "50%". Raises `InputError` for one that is too small,
    `ResourceError` where the device has not as much, and `BundleError` for a bundle that cannot be
    paged.
    """

    def __init__(
        self, bundle: Bundle, file: ExpertFile, pools: SlotPools, budget: int | str, run: Run
    ) -> None:
        moe = there(bundle.config.moe)
        if isinstance(budget, str):
            budget = budget_bytes(budget, len(file.sizes) * pools.slot_bytes)
        count = slot_count(
            budget, pools.slot_bytes, len(file.sizes), least=len(moe.layers) * moe.top_k
        )
        self.slots = ExpertSlots(file, pools, count, (len(moe.layers), moe.num_experts))
        self.routing = RequestRouting(bundle, self.slots.experts)
        held = weakref.WeakMethod(run)  # the runtime holds this: a closed one is free at once
        self.replay = Replay(self.slots, lambda *given: there(held())(*given))
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
