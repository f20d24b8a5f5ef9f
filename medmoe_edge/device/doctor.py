"""`medmoe-edge doctor`: what is installed, what the machine is, and where the two do not meet.

A finding is a problem (asking fails), a warning (something installed will not work or is slow) or
a hint (what more could be had), each with its remedy. Nothing is loaded but ONNX Runtime and NVML.
"""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from medmoe_edge._version import __version__
from medmoe_edge.device.devices import CPU_INFO, GB, cpu_name, memory_here
from medmoe_edge.device.hardware import (
    Gpus,
    Jetson,
    ask_power_mode,
    cpu_features,
    find_gpus,
    find_jetson,
    too_old,
)
from medmoe_edge.device.packages import (
    BASE,
    Extra,
    Versions,
    find_extras,
    installed,
    missing_base,
    needed_cuda,
)
from medmoe_edge.errors import ResourceError

MODEL_FILE = Path("/proc/device-tree/model")
RELEASE_FILE = Path("/etc/nv_tegra_release")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
LITTLE = 2 * GB  # of memory or disk
CUDA_PROVIDER = "CUDAExecutionProvider"
REINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-deps onnxruntime-gpu"


class Finding(NamedTuple):
    """Something to know: `what`, and the `remedy`."""

    level: Literal["problem", "warning", "hint"]
    what: str
    remedy: str


class Fact(NamedTuple):
    """A line of the table."""

    name: str
    value: str


@dataclass(frozen=True)
class Ort:
    """ONNX Runtime: its version, providers, and the CUDA it was built for; or why it fails."""

    version: str | None = None
    providers: tuple[str, ...] = ()
    cuda: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Machine:
    """The hardware and its system; bytes. `driver_loaded`: of NVIDIA, also where NVML is absent."""

    system: str
    cpu: str
    cores: int
    features: Mapping[str, bool]
    memory: int
    disk_free: int
    cache: str
    driver_loaded: bool
    gpus: Gpus | None
    jetson: Jetson | None


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    machine: Machine
    ort: Ort
    base: Mapping[str, str | None]
    extras: tuple[Extra, ...]
    findings: tuple[Finding, ...]

    @property
    def facts(self) -> list[Fact]:
        """The machine and the base install, for people."""
        machine, ort = self.machine, self.ort
        features = [name for name, there in machine.features.items() if there]
        facts = [
            Fact("medmoe-edge", f"{__version__}, Python {platform.python_version()}"),
            Fact("system", machine.system),
            Fact("processor", f"{machine.cpu}, {machine.cores} cores"),
            Fact("  for int8", ", ".join(features) or "nothing known"),
            Fact("memory", f"{machine.memory / 1e9:.1f} GB"),
            Fact("free on disk", f"{machine.disk_free / 1e9:.1f} GB in {machine.cache}"),
            Fact("ONNX Runtime", ort.version or "cannot be imported"),
            Fact("  providers", ", ".join(ort.providers) or "none"),
        ]
        if machine.jetson:
            mode = machine.jetson.power_mode or "unknown"
            release = machine.jetson.release or "unknown"
            facts.append(Fact("Jetson", machine.jetson.model))
            facts.append(Fact("  L4T", f"{release}, power mode {mode}"))
        if gpus := machine.gpus:
            facts += [Fact("GPU", str(gpu)) for gpu in gpus.devices]
            facts.append(Fact("  driver", f"{gpus.driver}, CUDA {gpus.cuda[0]}.{gpus.cuda[1]}"))
        elif not machine.jetson:
            facts.append(Fact("GPU", "none found"))
        return facts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "version": __version__,
            "python": platform.python_version(),
            "machine": asdict(self.machine),
            "onnxruntime": asdict(self.ort),
            "base": dict(self.base),
            "extras": [
                {**asdict(extra), "state": extra.state, "command": extra.command}
                for extra in self.extras
            ],
            "findings": [finding._asdict() for finding in self.findings],
        }

    def error(self) -> ResourceError | None:
        """Where there is a problem: asking does not work."""
        problems = [finding for finding in self.findings if finding.level == "problem"]
        if not problems:
            return None
        remedy = problems[0].remedy
        return ResourceError("This installation cannot answer questions.", f"First: {remedy}")


def examine(version: Versions = installed) -> Diagnosis:
    """Look at this machine and this environment; `version` says what is installed."""
    machine, ort = look_at_machine(), look_at_onnxruntime()
    return diagnose(machine, ort, version)


