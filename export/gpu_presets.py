"""GPUs by the names people type: compute capability, memory, and the library that serves them.

Compute capabilities: developer.nvidia.com/cuda-gpus. What TensorRT for RTX compiles for: its
`ComputeCapability`; it refuses int4, bf16 and fp32 products on sm75, tried with 1.7.1.
"""

import difflib
from dataclasses import dataclass

from medmoe_edge.errors import InputError
from medmoe_edge.export.tensorrt_library import TITLES, Library

GB = 10**9
RTX_CAPABILITIES = (80, 86, 89, 120, 121)
TURING = 75


@dataclass(frozen=True)
class Gpu:
    """A GPU to build for; `memory` in bytes, None where only a compute capability was named."""

    name: str
    capability: int
    memory: int | None = None

    @property
    def sm(self) -> str:
        """The compute capability as it is written: `sm89`."""
        return f"sm{self.capability}"

    @property
    def library(self) -> Library:
        """The library that serves it."""
        return "tensorrt-rtx" if self.capability in RTX_CAPABILITIES else "tensorrt"


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        *(Gpu(f"sm{number}", number) for number in (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)),
        Gpu("t4", 75, 16 * GB),
        Gpu("rtx-2080", 75, 8 * GB),
        Gpu("a100", 80, 40 * GB),
        Gpu("rtx-3060", 86, 12 * GB),
        Gpu("rtx-3090", 86, 24 * GB),
        Gpu("rtx-4060", 89, 8 * GB),
        Gpu("rtx-4070", 89, 12 * GB),
        Gpu("rtx-4090", 89, 24 * GB),
        Gpu("l4", 89, 24 * GB),
        Gpu("l40", 89, 48 * GB),
        Gpu("rtx-5070", 120, 12 * GB),
        Gpu("rtx-5080", 120, 16 * GB),
        Gpu("rtx-5090", 120, 32 * GB),
        Gpu("rtx-pro-6000", 120, 96 * GB),
        Gpu("dgx-spark", 121, 128 * GB),
        # Jetson: shared with the system
        Gpu("orin", 87),
        Gpu("orin-nano-8g", 87, 8 * GB),
        Gpu("orin-agx-64g", 87, 64 * GB),
        Gpu("thor", 110, 128 * GB),
        Gpu("h100", 90, 80 * GB),
        Gpu("h200", 90, 141 * GB),
        Gpu("b200", 100, 180 * GB),
    )
}


def find_gpu(name: str, library: Library) -> Gpu:
    """The GPU of a name ("rtx-4090", "RTX 4090", "sm89") that `library` is to build for.

    Raises `InputError` for a name nobody knows and for a GPU that another library serves.
    """
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise InputError(f"There is no GPU {name!r}.", f"{hint}Use one of: {', '.join(GPUS)}.")
    gpu = GPUS[key]
    if gpu.capability == TURING:
        raise InputError(
            f"{gpu.name} (Turing, sm75) computes neither int4 nor bf16, and "
            f"{TITLES['tensorrt-rtx']} no fp32 products on it.",
            "Use --target onnxruntime-cuda, or a GPU of sm80 or later.",
        )
    if gpu.library != library:
        raise InputError(
            f"{TITLES[library]} does not serve {gpu.name} ({gpu.sm}).",
            f"Use --target {gpu.library}, which does.",
        )
    return gpu
