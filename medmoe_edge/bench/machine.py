"""What this machine and this process tell: threads, memory, page faults, memory bandwidth."""

import contextlib
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

STREAMED = 256 * 2**20  # bytes: several times the caches of a workstation
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LINUX = sys.platform == "linux"


def threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1


class Stream:
    """An array that no cache holds, read by all threads at once."""

    def __init__(self) -> None:
        self._parts = np.array_split(np.ones(STREAMED // 4, np.float32), threads())

    def bandwidth(self) -> float:
        """Bytes per second of reading it once, by dot products: they let other threads run."""
        with ThreadPoolExecutor(len(self._parts)) as pool:
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), self._parts))
            seconds = time.perf_counter() - start
        return sum(part.nbytes for part in self._parts) / seconds


def memory() -> dict[str, int | None]:
    """Bytes of this process `resident` now, and at their `peak` since `reset_peak`."""
    return {"resident": psutil.Process().memory_info().rss, "peak": peak()}


def peak() -> int | None:
    """The most bytes resident since `reset_peak`, or ever; None off Linux.

    Not `ru_maxrss`, which a process inherits from the one that started it; psutil has none.
    """
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    return None


def reset_peak() -> None:
    """Let the peak begin anew, where the system can: proc(5), /proc/pid/clear_refs."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def storage() -> dict[str, int | None]:
    """Major page `faults` of this process so far, and bytes `read` from storage; None off Linux."""
    if not LINUX:
        return {"faults": None, "read": None}
    import resource

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    return {"faults": faults, "read": psutil.Process().io_counters().read_bytes}


def available() -> int:
    """Bytes that a new process may take without swapping."""
    return int(psutil.virtual_memory().available)
