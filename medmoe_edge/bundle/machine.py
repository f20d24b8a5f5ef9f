"""This machine: its processor, on which a proof holds, its memory, and what it refuses."""

import contextlib
import ctypes
import errno
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from medmoe_edge.config import Config
from medmoe_edge.errors import (
    OF_MACHINE,
    InputError,
    MedMoEError,
    ResourceError,
    of_machine,
    unreadable,
)

CPU_INFO = Path("/proc/cpuinfo")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SYSTEM, MEMORY_INFO, MEMBERSHIP = Path("/"), "proc/meminfo", "proc/self/cgroup"
M_ARENA_MAX = -8  # malloc.h
Arithmetic = Literal["exact", "saturating"]

# What ONNX Runtime's kernels for 8-bit and 4-bit weights choose by, best first: the flags in
# /proc/cpuinfo and their usual names.
X86_FLAGS = {
    "amx_int8": "AMX int8",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512bw": "AVX-512",
    "avx2": "AVX2",
}
ARM_FLAGS = {"i8mm": "i8mm", "asimddp": "dotprod"}
BASELINE = {"x86_64": "SSE2", "aarch64": "NEON"}  # what every such processor has
# ARM's processors give a number in the place of a name: Arm's Main ID Register, part numbers.
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
}


class GroupFiles(NamedTuple):
    """Where a version of control groups says what memory it limits; `cached` is a key of `stat`."""

    root: str
    limits: tuple[str, ...]
    usage: str
    cached: str
    stat: str = "memory.stat"


