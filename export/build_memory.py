"""What an engine build takes of this machine's memory: asked before, measured after.

Linux tells both (man 5 proc); elsewhere nothing is known, and None is said.
"""

import contextlib
import re
from pathlib import Path

from medmoe_edge.errors import ResourceError

# Measured with TensorRT for RTX 1.7.1 on 1 to 4 layers of StableLM-2-1.6B, int4 and int8, beyond
# the pages of the weight file, which the system may take back: 2 to 3 times the weights.
TIMES_THE_WEIGHTS = 3
FIXED = 400 * 2**20
MB = 10**6
STATUS, CLEAR, MEMORY = "/proc/self/status", "/proc/self/clear_refs", "/proc/meminfo"


def build_memory(weights: int) -> int:
    """Bytes that a build from so many bytes of weights takes, at most."""
    return TIMES_THE_WEIGHTS * weights + FIXED


def check_memory(weights: int, available: int | None) -> None:
    """Raise `ResourceError` where a build from so many bytes of weights would not fit."""
    needed = build_memory(weights)
    if available is not None and needed > available:
        raise ResourceError(
            f"The build needs about {needed // MB} MB of memory, {available // MB} MB are free.",
            "Close other programs, or build on a machine with more memory.",
        )


def available_memory() -> int | None:
    """Bytes that a process may take without swapping."""
    return _field(MEMORY, "MemAvailable")


def reset_peak() -> None:
    """Let `peak_memory` count from now; where that is forbidden, it counts from the beginning."""
    with contextlib.suppress(OSError):
        Path(CLEAR).write_text("5")


def peak_memory() -> int | None:
    """The most bytes of memory that this process held at a time, mapped files included."""
    return _field(STATUS, "VmHWM")


def _field(file: str, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
