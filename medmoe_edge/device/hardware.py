"""What this machine is: NVIDIA GPUs, Jetson; each a function of what it reads."""

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

L4T = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")

POWER_MODE = re.compile(r"NV Power Mode: *(\S+)")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as NVML describes it; memory in bytes."""

    name: str
    memory: int
    compute_capability: str

    def __str__(self) -> str:
        memory = f"{self.memory / 1e9:.1f} GB"
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
