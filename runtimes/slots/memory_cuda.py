"""Expert slots in a CUDA device's memory, through PyTorch.

Written against PyTorch's and CUDA's documentation; there was no GPU to execute it on.
"""

import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from medmoe_edge.errors import ResourceError, shown_bytes
from medmoe_edge.runtimes.paging.expert_file import Bytes
from medmoe_edge.runtimes.slots.memory import Event, Slot


class CudaMemory:
    """Memory of the current CUDA device.

    Beside a GPU's own memory, copies run on a stream of their own from page-locked host memory. On
    an integrated GPU (Jetson) slots are page-locked host memory, which the GPU reads where it lies:
    unified addressing gives it the same address.
    """

    def __init__(self) -> None:
        self.unified = bool(torch.cuda.get_device_properties("cuda").is_integrated)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._hosts: dict[int, Bytes] = {}  # of mapped slots, by address

    def allocate(self, count: int, size: int) -> list[Slot]:
        """So many tensors of `size` bytes, all zero; raises `ResourceError`."""
        if self.unified:
            return [self._mapped(size) for _ in range(count)]
        try:
            slots = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(count)]
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"The GPU has no {shown_bytes(count * size)} of memory for experts.",
                "Give a smaller memory budget.",
            ) from error
        torch.cuda.synchronize()  # the copy stream does not wait for the zeros
        return list(slots)

    def in_place(self, slot: Slot) -> Sequence[Bytes]:
        """A mapped slot as the host sees it."""
        return (self._hosts[slot.data_ptr()],)

    def host(self, size: int) -> Bytes:
        """Page-locked memory, zero; raises `ResourceError`.

        PyTorch's own would be rounded up to a power of two.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        try:
            array = np.frombuffer(mmap.mmap(-1, size), np.uint8)
            torch.cuda.check_error(runtime.cudaHostRegister(array.ctypes.data, size, 0))
        except (OSError, RuntimeError) as error:
            raise ResourceError(
                f"The system locks no {shown_bytes(size)} of memory for an expert.",
                "Free memory, or raise the limit on locked memory (ulimit -l).",
            ) from error
        weakref.finalize(array, runtime.cudaHostUnregister, array.ctypes.data)
        return array

    def copy(self, source: Bytes, slot: Slot) -> Event:
        """Put a copy on the copy stream."""
        with torch.cuda.stream(self._stream):
            slot[: len(source)].copy_(torch.from_numpy(source), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _CudaCopy(event)

    def finish(self) -> None:
        """Wait for the stream that this thread computes on."""
        torch.cuda.current_stream().synchronize()

    def _mapped(self, size: int) -> Slot:
        host = self.host(size)
        slot = torch.as_tensor(_Mapped(host), device="cuda")
        self._hosts[slot.data_ptr()] = host
        return slot


class _CudaCopy:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class _Mapped:
    """Page-locked host memory as an array of the device, see Numba's CUDA Array Interface."""

    def __init__(self, host: Bytes) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": host.shape,
            "typestr": "|u1",
            "data": (host.ctypes.data, False),
            "version": 3,
        }
