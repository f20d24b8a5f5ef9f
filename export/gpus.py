"""TensorRT is two libraries with one API: for RTX cards, and proper for Jetson and data centres.

TensorRT for RTX builds engines on any machine, for any card that it serves; TensorRT proper builds
only on the GPU that will run the engine. Which of them is meant is known when the program runs, so
their modules, and what comes of them, are typed `Any`.

GPUs by the names people type: compute capability, and the library that serves them.

Compute capabilities: developer.nvidia.com/cuda-gpus. What TensorRT for RTX compiles for: its
`ComputeCapability`; it refuses int4, bf16 and fp32 products on sm75, tried with 1.7.1.

What an engine build takes of this machine's memory: asked before, measured after.

Linux tells both (man 5 proc); elsewhere nothing is known, and None is said.
"""

import importlib
import logging
import re
from dataclasses import dataclass
from typing import Any, Literal

from medmoe_edge.bundle.bundle import Target
from medmoe_edge.errors import InputError, MissingDependencyError, ResourceError, did_you_mean
from medmoe_edge.export.jetson import IN_PLACE, parse_version

Library = Literal["tensorrt-rtx", "tensorrt"]
TITLES: dict[Library, str] = {"tensorrt-rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
EXTRAS: dict[Library, str] = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}
NO_DRIVER = "driver version is insufficient"  # logged as an error wherever there is no GPU
# "ITensor::getDimensions: Error Code 4: API Usage Error (what it is. In function at file:line)"
MESSAGE = re.compile(r"Error Code \d+: [^(]*\((.*?)\.?(?: In \w+ at .*)?\)\.?$", re.DOTALL)

logger = logging.getLogger(__name__)


def library_of(target: Target) -> Library:
    """The library that builds and runs a target's engines."""
    return "tensorrt-rtx" if target.name == "tensorrt-rtx" else "tensorrt"


def writes_in_place(target: Target) -> bool:
    """Whether a target's engine may write its KV cache where it reads it."""
    if library_of(target) == "tensorrt-rtx":
        return True
    return parse_version(target.library_version) >= IN_PLACE


def load_library(name: Library) -> Any:
    """The library's module; raises `MissingDependencyError`, or `ResourceError` if broken."""
    try:
        if name == "tensorrt-rtx":
            # First: it brings the shared libraries and loads them.
            importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
            module = importlib.import_module("tensorrt_rtx_bindings")
        else:
            module = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise _missing(name) from error
    except (ImportError, OSError) as error:
        raise ResourceError(
            f"{TITLES[name]} is installed and cannot be loaded ({error}).",
            "Run medmoe-edge doctor, which says what it lacks.",
        ) from error
    if not hasattr(module, "Builder"):  # a folder of type stubs, which Python imports as well
        raise _missing(name)
    return module


def library_version(module: Any) -> str:
    """Its version as engines are bound to it: `1.7.1`."""
    return ".".join(str(module.__version__).split(".")[:3])


def make_logger(module: Any) -> Any:
    """Hands TensorRT's messages to `logging`; `errors` collects what it calls errors.

    They end in exceptions of ours, so nothing is logged above INFO.
    """
    error = int(module.ILogger.ERROR)

    class Logger(module.ILogger):  # type: ignore[misc]  # the library is chosen at run time
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            failed = int(severity) <= error and NO_DRIVER not in message
            if failed:
                self.errors.append(message)
            logger.log(logging.INFO if failed else logging.DEBUG, "%s", message)

    return Logger()


def reason(messages: str) -> str:
    """The plain words in TensorRT's message of one or more lines."""
    lines = [line for line in messages.splitlines() if line.strip() and NO_DRIVER not in line]
    for line in lines:
        if found := MESSAGE.search(line):
            return found[1]
    return lines[-1].removeprefix("Assertion failed: ") if lines else "it does not say why"


def _missing(name: Library) -> MissingDependencyError:
    if name == "tensorrt-rtx":
        return MissingDependencyError("tensorrt-rtx-cu13-bindings", "rtx")
    return MissingDependencyError("tensorrt", "tensorrt")


RTX_CAPABILITIES = (80, 86, 89, 120, 121)
TURING = 75


@dataclass(frozen=True)
class Gpu:
    """A GPU to build for."""

    name: str
    capability: int

    @property
    def sm(self) -> str:
        """The compute capability as it is written: `sm89`."""
        return f"sm{self.capability}"

    @property
    def library(self) -> Library:
        """The library that serves it."""
        return "tensorrt-rtx" if self.capability in RTX_CAPABILITIES else "tensorrt"


# What people call the GPUs of a compute capability.
CALLED: dict[int, tuple[str, ...]] = {
    75: ("t4", "rtx-2080"),
    80: ("a100",),
    86: ("rtx-3060", "rtx-3090"),
    87: ("orin", "orin-nano-8g", "orin-agx-64g"),
    89: ("rtx-4060", "rtx-4070", "rtx-4090", "l4", "l40"),
    90: ("h100", "h200"),
    110: ("thor",),
    120: ("rtx-5070", "rtx-5080", "rtx-5090", "rtx-pro-6000"),
    121: ("dgx-spark",),
}
GPUS = {f"sm{number}": Gpu(f"sm{number}", number) for number in CALLED}
GPUS |= {name: Gpu(name, number) for number, names in CALLED.items() for name in names}


def find_gpu(name: str, library: Library) -> Gpu:
    """The GPU of a name ("rtx-4090", "RTX 4090", "sm89") that `library` is to build for.

    Raises `InputError` for a name nobody knows and for a GPU that another library serves.
    """
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in GPUS:
        hint = did_you_mean(key, GPUS)
        raise InputError(f"There is no GPU {name!r}.", f"{hint}Use one of: {', '.join(GPUS)}.")
    gpu = GPUS[key]
    if gpu.capability == TURING:
        raise InputError(
            f"{gpu.name} (Turing, sm75) computes neither int4 nor bf16, and "
            f"{TITLES['tensorrt-rtx']} no fp32 products on it.",
            "Use --target onnxruntime-cuda, or a GPU of sm80 or later.",
        )
    if gpu.library != library:
        raise InputError(
            f"{TITLES[library]} does not serve {gpu.name} ({gpu.sm}).",
            f"Use --target {gpu.library}, which does.",
        )
    return gpu


# Measured with TensorRT for RTX 1.7.1 on 1 to 4 layers of StableLM-2-1.6B, int4 and int8, beyond
# the pages of the weight file, which the system may take back: 2 to 3 times the weights.
TIMES_THE_WEIGHTS = 3
FIXED = 400 * 2**20
MOST_ENGINES = 2  # that a decoder is built in, one after the other
MB = 10**6


def build_memory(weights: int) -> int:
    """Bytes that a build from so many bytes of weights takes, at most."""
    return TIMES_THE_WEIGHTS * weights + FIXED


def check_memory(weights: int, available: int | None) -> None:
    """Raise `ResourceError` where a build from so many bytes of weights would not fit."""
    needed = build_memory(weights)
    if available is not None and needed > available:
        raise ResourceError(
            f"The build needs about {needed // MB} MB of memory, {available // MB} MB are free.",
            "Close other programs, or build on a machine with more memory.",
        )
