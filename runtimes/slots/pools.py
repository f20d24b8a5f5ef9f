"""Slots whose parts are rows of pools: one array per kind of weight, as graphs take them.

A graph has one input per kind, `slots.<kind>` `[slots, ...]` (`export/expert_slots.py`), and slot s
is row s of each. The pools never move, so that what was bound to them, or recorded in a CUDA graph,
stays right: only their contents change.
"""

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.paging.expert_file import Bytes
from medmoe_edge.runtimes.slots.memory import Event, Slot


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


class Buffer(Protocol):
    """Memory of the device, freed with the object."""

    address: int


class PoolDevice(Protocol):
    """A device that pools lie on. May be used from several threads."""

    @property
    def unified(self) -> bool:
        """Whether the CPU has the same memory."""
        ...

    def zeros(self, size: int) -> Buffer:
        """So many bytes of the device's own memory, all zero; raises `ResourceError`."""
        ...

    def pinned(self, size: int) -> Bytes:
        """Zeros on the host, page-locked, which the device sees at the same address."""
        ...

    def send(self, source: Bytes, address: int) -> Event:
        """Begin to copy page-locked bytes to the device, beside what it computes; in order."""
        ...

    def synchronise(self) -> None:
        """Wait until the device has computed and filled with zeros all that it was told to."""
        ...


class PooledMemory:
    """The memory of slots with parts of these kinds; a slot is its number."""

    def __init__(self, device: PoolDevice, kinds: Sequence[Kind]) -> None:
        self.device, self.kinds = device, kinds
        self.unified = device.unified
        self.addresses: dict[str, int] = {}
        self._pools: list[Any] = []  # buffers, or arrays of unified memory

    def allocate(self, count: int, size: int) -> list[Slot]:
        """So many slots, all zero, once; raises `ResourceError`."""
        assert size == sum(kind.bytes for kind in self.kinds)
        for kind in self.kinds:
            if self.unified:
                pool: Any = self.device.pinned(count * kind.bytes)
                self.addresses[kind.name] = pool.ctypes.data
            else:
                pool = self.device.zeros(count * kind.bytes)
                self.addresses[kind.name] = pool.address
            self._pools.append(pool)
        self.device.synchronise()  # copies do not wait for the zeros
        return list(range(count))

    def in_place(self, slot: Slot) -> Sequence[Bytes]:
        """The parts of a slot of unified memory as the host sees them."""
        rows = zip(self._pools, self.kinds, strict=True)
        return [pool[slot * kind.bytes : (slot + 1) * kind.bytes] for pool, kind in rows]

    def host(self, size: int) -> Bytes:
        """Page-locked memory; raises `ResourceError`."""
        return self.device.pinned(size)

    def copy(self, source: Bytes, slot: Slot) -> Event:
        """Begin to copy an expert's kinds to their rows."""
        ends = list(itertools.accumulate(kind.bytes for kind in self.kinds))
        for kind, end in zip(self.kinds, ends, strict=True):
            address = self.addresses[kind.name] + slot * kind.bytes
            event = self.device.send(source[end - kind.bytes : end], address)
        return event  # in order: when the last one has ended, all have

    def finish(self) -> None:
        """Wait until all that was computed has read its slots."""
        self.device.synchronise()


class HostDevice:
    """The CPU as a device, to which nothing needs to be copied; with `unified=False` it is all the
    same, at once.
    """

    def __init__(self, *, unified: bool = True) -> None:
        self.unified = unified

    def zeros(self, size: int) -> Buffer:
        """So many bytes, all zero."""
        return _HostBuffer(size)

    def pinned(self, size: int) -> Bytes:
        """So many bytes, all zero."""
        return np.zeros(size, np.uint8)

    def send(self, source: Bytes, address: int) -> Event:
        """Copy."""
        ctypes.memmove(address, source.ctypes.data, source.nbytes)
        return _Done()

    def synchronise(self) -> None:
        """Nothing: what the CPU computed has ended when it returns."""


class _HostBuffer:
    def __init__(self, size: int) -> None:
        self._array = np.zeros(size, np.uint8)
        self.address = self._array.ctypes.data


class _Done:
    def wait(self) -> None:
        pass
