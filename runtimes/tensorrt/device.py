"""What the TensorRT runtime asks of a CUDA device: memory, one stream, and graphs captured from it.

Expert slots (`slots/slots.py`) are filled on a stream of their own, beside it. Written against
cuda-core, NVIDIA's own bindings, so that no torch is needed. There was no GPU to execute it on.
"""

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import MissingDependencyError, ResourceError, shown_bytes
from medmoe_edge.runtimes.paging.pager import Bytes
from medmoe_edge.runtimes.slots.slots import DeviceMemory, Event

Array = npt.NDArray[Any]


class MirroredArray(Protocol):
    """An array on the host, `host`, and its twin on the device, at `address`."""

    host: Array
    address: int

    def upload(self) -> None:
        """Host to device, when the stream comes to it."""

    def download(self) -> None:
        """Device to host, when the stream comes to it."""


class Device(DeviceMemory, Protocol):
    """A GPU with one stream, on which everything but `send` happens in order."""

    sm: str
    stream: int

    def mirror(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> MirroredArray:
        """A mirrored array."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` puts on the stream, without doing it; returns what replays it."""


class CudaDevice:
    """The first GPU that CUDA shows; raises `ResourceError` where there is none."""

    def __init__(self, extra: str) -> None:
        try:
            from cuda.core import Device, LegacyPinnedMemoryResource
        except ModuleNotFoundError as error:
            raise MissingDependencyError("cuda-core", extra) from error
        try:
            self._device = Device()
            self._device.set_current()
            self._stream = self._device.create_stream()
            self._copies = self._device.create_stream()
        except Exception as error:  # cuda-core's exceptions share no base, and differ by what lacks
            raise ResourceError(
                "This bundle needs an NVIDIA GPU and its driver, and none can be used here.",
                "Run medmoe-edge doctor, or use a bundle for ONNX Runtime.",
            ) from error
        self._pinned = LegacyPinnedMemoryResource()
        self.sm = f"sm{self._device.arch}"
        self.unified = bool(self._device.properties.integrated)
        self.stream = int(self._stream.handle)

    def zeros(self, size: int) -> "CudaBuffer":
        """So many bytes, all zero."""
        buffer = CudaBuffer(self._allocate(self._device, size))
        buffer.memory.fill(0, stream=self._stream)
        return buffer

    def mirror(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> "CudaArray":
        """A mirrored array, page-locked on the host so that copies need not wait."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        pinned, memory = self._allocate(self._pinned, size), self._allocate(self._device, size)
        return CudaArray(pinned, memory, dtype, shape, self._stream)

    def pinned(self, size: int) -> Bytes:
        """Zeros on the host, page-locked; unified addressing gives the device the same address."""
        self._device.set_current()  # experts are fetched on threads of their own
        memory = self._allocate(self._pinned, size)
        raw: Any = (ctypes.c_uint8 * size).from_address(int(memory.handle))
        weakref.finalize(raw, memory.close)
        array: Bytes = np.frombuffer(raw, np.uint8)
        array[:] = 0
        return array

    def send(self, source: Bytes, address: int) -> Event:
        """Copy on the stream for copies; the event is recorded behind it."""
        from cuda.core import Buffer as Memory

        self._device.set_current()
        here, there = (
            Memory.from_handle(at, source.nbytes) for at in (source.ctypes.data, address)
        )
        there.copy_from(here, stream=self._copies)
        return CudaEvent(self._copies.record())

    def synchronise(self) -> None:
        """Wait until the stream has done everything."""
        self._stream.sync()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` puts on the stream, without doing it; returns what replays it."""
        builder = self._stream.create_graph_builder()
        builder.begin_building("thread_local")
        try:
            work()
        finally:
            builder.end_building()
        graph = builder.complete()
        return lambda: graph.launch(self._stream)

    def _allocate(self, source: Any, size: int) -> Any:
        try:
            return source.allocate(size, stream=self._stream)
        except Exception as error:  # as above
            raise ResourceError(
                f"There is no {shown_bytes(size)} of memory left for the GPU.",
                "Close other programs that use it, or use a smaller bundle (--int4).",
            ) from error


class CudaEvent:
    """A copy under way."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        """Return when the copy has ended."""
        self._event.sync()


class CudaBuffer:
    """Device memory."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.address = int(memory.handle)


class CudaArray:
    """Page-locked host memory, seen as an array, and its twin on the device."""

    def __init__(
        self, pinned: Any, memory: Any, dtype: np.dtype[Any], shape: tuple[int, ...], stream: Any
    ) -> None:
        self._pinned, self._memory, self._stream = pinned, memory, stream
        self.address = int(memory.handle)
        raw = (ctypes.c_byte * pinned.size).from_address(int(pinned.handle))
        self.host = np.frombuffer(raw, dtype).reshape(shape)

    def upload(self) -> None:
        """Host to device, when the stream comes to it."""
        self._memory.copy_from(self._pinned, stream=self._stream)

    def download(self) -> None:
        """Device to host, when the stream comes to it."""
        self._pinned.copy_from(self._memory, stream=self._stream)
