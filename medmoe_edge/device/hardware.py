"""Devices by name, what their makers say of them and programs reach of that; GPUs of this machine.

Bandwidth is of the memory that holds the weights; compute is dense (makers often print figures for
structured sparsity, twice as high) on the units that matrices run on, of the GPU alone, in fp16
with fp32 accumulation where the maker tells them apart. A Jetson's power modes bound both, and so
are devices of their own.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import platform
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medmoe_edge._types import once, there
from medmoe_edge.bundle.machine import (
    cpu_features_here,
    cpu_name,
    machine_memory,
    memory_here,
)
from medmoe_edge.config import Config
from medmoe_edge.errors import (
    ConfigError,
    DataError,
    InputError,
    Told,
    did_you_mean,
    shown_bytes,
)
from medmoe_edge.export.gpus import GPUS, Library
from medmoe_edge.export.jetson import find_jetson
from medmoe_edge.runtimes.costs import NUMBER, Kind, Precision, Speed

GB = 10**9
TERA = 10**12
HERE = "here"
CPU_PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "mixed", "fp32")
GPU_PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "mixed", "fp16")
FILES = (".toml", ".json")  # of people's own devices


@dataclass(frozen=True)
class Reached(Config):
    """What programs reach of a device's ratings.

    Shares of the `bandwidth`, and of the compute in products of `integers` (of a GPU, which turns
    quantised weights into floats first: those) and of `floats`. Seconds that each `layer` takes
    besides: launches of kernels or dispatch; and `prefill_layer` more where many tokens are
    computed at once, which is not replayed as a graph.
    """

    bandwidth: float
    integers: float
    floats: float
    layer: float
    prefill_layer: float = 0.0

    def __post_init__(self) -> None:
        shares, seconds = ("bandwidth", "integers", "floats"), ("layer", "prefill_layer")
        _check_limits(self, dict.fromkeys(shares, (1e-3, 2)) | dict.fromkeys(seconds, (0, 2)))


def _check_limits(config: Config, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise `ConfigError` for a number that makes no sense."""
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} is {value}.", f"It must be a number from {least} to {most}.")


REACHED: Mapping[Kind, Reached] = {
    # Assumed, to be measured on the device.
    "gpu": Reached(0.75, 0.5, 0.5, 30e-6),
    # Fitted to NVIDIA's own figures for Edge-LLM 0.9.0 and 0.10.0 on Orin: median error 6%
    # (tests/unit/test_plan_figures.py).
    "jetson": Reached(0.95, 0.6, 0.52, 100e-6, 200e-6),
    # Measured on two cores of a Zen 4 with ONNX Runtime (docs/benchmarks.md).
    "cpu": Reached(0.6, 0.3, 0.4, 60e-6),
}
# NVIDIA's figures for int4 weights on Thor, whose kernels use a tenth of its rating: the same test.
_ON_THOR = Reached(0.95, 0.125, 0.25, 60e-6, 200e-6)


@dataclass(frozen=True)
class Ratings:
    """Bytes per second; operations per second on 8-bit integers, and on 16-bit floats.

    `reached` is what programs reach of it; None: as of its kind.
    """

    bandwidth: float
    int8: float
    fp16: float
    source: str
    reached: Reached | None = None


