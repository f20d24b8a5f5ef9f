"""A device's memory, as expert slots and engines ask for it, and the CPU's own.

On a GPU with memory of its own, what it computes from is filled by copies from page-locked host
memory, on a stream of their own beside the compute. Where CPU and GPU share one DRAM, as on a
Jetson, the host writes where the GPU reads, and nothing is kept or copied twice.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from medmoe_edge.runtimes.paging.expert_file import Bytes


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
