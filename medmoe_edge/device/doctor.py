"""`medmoe-edge doctor`: what is installed, what the machine is, and where the two do not meet.

A finding is a problem (asking fails), a warning (something installed will not work or is slow) or
a hint (what more could be had), each with its remedy. Nothing is loaded but ONNX Runtime and NVML.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from medmoe_edge._version import __version__
from medmoe_edge._version import too_old as onnxruntime_too_old
from medmoe_edge.bundle.machine import CPU_INFO, Arithmetic, cpu_features, cpu_name, memory_here
from medmoe_edge.device.hardware import GB, Gpus, find_gpus, too_old
from medmoe_edge.errors import ResourceError, Told, plain, shown_bytes
from medmoe_edge.export.jetson import (
    BestPath,
    Jetson,
    best_path,
    check_tensorrt,
    find_jetson,
    text_of,
)

DRIVER_FILE = Path("/proc/driver/nvidia/version")
LITTLE = 2 * GB  # of memory or disk
CUDA_PROVIDER = "CUDAExecutionProvider"
REINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-deps onnxruntime-gpu"


# What each extra is for; the packages that it adds are read from our own metadata.
PURPOSES = {
    "images": "compressed DICOM and NIfTI",
    "archive": "index, retrieve",
    "serve": "serve: HTTP and a page",
    "sign": "export --sign and trusted keys: signed bundles",
    "listen": "listen: a DICOM node; audit deidentify",
    "batch": "batch, to parquet",
    "ray": "batch --ray, on a cluster",
    "export": "export, calibrate, verify against a checkpoint, plan --device here",
    "train": "train",
    "tensorboard": "train --tensorboard",
    "hub": "pull",
    "optimum": "Hugging Face: a model class, a pipeline, optimum-cli export medmoe",
    "baselines": "comparison with bitsandbytes",
    "bench": "bench",
    "peers": "bench --peers, llama.cpp among them",
    "gpu": "ONNX Runtime on NVIDIA GPUs",
    "rtx": "to build and run engines of TensorRT for RTX (workstations)",
    "plugin": "the MoE kernels, compiled for TensorRT's plugin",
    "tensorrt": "to build and run engines of TensorRT (Jetson, data centres)",
}
REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*(?:;(?:.*\bextra *== *["']([\w-]+)["'])?.*)?""")
Versions = Callable[[str], str | None]


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
class Extra(Told):
    """An extra of ours: the versions of what is there of it, and what is missing."""

    TOLD = ("state", "command")

    name: str
    purpose: str
    versions: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def state(self) -> Literal["installed", "in part", "missing"]:
        """How much of it is there."""
        if not self.missing:
            return "installed"
        return "in part" if self.versions else "missing"

    @property
    def command(self) -> str:
        """What installs it."""
        return f"pip install 'medmoe-edge[{self.name}]'"


@dataclass(frozen=True)
class Ort:
    """ONNX Runtime: its version, providers, and the CUDA it was built for; or why it fails.

    `int8` is how its kernels add int8 products on this processor, as a probe found; None where it
    does not run.
    """

    version: str | None = None
    providers: tuple[str, ...] = ()
    cuda: str | None = None
    failure: str | None = None
    int8: Arithmetic | None = None


