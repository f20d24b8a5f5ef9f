"""The KV cache of ONNX Runtime's runtimes."""

from collections.abc import Iterable, Iterator

import numpy as np
import onnxruntime as ort

from medmoe_edge.config import DecoderConfig
from medmoe_edge.runtimes.base import CacheArray


class OrtCache:
    """One buffer `[1, H, capacity, head_size]` per layer for keys and one for values.

    A buffer lies on the device, and is bound both as what a step reads and as what it writes:
    nothing is copied.
    """

    def __init__(
        self, decoder: DecoderConfig, capacity: int, dtype: type[np.generic], device: str
    ) -> None:
        shape = (1, decoder.heads, capacity, decoder.head_size)
        self.capacity = capacity
        self.length = 0
        self.dtype = np.dtype(dtype)
        self.origin = f"onnxruntime {ort.__version__} {device}"
        self.buffers = {
            f"{kind}.{layer}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
            for layer in range(decoder.layers)
            for kind in ("key", "value")
        }

    def arrays(self) -> Iterator[CacheArray]:
        """What it holds, `[H, length, head_size]`: keys and values of each layer in turn."""
        for buffer in self.buffers.values():
            yield buffer.numpy()[0, :, : self.length]

    def fill(self, arrays: Iterable[CacheArray]) -> None:
        """Hold those instead; their number, shape and type must be right."""
        for buffer, array in zip(self.buffers.values(), arrays, strict=True):
            whole = np.zeros(buffer.shape(), self.dtype)
            whole[0, :, : array.shape[1]] = array
            buffer.update_inplace(whole)
            self.length = array.shape[1]
