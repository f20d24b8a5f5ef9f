"""What this machine is (processor, NVIDIA GPUs, Jetson); devices as their makers rate them."""

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medmoe_edge.bundle.machine import cpu_name
from medmoe_edge.errors import InputError, did_you_mean, shown_bytes

L4T = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
POWER_MODE = re.compile(r"NV Power Mode: *(\S+)")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as NVML describes it; memory in bytes."""

    name: str
    memory: int
    compute_capability: str

    def __str__(self) -> str:
        memory = f"{shown_bytes(self.memory)}"
        return f"{self.name}, {memory}, compute capability {self.compute_capability}"


@dataclass(frozen=True)
class Gpus:
    """All GPUs, with their driver and the newest CUDA that it runs, `(major, minor)`."""

    driver: str
    cuda: tuple[int, int]
    devices: tuple[Gpu, ...]


@dataclass(frozen=True)
class Jetson:
    """A Jetson: model, Linux for Tegra release (36.4.3), power mode where it can be asked."""

    model: str
    release: str | None
    power_mode: str | None


def find_gpus(nvml: Any) -> Gpus | None:
    """Ask NVML (the module `pynvml`); None where there is no driver or no GPU."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        version = nvml.nvmlSystemGetCudaDriverVersion()  # 13000: 13.0
        devices = tuple(_gpu(nvml, handle) for handle in handles)
        driver = nvml.nvmlSystemGetDriverVersion()
        return Gpus(driver, (version // 1000, version % 1000 // 10), devices)
    except nvml.NVMLError:  # Jetson's NVML answers only some questions
        return None
    finally:
        nvml.nvmlShutdown()


def find_jetson(
    model: str | None, release: str | None, power_mode: Callable[[], str | None]
) -> Jetson | None:
    """From the texts of /proc/device-tree/model and /etc/nv_tegra_release; None elsewhere."""
    if release is None and (model is None or "Jetson" not in model):
        return None
    found = L4T.search(release or "")
    name = (model or "Jetson").rstrip("\0\n ")
    return Jetson(name, f"{found[1]}.{found[2]}" if found else None, power_mode())


def ask_power_mode() -> str | None:
    """What `nvpmodel -q` says: MAXN, 15W, ...; None where it cannot be asked."""
    try:
        asked = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, timeout=2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = POWER_MODE.search(asked.stdout)
    return found[1] if found else None


def too_old(gpus: Gpus, needed: Mapping[str, int]) -> list[str]:
    """Packages built for a CUDA whose major version is newer than the driver runs.

    Within a major version any driver will do (CUDA compatibility guide, minor versions).
    """
    return [package for package, major in needed.items() if major > gpus.cuda[0]]


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
    return Gpu(nvml.nvmlDeviceGetName(handle), int(memory), f"{major}.{minor}")


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
        names = (*DEVICES, HERE)
        hint = did_you_mean(name, names)
        raise InputError(f"There is no device {name!r}.", f"{hint}Use one of: {', '.join(names)}.")
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