@dataclass(frozen=True)
class Machine:
    """The hardware and its system; bytes. `driver_loaded`: of NVIDIA, also where NVML is absent.

    `features` are the instruction sets that int8 and int4 profit from, best first, and whether they
    are there; empty where the system does not tell.
    """

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
    def jetson_path(self) -> BestPath | None:
        """What works best on this Jetson; None elsewhere, or of an unknown JetPack."""
        return best_path(self.machine.jetson) if self.machine.jetson else None

    @property
    def facts(self) -> list[Fact]:
        """The machine and the base install, for people."""
        machine, ort = self.machine, self.ort
        features = [name for name, there in machine.features.items() if there]
        arithmetic = f"{ort.int8}, with " if ort.int8 else ""
        facts = [
            Fact("medmoe-edge", f"{__version__}, Python {platform.python_version()}"),
            Fact("system", machine.system),
            Fact("processor", f"{machine.cpu}, {machine.cores} cores"),
            Fact("  int8", arithmetic + (", ".join(features) or "no known extension")),
            Fact("memory", f"{shown_bytes(machine.memory)}"),
            Fact("free on disk", f"{shown_bytes(machine.disk_free)} in {machine.cache}"),
            Fact("ONNX Runtime", ort.version or "cannot be imported"),
            Fact("  providers", ", ".join(ort.providers) or "none"),
        ]
        if machine.jetson:
            mode = machine.jetson.power_mode or "unknown"
            facts.append(Fact("Jetson", machine.jetson.model))
            facts.append(Fact("  software", f"{machine.jetson}, power mode {mode}"))
            if path := self.jetson_path:
                facts.append(Fact("  best path", path.line))
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
            "machine": plain(self.machine),
            "onnxruntime": plain(self.ort),
            "base": plain(self.base),
            "extras": plain(self.extras),
            "findings": plain(self.findings),
            "jetson_path": self._path_json(),
        }

    def _path_json(self) -> dict[str, Any] | None:
        path = self.jetson_path
        if path is None:
            return None
        return {
            "line": path.line,
            "target": path.row.target,
            "precisions": path.row.precisions,
            "form": path.row.form,
            "commands": list(path.commands),
        }

    def error(self) -> ResourceError | None:
        """Where there is a problem: asking does not work."""
        problems = [finding for finding in self.findings if finding.level == "problem"]
        if not problems:
            return None
        remedy = problems[0].remedy
        return ResourceError("This installation cannot answer questions.", f"First: {remedy}")


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> Diagnosis:
    """Look at this machine and this environment."""
    return diagnose(look_at_machine(), look_at_onnxruntime(), installed)


def diagnose(machine: Machine, ort: Ort, version: Versions) -> Diagnosis:
    """What follows from what was found."""
    findings = (
        *_base_findings(ort, version),
        *_cuda_findings(machine, ort, version),
        *_int8_findings(machine, ort),
        *_machine_findings(machine, version),
    )
    base = {package: version(package) for package in requirements()[""]}
    return Diagnosis(machine, ort, base, tuple(find_extras(version)), findings)


