"""TensorRT is two libraries with one API: for RTX cards, and proper for Jetson and data centres.

TensorRT for RTX builds engines on any machine, for any card that it serves; TensorRT proper builds
only on the GPU that will run the engine. Which of them is meant is known when the program runs, so
their modules, and what comes of them, are typed `Any`.
"""

import importlib
import logging
import re
from typing import Any, Literal

from medmoe_edge.bundle.target import Target
from medmoe_edge.errors import MissingDependencyError, ResourceError

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
