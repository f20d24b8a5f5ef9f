"""This machine and this process: threads, memory, and how fast memory is read."""

import contextlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

STREAMED = 256 * 2**20  # bytes: several times the caches of a workstation
STATUS, CLEAR, STAT, IO, MEMORY = (
    Path("/proc") / name
    for name in ("self/status", "self/clear_refs", "self/stat", "self/io", "meminfo")
)


def threads() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that ran or waited to, on average over a minute; None where that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Stream:
    """An array that no cache holds, read by all threads at once."""

    def __init__(self, size: int = STREAMED) -> None:
        self._parts = np.array_split(np.ones(size // 4, np.float32), threads())

    def bandwidth(self) -> float:
        """Bytes per second of reading it once; 32-bit dot products, which compute next to nothing
        and let other threads run."""
        with ThreadPoolExecutor(len(self._parts)) as pool:
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), self._parts))
            seconds = time.perf_counter() - start
        return sum(part.nbytes for part in self._parts) / seconds


def resident(status: Path = STATUS) -> int | None:
    """Bytes of this process in memory, mapped files included; None off Linux."""
    return _kilobytes(status, "VmRSS")


def peak(status: Path = STATUS) -> int | None:
    """The most that this was since `reset_peak`, or ever; None off Linux.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    return _kilobytes(status, "VmHWM")


def reset_peak() -> None:
    """Let the peak begin anew, where the system can: proc(5), /proc/pid/clear_refs."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def faults(stat: Path = STAT) -> int | None:
    """Major page faults of this process so far: pages that storage had to bring; None off Linux."""
    try:
        after_name = stat.read_text().rpartition(")")[2]  # a name may hold anything
    except OSError:
        return None
    return int(after_name.split()[9])  # proc(5), /proc/pid/stat: majflt


def read_from_storage(io: Path = IO) -> int | None:
    """Bytes that were fetched from storage for this process; None off Linux (proc(5), io)."""
    try:
        found = re.search(r"^read_bytes: (\d+)$", io.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def available(memory: Path = MEMORY) -> int | None:
    """Bytes that a new process may take without swapping; None off Linux."""
    return _kilobytes(memory, "MemAvailable")


def _kilobytes(file: Path, key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s*(\d+) kB$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