@dataclass(frozen=True)
class Device(Told):
    """Memory in bytes; `ratings` are the maker's, None for this machine, which is measured.

    `kind` "jetson" and "cpu" share their memory with the system. `reserved` is what the system
    keeps of it; None: as of its kind.
    """

    TOLD = ("usable",)

    name: str
    title: str
    kind: Kind
    memory: int
    ratings: Ratings | None
    reserved: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that a model may take: a system keeps 2 GB, of a card the display 0.5 GB."""
        usual = GB // 2 if self.kind == "gpu" else 2 * GB
        return self.memory - (usual if self.reserved is None else self.reserved)

    @property
    def reached(self) -> Reached:
        """What programs reach of its ratings."""
        return (self.ratings and self.ratings.reached) or REACHED[self.kind]


def nominal_speeds(device: Device) -> dict[Precision, Speed]:
    """A device's rates from its maker's figures.

    On a GPU weights are dequantised and multiplied in fp16, as our kernels do; on a CPU int8 is
    W8A8, and int4 is multiplied at the rate of floats.
    """
    rated, reached = there(device.ratings), device.reached
    byte = 1 / (rated.bandwidth * reached.bandwidth)
    floats = 1 / (rated.fp16 * reached.floats)
    cpu = device.kind == "cpu"
    integers = 1 / ((rated.int8 if cpu else rated.fp16) * reached.integers)

    def speed(operation: float) -> Speed:
        return Speed(
            byte,
            operation,
            floats,
            dense=reached.layer,
            moe=2 * reached.layer,
            prefill=reached.prefill_layer,
            number=NUMBER[device.kind],
            overlaps=cpu,
        )

    if cpu:
        return {name: speed(integers if name == "int8" else floats) for name in CPU_PRECISIONS}
    return {
        name: speed(floats if name in ("fp16", "fp32") else integers)
        for name in (*GPU_PRECISIONS, "fp32")
    }


def find_device(name: str) -> Device:
    """A device by its name, by a file that describes it, or `here` for this machine.

    Raises `InputError`, which lists the names, and `DataError` for a file that is wrong.
    """
    if name == HERE:
        features = [feature for feature, there in cpu_features_here().items() if there]
        title = f"{cpu_name()} ({', '.join(features) or 'no known extension'})"
        memory = memory_here()
        # of a container's or a service's the system keeps nothing, but of what is around it
        kept = max(2 * GB - (machine_memory() - memory), 0)
        return Device(HERE, title, "cpu", memory, None, kept)
    if name.lower().endswith(FILES):
        return read_device(Path(name))
    if name not in DEVICES:
        names = (*DEVICES, HERE)
        known = f"Use one of: {', '.join(names)}; or a file of your own (.toml)."
        raise InputError(f"There is no device {name!r}.", f"{did_you_mean(name, names)}{known}")
    return DEVICES[name]


def engine_of(device: Device) -> tuple[Library, str]:
    """The library for a GPU's engines, and what `--gpu` calls it: GPU, of a name unknown there."""
    names = (device.name, device.name.partition("-")[0])
    if name := next((name for name in names if name in GPUS), None):
        return GPUS[name].library, name
    return ("tensorrt" if device.kind == "jetson" else "tensorrt-rtx"), "GPU"


_LIMITS = {  # of a device: the least and most that make sense
    "memory_gb": (0.1, 10_000),
    "bandwidth_gb_s": (0.1, 100_000),
    "int8_tops": (1e-3, 1e6),
    "fp16_tops": (1e-3, 1e6),
    "reserved_gb": (0, 1000),
}


@dataclass(frozen=True)
class DeviceFile(Config):
    """What a file says of a device, see `read_device`."""

    kind: Kind
    memory_gb: float
    bandwidth_gb_s: float
    int8_tops: float
    fp16_tops: float
    reserved_gb: float | None = None
    name: str | None = None
    title: str | None = None
    source: str | None = None
    reached: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_limits(self, _LIMITS)


def read_device(file: Path) -> Device:
    """Read a device from TOML or JSON.

        kind = "jetson"          # or "gpu", "cpu"
        memory_gb = 16
        bandwidth_gb_s = 102
        int8_tops = 30           # dense, 10^12 operations per second
        fp16_tops = 15
        title = "our panel"      # these may be left out: title, name, source, reserved_gb
        [reached]                # and this: shares of the above, and seconds per layer
        bandwidth = 0.9

    Raises `DataError`, which names the key.
    """
    try:
        found = DeviceFile.from_json(_parsed(file), "device")
        usual = REACHED[found.kind]
        reached = Reached.from_json({**asdict(usual), **found.reached}, "reached")
    except ConfigError as error:
        raise DataError(f"{file}: {error.what}", error.remedy) from error
    name = found.name or file.stem
    ratings = Ratings(
        found.bandwidth_gb_s * GB,
        found.int8_tops * TERA,
        found.fp16_tops * TERA,
        found.source or str(file),
        reached if found.reached else None,
    )
    reserved = None if found.reserved_gb is None else round(found.reserved_gb * GB)
    memory = round(found.memory_gb * GB)
    return Device(name, found.title or name, found.kind, memory, ratings, reserved)