def look_at_machine() -> Machine:
    """Ask the system; takes some milliseconds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    # of a folder that may not be looked into, `Path.is_dir` raises
    there = next(folder for folder in (cache, *cache.parents) if os.path.isdir(folder))
    nvml = _module("pynvml")
    return Machine(
        system=platform.platform(terse=True),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        features=cpu_features(text_of(CPU_INFO) or ""),
        memory=memory_here(),
        disk_free=shutil.disk_usage(there).free,
        cache=str(cache),
        driver_loaded=DRIVER_FILE.exists(),
        gpus=find_gpus(nvml) if nvml else None,
        jetson=find_jetson(),
    )


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user without a name, as containers may have
        return Path("/")


def look_at_onnxruntime() -> Ort:
    """Import it, as asking would."""
    try:
        runtime = importlib.import_module("onnxruntime")
        build = importlib.import_module("onnxruntime.capi.build_and_package_info")
        providers = tuple(runtime.get_available_providers())
        int8 = importlib.import_module("medmoe_edge.runtimes.ort.runtime").int8_arithmetic()
    except Exception as error:  # a broken install fails in many ways; all mean the same
        return Ort(failure=type(error).__name__)
    return Ort(runtime.__version__, providers, getattr(build, "cuda_version", None), None, int8)


@cache
def requirements() -> Mapping[str, tuple[str, ...]]:
    """The packages that each extra adds, from our own metadata; those of the base under ""."""
    found: dict[str, tuple[str, ...]] = {"": ()}
    try:
        lines = importlib.metadata.requires("medmoe-edge") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        lines = []
    for line in lines:
        if (match := REQUIREMENT.fullmatch(line)) and match[1] != "medmoe-edge":
            extra = match[2] or ""
            found[extra] = (*found.get(extra, ()), match[1])
    return found


def find_extras(version: Versions) -> list[Extra]:
    """Every extra with what is there of it."""
    required = requirements()
    return [
        Extra(name, purpose, *_sorted(required[name], version))
        for name, purpose in PURPOSES.items()
        if name in required
    ]


def missing_base(version: Versions) -> list[str]:
    """Packages that asking needs and that are not there; onnxruntime-gpu holds onnxruntime."""
    missing = _sorted(requirements()[""], version)[1]
    return [name for name in missing if name != "onnxruntime" or not version("onnxruntime-gpu")]


def needed_cuda(version: Versions, runtime_cuda: str | None) -> dict[str, int]:
    """Packages that run on CUDA -> the major version that each was built for.

    `runtime_cuda` is what ONNX Runtime says of its own build. The others carry it in their names.
    """
    needed = {}
    if runtime_cuda and (major := re.match(r"\d+", runtime_cuda)) and version("onnxruntime-gpu"):
        needed["onnxruntime-gpu"] = int(major[0])
    for package in ("onnxruntime-ep-nv-tensorrt-rtx", "tensorrt"):
        for major_version in (12, 13):
            if version(f"{package}-cu{major_version}"):
                needed[f"{package}-cu{major_version}"] = major_version
    return needed


def _sorted(packages: Iterable[str], version: Versions) -> tuple[dict[str, str], tuple[str, ...]]:
    """Versions of what is there, and names of what is not."""
    found = {package: version(package) for package in packages}
    there = {package: number for package, number in found.items() if number is not None}
    return there, tuple(package for package in found if package not in there)


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
    elif ort.version and (old := onnxruntime_too_old(ort.version)):
        yield Finding("problem", *old)
    elif not requirements()[""]:
        yield Finding(
            "hint",
            "This is a checkout that was not installed: nothing is known of its extras.",
            "pip install -e .",
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


def _int8_findings(machine: Machine, ort: Ort) -> Iterator[Finding]:
    """Int8 products are exact where a bundle of this version runs; speed is another matter."""
    if ort.int8 == "saturating":
        yield Finding(
            "hint",
            "Sums of int8 products saturate on this processor, which has no VNNI. Bundles that "
            "this version exports are exact all the same; older ones are not, and warn of it.",
            "Export bundles of earlier versions again: medmoe-edge export",
        )
    if machine.features.get("AVX2") is False:
        yield Finding(
            "warning",
            "The processor has no AVX2: answers are exact, but slow; int4 is computed in fp32.",
            "Prefer int8 bundles.",
        )
    if machine.features.get("dotprod") is False:
        yield Finding(
            "hint",
            "The processor has no dotprod: int8 is exact, and int4 is computed in fp32.",
            "Prefer int8 bundles.",
        )


def _machine_findings(machine: Machine, version: Versions) -> Iterator[Finding]:
    if jetson := machine.jetson:
        yield from _jetson_findings(jetson, version)
        if version("onnxruntime-ep-nv-tensorrt-rtx-cu13"):
            yield Finding(
                "warning",
                "TensorRT for RTX does not run on a Jetson.",
                "Use TensorRT, which JetPack brings.",
            )
        if jetson.power_mode and not jetson.power_mode.startswith("MAXN"):
            fastest = jetson.fastest_mode
            yield Finding(
                "hint",
                f"The power mode {jetson.power_mode} limits the clocks.",
                "See the modes: nvpmodel -p --verbose"
                if fastest is None
                else f"For the fastest: sudo nvpmodel -m {fastest}",
            )
    if machine.memory < LITTLE:
        yield Finding("warning", "There is little memory.", "See what fits: medmoe-edge plan")
    if machine.disk_free < LITTLE:
        yield Finding("warning", "There is little room on the disk.", "Free some space.")


def _jetson_findings(jetson: Jetson, version: Versions) -> Iterator[Finding]:
    path = best_path(jetson)
    if path is None:
        yield Finding(
            "hint",
            "This Jetson does not say which JetPack it has, so that no path can be recommended.",
            "See the matrix of JetPacks in the documentation, or: apt show nvidia-jetpack",
        )
        return
    if path.row.target is None:
        yield Finding("warning", path.line, path.commands[0])
    if number := version("tensorrt"):
        try:
            check_tensorrt(number, jetson)
        except ResourceError as error:
            yield Finding("warning", error.what, error.remedy)


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
