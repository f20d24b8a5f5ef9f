"""The expert pager: which experts are in memory, under one budget of bytes.

It knows nothing of devices. A `Store` brings an expert into memory and releases it; the pager says
when. An expert in use is pinned; room is made by releasing those that are worth least, and among
equals the least recently used. An expert's worth is the share of tokens that its layer is expected
to route to it (`PagedExperts.expect`). On nano at half of the experts' bytes this misses 9.6 times
a request, LRU alone 14.9, GreedyDual (worth that ages) 11.4, knowing the future shares 10.1: a
prefill visits the layers in a circle, where the least recently used is what comes next.

Several models share one budget by opening their experts on the same pager. All of it may be called
from any thread.

Experts' bytes are read as they lie in a bundle: one sequential read each, checked by their hash,
into one buffer or several. They are read rather than mapped: a file that shrinks under us is an
error instead of a SIGBUS.
"""

import contextlib
import hashlib
import io
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from threading import Condition, Lock
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import BundleError, InputError, MedMoEError

Expert = tuple[int, int]  # the layer, counted among those with experts, and the expert in it

T = TypeVar("T")


class Store(Protocol[T]):
    """Where experts come from. One `load` runs at a time; `release` is quick."""

    @property
    def sizes(self) -> Mapping[Expert, int]:
        """Bytes that each takes while it is in memory."""

    @property
    def stored(self) -> Mapping[Expert, int]:
        """Bytes that are read to load each."""

    @property
    def scratch(self) -> int:
        """Further bytes while one is being loaded, at most."""

    def announce(self, experts: Sequence[Expert]) -> None:
        """Hear which will be loaded, in order: time to read ahead."""

    def load(self, expert: Expert) -> T:
        """Bring one into memory; where it raises, nothing of it is left there."""

    def release(self, value: T) -> None:
        """Take it out of memory: the bytes are free when this returns."""


@dataclass
class Counts:
    """What became of the experts asked for.

    `hits` were in memory, `late` on their way, `misses` neither; `loads` of `bytes_read` were
    made, with those ahead of need, and `stall` seconds spent waiting for experts.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    loads: int = 0
    bytes_read: int = 0
    stall: float = 0.0


logger = logging.getLogger(__name__)


class _State(Enum):
    ABSENT = "its bytes are reserved"
    LOADING = "on its way"
    READY = "in memory"


@dataclass(eq=False)
class _Slot:
    """One expert's place: reserved as long as it is pinned or in memory."""

    owner: "PagedExperts[Any]"
    expert: Expert
    size: int
    state: _State = _State.ABSENT
    value: Any = None
    pins: int = 0
    last_use: int = 0

    @property
    def worth(self) -> tuple[float, int]:
        return self.owner.worth(self.expert), self.last_use