def _parsed(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read.", "Give a .toml or .json file.") from error
    try:
        is_json = file.suffix.lower() == ".json"
        data = json.loads(text, object_pairs_hook=once) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no valid {file.suffix[1:].upper()}.", str(error)) from error
    return data


def _nvidia(
    name: str,
    title: str,
    memory: int,
    bandwidth: float,
    int8: float,
    fp16: float,
    source: str,
    reached: Reached | None = None,
) -> Device:
    """Memory in GB, bandwidth in GB/s, 10^12 operations per second."""
    kind: Kind = "jetson" if title.startswith("Jetson") else "gpu"
    ratings = Ratings(bandwidth * GB, int8 * TERA, fp16 * TERA, source, reached)
    return Device(name, title, kind, memory * GB, ratings)


_ORIN_FP16 = 2048  # operations of a multiprocessor of Orin's GPU in a clock, dense; int8 twice
_POWER_MODES = "NVIDIA's nvpmodel files for Orin (p3701-0000, p3767-0000, p3767-0003)"


def _orin(
    name: str, title: str, memory: int, cores: int, clock: int, bus: int, transfers: int
) -> Device:
    """A power mode: `cores` multiprocessors at `clock` MHz, memory at `transfers` MHz.

    `bus` bytes pass at every transfer, of which a clock has two.
    """
    fp16 = cores * clock * _ORIN_FP16 / 1e6
    bandwidth = 2 * transfers * bus / 1e3
    return _nvidia(name, f"Jetson {title}", memory, bandwidth, 2 * fp16, fp16, _POWER_MODES)


def _cpu(name: str, title: str, cores: int, clock: float, int8: int, fp32: int) -> Device:
    """`int8` and `fp32` operations of a core in a clock; two channels of DDR4-3200."""
    ratings = Ratings(
        bandwidth=2 * 8 * 3200e6,  # channels x bytes x transfers
        int8=cores * clock * int8,
        fp16=cores * clock * fp32,  # computed in fp32
        source="arithmetic",
    )
    return Device(name, f"{title}, two channels of DDR4-3200, 16 GB", "cpu", 16 * GB, ratings)


_THOR = "NVIDIA Jetson Thor data sheet: a quarter and an eighth of its sparse fp4 figure"
_ADA = "NVIDIA Ada GPU architecture white paper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # By a name alone: the mode in which NVIDIA's table measured it.
        _orin("orin-nano-8g", "Orin Nano 8 GB, 15 W", 8, 8, 612, 16, 2133),
        _orin("orin-nano-8g-7w", "Orin Nano 8 GB, 7 W", 8, 4, 408, 16, 2133),
        _orin("orin-nano-8g-25w", "Orin Nano 8 GB, 25 W", 8, 8, 918, 16, 3199),
        _orin("orin-nano-8g-super", "Orin Nano 8 GB, MAXN_SUPER", 8, 8, 1020, 16, 3199),
        _orin("orin-nx-16g", "Orin NX 16 GB, MAXN", 16, 8, 918, 16, 3199),
        _orin("orin-nx-16g-10w", "Orin NX 16 GB, 10 W", 16, 4, 612, 16, 2133),
        _orin("orin-nx-16g-15w", "Orin NX 16 GB, 15 W", 16, 4, 612, 16, 3199),
        _orin("orin-nx-16g-25w", "Orin NX 16 GB, 25 W", 16, 8, 408, 16, 3199),
        _orin("orin-nx-16g-40w", "Orin NX 16 GB, 40 W (Super)", 16, 8, 1173, 16, 3199),
        _orin("orin-agx-64g", "AGX Orin 64 GB, MAXN", 64, 16, 1301, 32, 3199),
        _orin("orin-agx-64g-15w", "AGX Orin 64 GB, 15 W", 64, 6, 408, 32, 2133),
        _orin("orin-agx-64g-30w", "AGX Orin 64 GB, 30 W", 64, 8, 612, 32, 3199),
        _orin("orin-agx-64g-50w", "AGX Orin 64 GB, 50 W", 64, 16, 816, 32, 3199),
        _nvidia("thor", "Jetson AGX Thor 128 GB", 128, 273, 517, 259, _THOR, _ON_THOR),
        _nvidia("rtx-4060", "GeForce RTX 4060 8 GB", 8, 272, 121, 30, _ADA),
        _nvidia("rtx-4090", "GeForce RTX 4090 24 GB", 24, 1008, 661, 165, _ADA),
        _nvidia("rtx-5090", "GeForce RTX 5090 32 GB", 32, 1792, 838, 210, _BLACKWELL),
        _nvidia("l4", "NVIDIA L4 24 GB", 24, 300, 242, 121, _ADA),
        # Operations in a clock, from instructions' widths and the ports that run them: int8 of AVX2
        # alone is two multiplications and an addition of 32 values, of VNNI one instruction.
        _cpu("cpu", "a PC of 4 cores at 3 GHz with AVX2 and VNNI", 4, 3e9, 128, 32),
        _cpu("cpu-avx2", "a PC of 4 cores at 3 GHz with AVX2, no VNNI", 4, 3e9, 42, 32),
        _cpu("cpu-avx512-vnni", "4 cores at 3 GHz with AVX-512 VNNI", 4, 3e9, 256, 64),
        _cpu("cpu-amx", "4 cores at 3 GHz with AMX", 4, 3e9, 2048, 64),
        _cpu("cpu-arm-dotprod", "4 ARM cores at 2 GHz with dotprod", 4, 2e9, 64, 16),
    )
}


