"""Sessions of ONNX Runtime, opened early and on threads of their own.

Opening packs the weights for the CPU's kernels, which is most of what loading takes. So it begins
when a model is loaded, while its first image is still being read, and two sessions at a time.
"""

import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import onnxruntime as ort

from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.ort.providers import CPU

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
    """Quiet, and without the arena, which would keep the peak of the prefill for ever."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
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