class ExpertPager:
    """A budget in bytes for the experts of any number of models, with `at_once` of them loading."""

    def __init__(self, budget: int, *, at_once: int = 1) -> None:
        self.budget, self.at_once = budget, at_once
        self.changed = Condition()  # guards all below; notified of every change
        self.slots: dict[tuple[int, Expert], _Slot] = {}
        self.scratch = 0
        self.needs: dict[PagedExperts[Any], tuple[int, int]] = {}  # open: a layer's bytes, scratch
        self.used = 0
        self._clock = 0
        self._loading = 0
        self.urgent = 0  # loads that somebody waits for, which go before those ahead of need
        self.ahead = ThreadPoolExecutor(at_once, "expert-prefetch")  # starts with its first task

    def open(self, store: Store[T], at_once: int) -> "PagedExperts[T]":
        """The experts of one model, of which one layer needs `at_once` together.

        Raises `InputError` for a budget that is too small, with the least that works: the loading
        of this one's experts must leave room for a layer of each that was opened before.
        """
        experts, own = PagedExperts(self, store), at_once * max(store.sizes.values())
        with self.changed:
            needs = {**self.needs, experts: (own, store.scratch)}
            layer, scratch = map(max, zip(*needs.values(), strict=True))
            least = layer + self.at_once * scratch
            if self.budget < least:
                raise InputError(
                    f"A memory budget of {self.budget:,} bytes is too small for this model.",
                    f"One layer's experts and the loading of one take {least:,} bytes: allow as "
                    "many.",
                )
            self.needs, self.scratch = needs, scratch
        return experts

    @property
    def capacity(self) -> int:
        """Bytes for experts: the budget less what loading takes."""
        return self.budget - self.at_once * self.scratch

    def claim(self, owner: "PagedExperts[Any]", experts: Iterable[Expert]) -> list[_Slot]:
        """Pin a place for each, together, as soon as others have let go of enough."""
        wanted = list(experts)
        with self.changed:
            while (missing := self._make_room(owner, wanted)) is None:
                self.changed.wait()
            return self._pin(owner, wanted, missing)

    def claim_ahead(self, owner: "PagedExperts[Any]", expert: Expert) -> _Slot | None:
        """Pin a place for one that may be needed, at no cost to any that is worth as much."""
        with self.changed:
            if (owner.key(expert)) in self.slots:
                return None
            missing = self._make_room(owner, [expert], below=owner.worth(expert))
            return self._pin(owner, [expert], missing)[0] if missing is not None else None

    def fill(self, slot: _Slot, *, urgent: bool) -> None:
        """Load what a pinned place is for, unless somebody else does; raises as the store does."""
        with self.changed:
            while slot.state is _State.LOADING:
                self.changed.wait()
            if slot.state is _State.READY:
                return
            slot.state = _State.LOADING
        state = _State.ABSENT
        try:
            with self._turn(urgent):
                slot.value = slot.owner.load(slot.expert)
            state = _State.READY
        finally:  # whatever happened, an interrupt included
            with self.changed:
                slot.state = state
                self.changed.notify_all()

    def unpin(self, slots: Iterable[_Slot]) -> None:
        """Let go; what could not be loaded loses its place."""
        with self.changed:
            for slot in slots:
                slot.pins -= 1
                if not slot.pins and slot.state is _State.ABSENT:
                    self._drop(slot)
            self.changed.notify_all()

    def release_all(self, owner: "PagedExperts[Any]") -> None:
        """Release a model's experts, once none of them is pinned."""
        with self.changed:
            while any(slot.pins for slot in self._own(owner)):
                self.changed.wait()
            for slot in self._own(owner):
                self._drop(slot)
            self.needs.pop(owner, None)
            self.scratch = max((scratch for _, scratch in self.needs.values()), default=0)
            self.changed.notify_all()

    def _own(self, owner: "PagedExperts[Any]") -> list[_Slot]:
        """As they are now: others may take their places while one waits."""
        return [slot for slot in self.slots.values() if slot.owner is owner]

    def _make_room(
        self, owner: "PagedExperts[Any]", wanted: Sequence[Expert], below: float | None = None
    ) -> list[Expert] | None:
        """Those of `wanted` that have no place, with room made for all of them; None without room.

        Only what is worth less than `below` makes room.
        """
        keys = {owner.key(expert) for expert in wanted}
        missing = [
            expert for expert in dict.fromkeys(wanted) if owner.key(expert) not in self.slots
        ]
        lacking = self.used + sum(map(owner.store.sizes.__getitem__, missing)) - self.capacity
        if lacking <= 0:  # as it nearly always is
            return missing
        victims: list[_Slot] = []
        free = [slot for key, slot in self.slots.items() if not slot.pins and key not in keys]
        for slot in sorted(free, key=lambda slot: slot.worth):
            if lacking <= 0 or (below is not None and slot.worth[0] >= below):
                break
            victims.append(slot)
            lacking -= slot.size
        if lacking > 0:
            return None
        for slot in victims:
            self._drop(slot)
        return missing

    def _pin(
        self, owner: "PagedExperts[Any]", wanted: Sequence[Expert], missing: Sequence[Expert]
    ) -> list[_Slot]:
        for expert in missing:
            slot = _Slot(owner, expert, owner.store.sizes[expert])
            self.slots[owner.key(expert)] = slot
            self.used += slot.size
        slots = [self.slots[owner.key(expert)] for expert in wanted]
        self._clock += 1
        for slot in slots:
            slot.pins += 1
            slot.last_use = self._clock
        return slots

    def _drop(self, slot: _Slot) -> None:
        del self.slots[slot.owner.key(slot.expert)]
        value, slot.value = slot.value, None
        if slot.state is _State.READY:
            slot.owner.store.release(value)
        self.used -= slot.size

    @contextmanager
    def _turn(self, urgent: bool) -> Iterator[None]:
        """As many loads at a time as the budget holds what they take."""
        with self.changed:
            self.urgent += urgent
            try:
                while self._loading == self.at_once or (self.urgent and not urgent):
                    self.changed.wait()
                self._loading += 1
            finally:
                self.urgent -= urgent
        try:
            yield
        finally:
            with self.changed:
                self._loading -= 1
                self.changed.notify_all()


