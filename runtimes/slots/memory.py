"""What expert slots ask of a device's memory, and that of the CPU.

A slot is one contiguous buffer here, or several (`slot_pools.py`). On a GPU with memory of its own
it is filled by a copy on a stream of its own, beside the compute, from page-locked host memory;
where CPU and GPU share one DRAM, as on a Jetson, the host writes into the slot itself, and nothing
is kept or copied twice.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from medmoe_edge.runtimes.paging.expert_file import Bytes

Slot = Any  # what the device's library takes for a buffer of bytes


class Event(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Return when the copy has ended; raises what it failed with."""


class DeviceMemory(Protocol):
    """Memory that a device computes from. May be used from several threads."""

    @property
    def unified(self) -> bool:
        """Whether the host writes slots `in_place`; otherwise they are filled by copies."""
        ...

    def allocate(self, count: int, size: int) -> list[Slot]:
        """So many slots of `size` bytes, all zero; raises `ResourceError`."""
        ...

    def in_place(self, slot: Slot) -> Sequence[Bytes]:
        """The parts of a slot of unified memory as the host sees them."""
        ...

    def host(self, size: int) -> Bytes:
        """Host memory to copy from; raises `ResourceError`."""
        ...

    def copy(self, source: Bytes, slot: Slot) -> Event:
        """Begin to copy `source` to the front of a slot; copies end in the order they began."""
        ...

    def finish(self) -> None:
        """Wait until all that this thread has had computed has read its slots."""


class CpuMemory:
    """The CPU's own, which is unified. Made with `unified=False` it behaves as a GPU's does: slots
    are filled by copies that a thread makes one after another.
    """

    def __init__(self, *, unified: bool = True) -> None:
        self.unified = unified
        self._stream = ThreadPoolExecutor(1, "expert-copy")  # starts with its first copy

    def allocate(self, count: int, size: int) -> list[Slot]:
        """So many slots of `size` bytes, all zero."""
        return [np.zeros(size, np.uint8) for _ in range(count)]

    def in_place(self, slot: Slot) -> Sequence[Bytes]:
        """The slot."""
        return (slot,)

    def host(self, size: int) -> Bytes:
        """Host memory to copy from."""
        return np.empty(size, np.uint8)

    def copy(self, source: Bytes, slot: Slot) -> Event:
        """Have the thread copy `source` to the front of a slot."""
        return _CpuCopy(self._stream.submit(np.copyto, slot[: len(source)], source))

    def finish(self) -> None:
        """Nothing: what the CPU computed has ended when it returns."""


class _CpuCopy:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()
