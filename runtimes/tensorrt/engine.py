"""An engine file opened: refused with a remedy where it is not for this library or this GPU."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from medmoe_edge.bundle.target import Target
from medmoe_edge.errors import BundleError, ResourceError
from medmoe_edge.export.tensorrt_library import (
    TITLES,
    library_of,
    library_version,
    load_library,
    make_logger,
    reason,
)
from medmoe_edge.runtimes.tensorrt.device import Device


class Context(Protocol):
    """What is used of TensorRT's `IExecutionContext`, which says False where it fails."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """The shape of an input of varying shape."""

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Where an input is read or an output written, on the device."""

    def execute_async_v3(self, stream: int) -> bool:
        """Run, when the stream comes to it."""


def is_capturable(context: Context, stream: int) -> bool:
    """Whether TensorRT lets a launch be recorded; the library for RTX may still be compiling."""
    ask: Callable[[int], bool] | None = getattr(context, "is_stream_capturable", None)
    return ask is None or ask(stream)


class Engine(Protocol):
    """A model on the device."""

    def context(self, profile: int) -> Context:
        """Runs the engine within one of its optimisation profiles."""


def check_target(target: Target, version: str, sm: str) -> None:
    """Raise `BundleError` unless engines for `target` run on this library and this GPU."""
    title = TITLES[library_of(target)]
    again = f"Build it again: medmoe-edge export CHECKPOINT --target {target.name} --gpu {sm}"
    if target.library_version != version:
        raise BundleError(
            f"The bundle was built with {title} {target.library_version}, "
            f"{version} is installed here, and engines run only on their own version.",
            again,
        )
    if target.gpu != sm:
        raise BundleError(
            f"The bundle was built for GPUs of {target.gpu}, the one here is {sm}.", again
        )


class TensorRTEngine:
    """A deserialised engine; raises `BundleError` for a file that TensorRT refuses."""

    def __init__(self, path: Path, target: Target, device: Device) -> None:
        self._trt = load_library(library_of(target))
        check_target(target, library_version(self._trt), device.sm)
        self._device, self._log = device, make_logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BundleError(
                f"TensorRT cannot load {path.name}: {reason(chr(10).join(self._log.errors))}.",
                "Build the bundle again on, or for, this machine; see medmoe-edge doctor.",
            )

    def context(self, profile: int) -> Context:
        """Runs the engine within one of its optimisation profiles."""
        # Memory for what this profile needs, not for the largest of all.
        strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context: Any = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(
            profile, self._device.stream
        ):
            raise ResourceError(
                "The GPU has too little memory left for the engine's intermediate results.",
                "Close other programs that use it, or use a smaller bundle (--int4).",
            )
        self._device.synchronise()
        ran: Context = context
        return ran