def diagnose(machine: Machine, ort: Ort, version: Versions) -> Diagnosis:
    """What follows from what was found."""
    findings = (
        *_base_findings(ort, version),
        *_cuda_findings(machine, ort, version),
        *_machine_findings(machine, version),
    )
    base = {package: version(package) for package in BASE}
    return Diagnosis(machine, ort, base, tuple(find_extras(version)), findings)


def look_at_machine() -> Machine:
    """Ask the system; takes some milliseconds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    nvml = _module("pynvml")
    return Machine(
        system=platform.platform(terse=True),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        features=cpu_features(_text(CPU_INFO) or ""),
        memory=memory_here(),
        disk_free=shutil.disk_usage(there).free,
        cache=str(cache),
        driver_loaded=DRIVER_FILE.exists(),
        gpus=find_gpus(nvml) if nvml else None,
        jetson=find_jetson(_text(MODEL_FILE), _text(RELEASE_FILE), ask_power_mode),
    )


def look_at_onnxruntime() -> Ort:
    """Import it, as asking would."""
    try:
        runtime = importlib.import_module("onnxruntime")
        build = importlib.import_module("onnxruntime.capi.build_and_package_info")
        providers = tuple(runtime.get_available_providers())
    except Exception as error:  # a broken install fails in many ways; all mean the same
        return Ort(failure=type(error).__name__)
    return Ort(runtime.__version__, providers, getattr(build, "cuda_version", None))


def _base_findings(ort: Ort, version: Versions) -> Iterator[Finding]:
    if missing := missing_base(version):
        names = " ".join(missing)
        yield Finding("problem", f"Not installed: {names}.", f"pip install {names}")
    elif ort.failure:
        yield Finding(
            "problem",
            f"ONNX Runtime cannot be imported ({ort.failure}).",
            "pip install --force-reinstall onnxruntime",
        )


def _cuda_findings(machine: Machine, ort: Ort, version: Versions) -> Iterator[Finding]:
    cpu_version, gpu_version = version("onnxruntime"), version("onnxruntime-gpu")
    if (
        cpu_version
        and gpu_version
        and (cpu_version != gpu_version or CUDA_PROVIDER not in ort.providers)
    ):
        yield Finding(
            "warning",
            f"onnxruntime {cpu_version} and onnxruntime-gpu {gpu_version} are installed over each "
            "other: which one runs is chance.",
            REINSTALL,
        )
    if gpu_version and version("onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        yield Finding(
            "warning",
            "onnxruntime-gpu replaces the onnxruntime that TensorRT for RTX's provider needs.",
            "Keep them in environments of their own.",
        )
    if gpus := machine.gpus:
        for package in too_old(gpus, needed := needed_cuda(version, ort.cuda)):
            yield Finding(
                "warning",
                f"The driver {gpus.driver} runs CUDA {gpus.cuda[0]}, {package} needs CUDA "
                f"{needed[package]}.",
                "Update the NVIDIA driver, or install that package for the older CUDA.",
            )
        if not gpu_version:
            yield Finding(
                "hint", "The GPU is not used by ONNX Runtime.", "pip install 'medmoe-edge[gpu]'"
            )
    elif machine.driver_loaded and version("nvidia-ml-py") is None:
        yield Finding(
            "hint", "An NVIDIA driver is loaded, but cannot be asked.", "pip install nvidia-ml-py"
        )


def _machine_findings(machine: Machine, version: Versions) -> Iterator[Finding]:
    if jetson := machine.jetson:
        if version("onnxruntime-ep-nv-tensorrt-rtx-cu13"):
            yield Finding(
                "warning",
                "TensorRT for RTX does not run on a Jetson.",
                "Use TensorRT, which JetPack brings.",
            )
        if jetson.power_mode and not jetson.power_mode.startswith("MAXN"):
            yield Finding(
                "hint",
                f"The power mode {jetson.power_mode} limits the clocks.",
                "See the modes: nvpmodel -p --verbose; the fastest is usually: nvpmodel -m 0",
            )
    if machine.features and not any(machine.features.values()):
        yield Finding(
            "warning", "The processor lacks what int8 needs: it will be slow.", "Use int4 or fp32."
        )
    if machine.memory < LITTLE:
        yield Finding("warning", "There is little memory.", "See what fits: medmoe-edge plan")
    if machine.disk_free < LITTLE:
        yield Finding("warning", "There is little room on the disk.", "Free some space.")


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