# --- the GPUs of this machine ------------------------------------------------------------------


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
        return Gpus(driver, (version // 1000, version % 1000 // 10), devices) if devices else None
    except nvml.NVMLError:  # Jetson's NVML answers only some questions
        return None
    finally:
        nvml.nvmlShutdown()


def too_old(gpus: Gpus, needed: Mapping[str, int]) -> list[str]:
    """Packages built for a CUDA whose major version is newer than the driver runs.

    Within a major version any driver will do (CUDA compatibility guide, minor versions).
    """
    return [package for package, major in needed.items() if major > gpus.cuda[0]]


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
    return Gpu(nvml.nvmlDeviceGetName(handle), int(memory), f"{major}.{minor}")


def cuda_devices() -> int:
    """How many the driver shows; by itself, since PyTorch may be a build for the CPU."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError, AttributeError):
            driver, count = ctypes.CDLL(name), ctypes.c_int(0)
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
                return count.value
    return 0


def describe_machine(device: str) -> dict[str, Any]:
    """What a proof says of its machine; no host name, and nothing else that names a person."""
    jetson = find_jetson()
    gpus = None
    with contextlib.suppress(ImportError):
        gpus = find_gpus(importlib.import_module("pynvml"))
    throttled = bool(jetson and jetson.power_mode and not jetson.power_mode.startswith("MAXN"))
    return {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "processor": cpu_name(),
        "device": device,
        "gpus": asdict(gpus) if gpus else None,
        "jetson": asdict(jetson) if jetson else None,
        "throttled": throttled,
        "packages": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in ("onnxruntime", "onnxruntime-gpu", "torch", "triton", "tensorrt", "cuda-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)
