"""Experts of a bundle as sessions of ONNX Runtime, each loaded and released by itself.

Why a session for each, and not one graph over mapped weights: ONNX Runtime packs the weights for
its fast kernels onto the heap when a session starts. One graph would pack all of them; without
packing (`session.disable_prepacking`, the weights mapped in place) int8 decodes 1.6 to 14 times
slower, by CPU, and int4 a hundred times. A packed form can be saved to a file, which is mapped, but
is for one kind of CPU and twice as large, since it holds the weights too; and they are packed again
to find it: a session of 35 MB opens in 35 to 45 ms instead of 50 to 75.

ONNX Runtime copies the weights that were read (`expert_file.py`) and packs the copy, matrix by
matrix: the peak of a load is the packed bytes and up to twice the stored ones, which the budget
holds; afterwards exactly the packed ones, once `malloc_trim` has given back the rest. Handed over
as a file in memory, as its own interface for this has it, they would be copied twice, and a load
take a third (int8) to twice (int4) as long again. Most of what is left is new memory's pages,
so that buffers serve again until the store may `rest`.
"""

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import BundleError, ResourceError
from medmoe_edge.runtimes.ort.providers import CPU
from medmoe_edge.runtimes.ort.sessions import one_of_many, session_options
from medmoe_edge.runtimes.paging.expert_file import Check, ExpertFile, Extent
from medmoe_edge.runtimes.paging.store import Expert

COPIES = 2  # of an expert's stored bytes while it is loaded, beside the packed ones
SESSION = 2**18  # bytes that a session takes beside its weights
M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED = 10 * 2**20  # bytes: less than a matrix of an expert, more than most activations
SLACK = 2**20  # what is smaller than this, the allocator holds ready anyway
Floats = npt.NDArray[np.float32]


class OrtExpert:
    """An expert in memory."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session: ort.InferenceSession | None = session

    def __call__(self, tokens: Floats, share: Floats) -> Floats:
        """The expert of tokens `[n, D]`, times each one's share `[n, 1]`."""
        assert self.session is not None
        outputs = self.session.run(["part"], {"tokens": tokens, "share": share})
        return np.asarray(outputs[0], np.float32)


class OrtExpertStore:
    """Loads experts of a bundle; `check` and `drop_pages` are those of `ExpertFile`."""

    def __init__(self, bundle: Bundle, *, check: Check = "first", drop_pages: bool = False) -> None:
        self.file = ExpertFile(bundle, check=check, drop_pages=drop_pages)
        extents = self.file.extents
        if "graphs" not in bundle.manifest["paging"]:
            raise BundleError(
                f"{bundle.name} cannot be paged: it does not say where its experts' weights lie.",
                "Export the checkpoint again with this version.",
            )
        self._weights: Mapping[str, Mapping[str, Any]] = bundle.manifest["paging"]["graphs"]
        self._graphs = {name: bundle.path(name).read_bytes() for name in self._weights}
        self.sizes: Mapping[Expert, int] = {
            expert: extent.loaded_bytes + SESSION for expert, extent in extents.items()
        }
        self.stored = self.file.sizes
        self._largest = max(self.stored.values())
        self.scratch = COPIES * self._largest if self._largest >= SLACK else 0
        self._buffers: list[npt.NDArray[np.uint8]] = []  # that no load uses at the moment

    def load(self, expert: Expert) -> OrtExpert:
        """Read, check and load one; raises `BundleError` for bytes that are not the expert's."""
        try:
            content = self._buffers.pop()
        except IndexError:
            content = np.empty(self._largest, np.uint8)
        try:
            self.file.read(expert, content)
            return OrtExpert(self._session(self.file.extents[expert], content))
        finally:
            self._buffers.append(content)
            if self.scratch:
                return_free_memory()

    def rest(self) -> None:
        """Give back what loads held ready for the next one, and what else is free."""
        self._buffers.clear()
        if self.scratch:
            return_free_memory()

    def release(self, value: OrtExpert) -> None:
        """Free its session, whoever still knows the expert."""
        value.session = None
        if self.scratch:
            return_free_memory()

    def announce(self, experts: Sequence[Expert]) -> None:
        """Have the kernel read ahead what will be loaded."""
        self.file.announce(experts)

    def _session(self, extent: Extent, content: npt.NDArray[np.uint8]) -> ort.InferenceSession:
        options = one_of_many(session_options())
        try:
            weights = {  # copied when the session opens
                name: ort.OrtValue.ortvalue_from_numpy(
                    np.ndarray(about["shape"], about["type"], content, about["offset"])
                )
                for name, about in self._weights[extent.graph].items()
            }
            options.add_external_initializers(list(weights), list(weights.values()))
            return ort.InferenceSession(self._graphs[extent.graph], options, providers=[CPU])
        except MemoryError as error:
            raise _no_memory(extent) from error
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            if "bad_alloc" in str(error) or "Failed to allocate" in str(error):
                raise _no_memory(extent) from error
            raise BundleError(
                f"ONNX Runtime {ort.__version__} cannot load {extent.name}.",
                "Export the checkpoint again with this version.",
            ) from error


def return_free_memory() -> None:
    """Give freed memory back to the system, which glibc would keep for the next load."""
    _call("malloc_trim", 0)


def map_large_blocks() -> None:
    """Have glibc map blocks as large as a matrix each by itself, so that released ones are gone.

    Else it soon keeps them in one heap with the activations, and its holes are no room for others.
    Prefill takes a twelfth longer, as attention's scores are mapped anew in every layer.
    """
    _call("mallopt", M_MMAP_THRESHOLD, MAPPED)


def _call(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such thing
        ctypes.CDLL("libc.so.6")[name](*arguments)


def _no_memory(extent: Extent) -> ResourceError:
    return ResourceError(
        f"There is no memory for {extent.name}.", "Give it a smaller memory budget."
    )
