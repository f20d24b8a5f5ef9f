"""Devices by name: what their makers say of them.

Bandwidth is of the memory that holds the weights; compute is dense (makers often print figures for
structured sparsity, twice as high) on the units that matrices run on, of the GPU alone, in fp16
with fp32 accumulation where the maker tells them apart.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medmoe_edge.bundle.machine import cpu_name
from medmoe_edge.errors import InputError

GB = 10**9
TERA = 10**12
HERE = "here"
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, version 2
Kind = Literal["gpu", "jetson", "cpu"]


@dataclass(frozen=True)
class Ratings:
    """Bytes per second; operations per second on 8-bit integers, and on 16-bit floats."""

    bandwidth: float
    int8: float
    fp16: float
    source: str


@dataclass(frozen=True)
class Device:
    """Memory in bytes; `ratings` are the maker's, None for this machine, which is measured.

    `kind` "jetson" and "cpu" share their memory with the system.
    """

    name: str
    title: str
    kind: Kind
    memory: int
    ratings: Ratings | None

    @property
    def usable(self) -> int:
        """Bytes that a model may take: a system keeps 2 GB, of a card the display 0.5 GB."""
        return self.memory - (GB // 2 if self.kind == "gpu" else 2 * GB)


def find_device(name: str) -> Device:
    """The device of a name, `here` for this machine; raises `InputError`, which lists them."""
    if name == HERE:
        return Device(HERE, cpu_name(), "cpu", memory_here(), None)
    if name not in DEVICES:
        known = ", ".join((*DEVICES, HERE))
        raise InputError(f"There is no device {name!r}.", f"Use one of: {known}.")
    return DEVICES[name]


def memory_here(limit: Path = CGROUP_LIMIT) -> int:
    """Bytes of memory of this machine, or of the container that it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(limit.read_text()))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return memory


def _nvidia(
    name: str, title: str, memory: int, bandwidth: float, int8: float, fp16: float, source: str
) -> Device:
    kind: Kind = "jetson" if title.startswith("Jetson") else "gpu"
    ratings = Ratings(bandwidth * GB, int8 * TERA, fp16 * TERA, source)
    return Device(name, title, kind, memory * GB, ratings)


_ORIN = "NVIDIA Jetson Orin data sheets: half the sparse figure of the GPU, highest power mode"
_THOR = "NVIDIA Jetson Thor data sheet: a quarter and an eighth of its sparse fp4 figure"
_ADA = "NVIDIA Ada GPU architecture white paper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # memory in GB, bandwidth in GB/s, int8 and fp16 in 10^12 operations per second
        _nvidia("orin-nano-8g", "Jetson Orin Nano 8 GB, Super mode", 8, 102, 33, 17, _ORIN),
        _nvidia("orin-nx-16g", "Jetson Orin NX 16 GB", 16, 102, 30, 15, _ORIN),
        _nvidia("orin-agx-64g", "Jetson AGX Orin 64 GB", 64, 205, 85, 43, _ORIN),
        _nvidia("thor", "Jetson AGX Thor 128 GB", 128, 273, 517, 259, _THOR),
        _nvidia("rtx-4060", "GeForce RTX 4060 8 GB", 8, 272, 121, 30, _ADA),
        _nvidia("rtx-4090", "GeForce RTX 4090 24 GB", 24, 1008, 661, 165, _ADA),
        _nvidia("rtx-5090", "GeForce RTX 5090 32 GB", 32, 1792, 838, 210, _BLACKWELL),
        _nvidia("l4", "NVIDIA L4 24 GB", 24, 300, 242, 121, _ADA),
        Device(
            "cpu",
            "a PC of 4 cores at 3 GHz with AVX2 and VNNI, two channels of DDR4-3200, 16 GB",
            "cpu",
            16 * GB,
            Ratings(
                bandwidth=2 * 8 * 3200e6,  # channels x bytes x transfers
                int8=4 * 3e9 * 2 * 64,  # cores x clock x units x operations of 256 bits
                fp16=4 * 3e9 * 2 * 16,  # computed in fp32
                source="arithmetic",
            ),
        ),
    )
}