Budget = int | str | ExpertPager  # bytes, as text ("1500MB", "50%" of a model's), or one to share


class PagedExperts(Generic[T]):
    """One model's experts on a pager."""

    def __init__(self, pager: ExpertPager, store: Store[T]) -> None:
        self.pager, self.store = pager, store
        self.counts = Counts()
        self._expected: Mapping[Expert, float] = {}
        self._wishes: deque[Expert] = deque()

    @contextmanager
    def use(self, *experts: Expert) -> Iterator[list[T]]:
        """The experts, in memory for as long as the context lasts; no other `use` inside.

        Raises what the store raises.
        """
        start = time.perf_counter()
        with self.pager.changed:
            for expert in experts:
                self._count(expert)
        slots = self.pager.claim(self, experts)
        try:
            for slot in slots:
                self.pager.fill(slot, urgent=True)
            with self.pager.changed:
                self.counts.stall += time.perf_counter() - start
            yield [slot.value for slot in slots]
        finally:
            self.pager.unpin(slots)

    def expect(self, shares: Mapping[Expert, float]) -> None:
        """What share of its layer's tokens each expert is expected to get, unnamed ones none."""
        with self.pager.changed:
            self._expected = dict(shares)

    def worth(self, expert: Expert) -> float:
        """The share that was expected last."""
        return self._expected.get(expert, 0.0)

    def most_worth(self) -> list[Expert]:
        """The experts expected to be used that fit into the budget together, best first."""
        expected = [expert for expert in self.store.sizes if self.worth(expert)]
        room, chosen = self.pager.capacity, []
        for expert in sorted(expected, key=self.worth, reverse=True):
            room -= self.store.sizes[expert]
            if room < 0:
                break
            chosen.append(expert)
        return chosen

    def prefetch(self, experts: Iterable[Expert]) -> None:
        """Load these in the background, in order, in the place of earlier wishes."""
        self._wishes = deque(self.announce(experts))
        for _ in range(min(len(self._wishes), self.pager.at_once)):
            self._fetch_later()

    def announce(self, experts: Iterable[Expert]) -> list[Expert]:
        """Let the store know which will be loaded: those of `experts` that are absent."""
        with self.pager.changed:
            absent = [expert for expert in experts if self.key(expert) not in self.pager.slots]
        if absent:
            self.store.announce(absent)
        return absent

    def close_later(self) -> None:
        """Have another thread `close`, for a finalizer: it may run inside of any call here."""
        with contextlib.suppress(RuntimeError):  # the interpreter ends, and all with it
            self.pager.ahead.submit(self.close)

    def close(self) -> None:
        """Release all; waits for a load under way."""
        self._wishes.clear()
        self.pager.release_all(self)

    def key(self, expert: Expert) -> tuple[int, Expert]:
        """The expert's name among all on the pager."""
        return id(self), expert

    def load(self, expert: Expert) -> T:
        """Load one from the store, and count it."""
        value = self.store.load(expert)
        self.counts.loads += 1
        self.counts.bytes_read += self.store.stored[expert]
        return value

    def _count(self, expert: Expert) -> None:
        slot = self.pager.slots.get(self.key(expert))
        if slot is None or slot.state is _State.ABSENT:
            self.counts.misses += 1
        elif slot.state is _State.READY:
            self.counts.hits += 1
        else:
            self.counts.late += 1

    def _fetch(self) -> None:
        """One of the wishes, and then the next: a task each, as none begins when Python ends."""
        try:
            expert = self._wishes.popleft()
        except IndexError:  # fulfilled, or taken back
            return
        slot = self.pager.claim_ahead(self, expert)
        try:
            if slot is not None:
                self.pager.fill(slot, urgent=False)
        except MedMoEError as error:  # the request that needs it will meet it itself
            logger.debug("Expert %s was not fetched ahead: %s", expert, error)
        finally:
            self.pager.unpin([slot] if slot else [])
        self._fetch_later()

    def _fetch_later(self) -> None:
        with contextlib.suppress(RuntimeError):  # the interpreter ends
            self.pager.ahead.submit(self._fetch)


