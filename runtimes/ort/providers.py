"""Which execution provider of ONNX Runtime runs a bundle: chosen, said, and checked afterwards.

ONNX Runtime itself falls back to the CPU without a word to the caller where CUDA's libraries do not
load; here that is an error, unless it is allowed.
"""

import contextlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnxruntime as ort

from medmoe_edge.errors import BundleError, ResourceError

Device = Literal["auto", "cpu", "cuda"]
TARGETS: dict[str, Literal["cpu", "cuda"]] = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
REMEDY = (
    "See what is missing: medmoe-edge doctor; install it: pip install 'medmoe-edge[gpu]'; "
    "or run it on the CPU."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A provider and the reason for it."""

    device: Literal["cpu", "cuda"]
    why: str

    @property
    def providers(self) -> list[str]:
        """For a session. CUDA's keeps the CPU's beside it, which computes shapes."""
        return [CUDA, CPU] if self.device == "cuda" else [CPU]


def choose_provider(
    requested: Device, available: Sequence[str], target: str, *, allow_fallback: bool = False
) -> Choice:
    """The provider for graphs that were made for `target`, the name in a bundle's manifest.

    `available` are the providers that ONNX Runtime was built with. `auto` takes what the graphs are
    made for. Raises `BundleError` for graphs that `requested` cannot run, and `ResourceError` where
    CUDA is not available and the CPU may not stand in for it.
    """
    made_for = TARGETS.get(target)
    if made_for is None:
        raise BundleError(
            f"The bundle is made for {target}, not for ONNX Runtime.",
            f"Export the model for one of: {', '.join(TARGETS)}.",
        )
    if requested == "cpu":
        return Choice("cpu", "it was asked for")
    if made_for == "cpu":
        if requested == "cuda":
            raise BundleError(
                "The bundle's graphs are made for the CPU.",
                "Export the model with: --target onnxruntime-cuda",
            )
        return Choice("cpu", "the bundle's graphs are made for it")
    if CUDA in available:
        return Choice("cuda", "the bundle's graphs are made for it")
    if allow_fallback:
        return _fall_back("the installed ONNX Runtime has no CUDA provider")
    raise ResourceError(
        "The bundle is made for CUDA, and the installed ONNX Runtime has no CUDA provider.", REMEDY
    )


def check_providers(choice: Choice, loaded: Sequence[str], *, allow_fallback: bool) -> Choice:
    """What a session really runs on, by its own account `loaded`, once it is open.

    Raises `ResourceError` for a fall back to the CPU that is not allowed.
    """
    if choice.device == "cpu" or CUDA in loaded:
        return choice
    if allow_fallback:
        return _fall_back("CUDA's provider did not load")
    raise ResourceError(
        "ONNX Runtime could not load its CUDA provider and would have run on the CPU: a driver, a "
        "library or the GPU itself is missing.",
        REMEDY,
    )


def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed, which are on no search path.

    What cannot be found is a matter for `check_providers`: the system may have it.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        ort.preload_dlls()
    if said.getvalue():
        logger.debug("%s", said.getvalue().strip())


def _fall_back(why: str) -> Choice:
    logger.warning("The bundle is made for CUDA and runs on the CPU, slowly: %s.", why)
    return Choice("cpu", why)