GROUP_FILES = {  # by what /proc/self/cgroup calls the controller: version 2 has no name
    "": GroupFiles(
        "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"
    ),
    "memory": GroupFiles(
        "sys/fs/cgroup/memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@dataclass(frozen=True)
class Machine(Config):
    """Where a model was verified.

    `flags` are the instruction sets that 8-bit and 4-bit weights profit from, best first; empty
    where the system does not tell. `arithmetic` is how int8 products are added: "exact", or
    "saturating" in 16 bits (`runtimes.ort.runtime`).
    """

    cpu: str
    architecture: str
    flags: tuple[str, ...]
    onnxruntime: str
    arithmetic: Arithmetic

    @property
    def best(self) -> str:
        """The best of its instruction sets."""
        return self.flags[0] if self.flags else "unknown"

    def computes_like(self, other: "Machine") -> bool:
        """Whether a proof on the other one holds here: the same instruction set, arithmetic, and
        ONNX Runtime up to its patch version; of processors that do not tell, the same name.
        """
        alike = self.flags or self.cpu == other.cpu
        return bool(alike) and self._kind == other._kind

    @property
    def _kind(self) -> tuple[str, ...]:
        minor = ".".join(self.onnxruntime.split(".")[:2])
        return self.architecture, self.best, self.arithmetic, minor

    def __str__(self) -> str:
        return f"{self.cpu} ({self.best}, {self.arithmetic} int8), ONNX Runtime {self.onnxruntime}"


def cpu_name(info: Path = CPU_INFO) -> str:
    """What this machine's processor calls itself."""
    text = _text(info)
    if found := re.search(r"^model name\s*:(.*)$", text, re.MULTILINE):
        return found[1].strip()
    if found := re.search(r"^CPU part\s*:\s*(\w+)", text, re.MULTILINE):
        return ARM_PARTS.get(found[1].lower(), f"ARM part {found[1]}")
    return platform.processor() or platform.machine()


def cpu_flags(info: Path = CPU_INFO) -> tuple[str, ...]:
    """The instruction sets that int8 and int4 kernels use, best first; empty off Linux."""
    known = cpu_features_here(info)
    there = tuple(name for name, here in known.items() if here)
    if not known or (baseline := BASELINE.get(platform.machine())) is None:
        return there
    return (*there, baseline)


def cpu_features_here(info: Path = CPU_INFO) -> dict[str, bool]:
    """`cpu_features` of this machine."""
    return cpu_features(_text(info))


def cpu_features(info: str) -> dict[str, bool]:
    """From the text of /proc/cpuinfo: which of these instruction sets are there, best first.

    Empty where it does not tell.
    """
    found = re.search(r"^(flags|Features)\s*:(.*)$", info, re.MULTILINE)
    if found is None:
        return {}
    flags = set(found[2].split())
    names = ARM_FLAGS if found[1] == "Features" else X86_FLAGS
    return {name: flag in flags for flag, name in names.items()}


def memory_here(system: Path = SYSTEM) -> int:
    """Bytes of memory of this machine, or that the control groups around this process allow.

    `system` is that of `available_memory`.
    """
    limits = (limit for group, names in _groups(system) for limit in _limits(group, names))
    return min((machine_memory(), *limits))


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX, 64 bytes: `size` is its own, `others` what is not read here."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def machine_memory() -> int:
    """Bytes of memory of the machine, of which this process may be allowed a part."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_windows_memory().total)


def _windows_memory() -> _MemoryStatus:
    status = _MemoryStatus(size=ctypes.sizeof(_MemoryStatus))
    if not ctypes.CDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):
        raise ResourceError("Windows does not tell how much memory there is.", "Try again.")
    return status


def available_memory(system: Path = SYSTEM) -> int | None:
    """Bytes that this process may still take without swapping.

    The least of what the kernel has to give (free memory, and caches that it would drop for it) and
    of what each control group around this process leaves, whose file caches do not count either:
    a container's limit, or a service's. None where the system does not tell. `system` is the folder
    that proc and sys are in.
    """
    if not hasattr(os, "sysconf"):
        return int(_windows_memory().available)
    kernel = re.search(r"^MemAvailable:\s*(\d+) kB", _text(system / MEMORY_INFO), re.MULTILINE)
    if kernel is None:
        return None
    return int(max(min(int(kernel[1]) * 1024, *_left_by_groups(system)), 0))


def peak_memory() -> int | None:
    """The most bytes resident since `reset_peak`, or ever, mapped files included; None off Linux.

    Not `ru_maxrss`, which a process inherits from the one that started it; psutil has none.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB$", _text(STATUS), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def reset_peak() -> None:
    """Let the peak begin anew, where the system can: proc(5), /proc/pid/clear_refs."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def return_free_memory() -> None:
    """Give freed memory back to the system, which glibc would keep for what comes next."""
    call_glibc("malloc_trim", 0)


def keep_one_heap() -> None:
    """Let threads that begin from now on share one heap, in which they reuse what others freed.

    glibc gives each its own, and what sessions needed while they were opened in the background
    stays there, of no use to what follows: a seventh of the memory that a small model takes. Where
    the environment says how many heaps there may be, that counts.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_ARENA_MAX" not in os.environ and "glibc.malloc.arena_max" not in told:
        call_glibc("mallopt", M_ARENA_MAX, 1)


def call_glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc's own with whole numbers; nothing happens with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6")[name](*arguments)


def _left_by_groups(system: Path) -> Iterator[float]:
    """What each control group of memory leaves, those around it included; infinite without one."""
    yield math.inf
    for group, names in _groups(system):
        used, cached = _number(group / names.usage), _cached(group / names.stat, names.cached)
        if used is not None:
            yield from (limit - (used - cached) for limit in _limits(group, names))


def _groups(system: Path) -> Iterator[tuple[Path, GroupFiles]]:
    """The control groups of memory that this process is in, as far as they can be seen."""
    for line in _text(system / MEMBERSHIP).splitlines() or ["0::/"]:
        controllers, _, path = line.partition(":")[2].partition(":")
        names = GROUP_FILES.get("memory" if "memory" in controllers.split(",") else controllers)
        if names is None:
            continue
        root = system / names.root
        # Inside a container the path may be the host's: then only the root is there.
        for group in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            if not group.is_relative_to(root):
                break
            yield group, names


def _limits(group: Path, names: GroupFiles) -> Iterator[int]:
    limits = (_number(group / name) for name in names.limits)
    return (limit for limit in limits if limit is not None)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # no such group, or its limit is "max"


def _cached(path: Path, key: str) -> int:
    """Bytes of files that a group holds and the kernel can drop."""
    found = re.search(rf"^{key} (\d+)$", _text(path), re.MULTILINE)
    return int(found[1]) if found else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# How libraries tell that the system gave no memory, or no thread: their errors have no number.
_NO_MEMORY = ("bad_alloc", "Failed to allocate", "Cannot allocate memory", "failed to map segment")
_NO_THREAD = ("can't start new thread", "pthread_create", os.strerror(errno.EAGAIN))
CLOSE = "Close other programs and try again."


def refused(what: str, error: BaseException, remedy: str = CLOSE) -> ResourceError | None:
    """The error to raise where the machine refused a library what it needs, by the words it uses.

    Args:
        what: What was opened, such as "decoder.onnx"; it may be empty.
        error: Whatever was raised.
        remedy: What to do where memory is missing.

    Returns:
        An error, or None for any other reason.
    """
    text, wanted = str(error), f" for {what}" if what else ""
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return ResourceError(f"There is not enough memory{wanted}.", remedy)
    if any(words in text for words in _NO_THREAD):
        return ResourceError(
            f"The system starts no further thread or process{wanted}.",
            "Close other programs, or raise its limits (ulimit -u and -v), and try again.",
        )
    if "procfs" in text:
        return ResourceError(f"There is no /proc, which is needed{wanted}.", "Mount it first.")
    number = next((each for each in OF_MACHINE if os.strerror(each) in text), None)
    return None if number is None else of_machine(what or "A file", OSError(number, text))


def system_error(error: Exception) -> MedMoEError | None:
    """What the system refused, as one of our errors; None for what is none of its refusals."""
    if isinstance(error, MedMoEError):
        return None
    if not isinstance(error, OSError):
        return refused("", error)
    name = str(error.filename or "A file")
    if error.errno in (errno.EROFS, errno.EFBIG):  # nobody who reads is told so
        return ResourceError(
            f"{name} cannot be written ({os.strerror(error.errno)}).",
            "Free some space, check its permissions, or write elsewhere.",
        )
    return of_machine(name, error) or refused("", error) or InputError(*unreadable(name, error))


def tried(file: Path) -> OSError | None:
    """What the system says where a file is read and written beside, as SQLite does; None if well.

    SQLite itself tells no reason. The file stays closed: closing it would give up SQLite's lock.
    """
    try:
        with tempfile.TemporaryFile(dir=file.parent) as beside:
            beside.write(bytes(2**16))
            beside.flush()
    except OSError as error:
        return error
    if file.exists() and not os.access(file, os.R_OK | os.W_OK):
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return None