def least_budget(store: Store[Any], at_once: int, loads: int = 1) -> int:
    """Bytes without which a step cannot run: `at_once` experts of a layer, and what loads take."""
    return at_once * max(store.sizes.values()) + loads * store.scratch


Bytes = npt.NDArray[np.uint8]

Check = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Extent:
    """Where an expert's weights lie, and their hash.

    In a portable bundle also the graph that runs them, and how many bytes they take when loaded.
    """

    name: str
    offset: int
    bytes: int
    sha256: str
    graph: str = ""
    loaded_bytes: int = 0


class ExpertFile:
    """The routed experts in their file of a bundle, kept open until this is collected.

    `check` says when an expert's hash is compared with the manifest's: when it is "first" read from
    the file as it is, "always" or "never". With `drop_pages` what was read does not stay in the
    kernel's page cache: the memory is really free, and the expert's next load reads the storage
    again. Raises `BundleError` where the bundle says no hashes of single experts.
    """

    def __init__(self, bundle: Bundle, *, check: Check = "first", drop_pages: bool = False) -> None:
        self.extents = read_extents(bundle)
        self._check, self._drop_pages = check, drop_pages
        self._path = bundle.path(bundle.manifest["paging"].get("file", "decoder.data"))
        self._checked: set[tuple[Expert, int, int]] = set()  # and of which size and time the file
        self._file = self._path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)

    @property
    def sizes(self) -> Mapping[Expert, int]:
        """Bytes of each expert."""
        return {expert: extent.bytes for expert, extent in self.extents.items()}

    def announce(self, experts: Iterable[Expert]) -> None:
        """Have the kernel read ahead what will be read."""
        for expert in experts:
            self._advise(self.extents[expert], "POSIX_FADV_WILLNEED")

    def read(self, expert: Expert, *into: Bytes) -> None:
        """Read one to the front of `into`; raises `BundleError` for bytes that are not its own."""
        extent, file = self.extents[expert], os.fstat(self._file.fileno())
        content = _cut([part.data for part in into], extent.bytes)
        start = extent.offset
        for part in content:
            if not _fill(part, self._file, start):
                raise self._damaged(extent)
            start += len(part)
        if self._drop_pages:
            self._advise(extent, "POSIX_FADV_DONTNEED")
        seen = expert, file.st_size, file.st_mtime_ns
        if self._check == "always" or (self._check == "first" and seen not in self._checked):
            digest = hashlib.sha256()
            for part in content:
                digest.update(part)
            if digest.hexdigest() != extent.sha256:
                raise self._damaged(extent)
            self._checked.add(seen)

    def _advise(self, extent: Extent, advice: str) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), extent.offset, extent.bytes, getattr(os, advice))

    def _damaged(self, extent: Extent) -> BundleError:
        return BundleError(
            f"{extent.name.capitalize()} in {self._path} was changed or is incomplete.",
            "Copy or export the bundle again.",
        )


def read_extents(bundle: Bundle) -> dict[Expert, Extent]:
    """The bundle's routed experts; raises `BundleError` where it has no graphs to page them."""
    paging = bundle.manifest.get("paging")
    if bundle.config.moe is None or not paging:
        raise BundleError(
            f"{bundle.name} cannot be paged: it has "
            + ("no graphs of single experts." if bundle.config.moe else "no experts."),
            "Leave the memory budget out, or export the checkpoint again with this version.",
        )
    extents = {}
    for index, layer in enumerate(bundle.config.moe_layers):
        for number in range(bundle.config.moe.num_experts):
            owner = f"decoder.layers.{layer}.ffn.experts.{number}"
            offset, size = bundle.manifest["experts"][owner]
            own = paging["experts"][owner]
            extents[index, number] = Extent(
                f"expert {number} of layer {layer}",
                *(offset, size, own["sha256"], own.get("graph", ""), own.get("bytes", 0)),
            )
    return extents


_SEEKING = Lock()


def _fill(content: memoryview, file: io.FileIO, start: int) -> bool:
    """Read bytes from a place in a file, from any thread; False where the file ends before.

    Where the system can, without moving the file's own place, which forked processes share.
    """
    while len(content):
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [content], start)
        else:  # Windows
            with _SEEKING:
                file.seek(start)
                count = file.readinto(content)
        if not count:
            return False
        content, start = content[count:], start + count
    return True


def _cut(parts: Sequence[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes of parts that follow one another."""
    found = []
    for part in parts:
        found.append(part[:size])
        size -= len(found[-1])
    return found
