"""Sessions of ONNX Runtime: on which execution provider, and opened when.

ONNX Runtime itself falls back to the CPU without a word to the caller where CUDA's libraries do not
load; here that is an error, unless it is allowed.

Opening a session packs the weights for the CPU's kernels, which is most of what loading takes. So
it begins when a model is loaded, while its first image is still being read, on threads of its own,
two sessions at a time.
"""

import contextlib
import io
import logging
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import onnxruntime as ort

from medmoe_edge._version import too_old
from medmoe_edge.errors import BundleError, ResourceError
from medmoe_edge.runtimes.arithmetic import SAME_EVERYWHERE

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


OPENED_AT_ONCE = 2  # memory's bandwidth is the bound
SPIN_MICROSECONDS = 100


class EarlySessions:
    """Sessions of some graphs by name, opened in their order; who needs one waits for it.

    What opening raised is raised then. Once nobody knows the sessions, no more are opened.
    """

    def __init__(
        self, graphs: Mapping[Path, ort.SessionOptions], providers: Sequence[str] = (CPU,)
    ) -> None:
        threads = ThreadPoolExecutor(OPENED_AT_ONCE, "open-session")
        self._opening = {
            path.name: threads.submit(partial(open_session, path, options, providers))
            for path, options in graphs.items()
        }
        threads.shutdown(wait=False)  # a thread ends when nothing is left to open
        weakref.finalize(self, threads.shutdown, wait=False, cancel_futures=True)

    def __getitem__(self, name: str) -> ort.InferenceSession:
        return self._opening[name].result()


def open_session(
    path: Path, options: ort.SessionOptions, providers: Sequence[str] = (CPU,)
) -> ort.InferenceSession:
    """Load a graph; raises `BundleError` where ONNX Runtime refuses it."""
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise BundleError(
            f"ONNX Runtime {ort.__version__} cannot load {path.name}.",
            "Export the checkpoint again with this version.",
        ) from error


def session_options() -> ort.SessionOptions:
    """Quiet, computing the same everywhere, and without the arena, which would keep the peak of the
    prefill for ever.

    Raises `ResourceError` where ONNX Runtime is older than all that this was tried with.
    """
    if found := too_old(ort.__version__):
        raise ResourceError(*found)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry(*SAME_EVERYWHERE)
    return options


def one_of_many(options: ort.SessionOptions) -> ort.SessionOptions:
    """For one of many sessions that run in turns: its threads soon sleep when there is no work.

    Each session has threads of its own; spinning, those of one keep the next from running, and both
    from a machine that does something else (ten times slower beside one busy neighbour). A short
    spin bridges the gap between two operators. A pool for all sessions would forbid every session
    of the process one of its own.
    """
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    return options
