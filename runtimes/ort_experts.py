"""Experts of a bundle as sessions of ONNX Runtime, each loaded and released by itself.

Why a session for each, and not one graph over mapped weights: ONNX Runtime packs the weights for
its fast kernels onto the heap when a session starts. One graph would pack all of them; without
packing (`session.disable_prepacking`, the weights mapped in place) int8 decodes 1.6 to 14 times
slower, by CPU, and int4 a hundred times; a packed form saved to a file is mapped only in part, and
is for one kind of CPU. A session of 35 MB loads in 60 to 200 ms; packing takes half of that.

The weights are read rather than mapped: one sequential read an expert, a hash over what was read,
and a file that shrinks under us is an error instead of a SIGBUS. ONNX Runtime copies them twice and
packs the copy: the peak of a load is, measured, the packed bytes and three times the stored ones,
which the budget holds; afterwards exactly the packed ones, once `malloc_trim` has given back the
rest. (Were every block mapped by itself, `M_MMAP_THRESHOLD`, it would be 1.4 times, and a load take
half as long again.)
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge.bundle import Bundle
from medmoe_edge.errors import BundleError, ResourceError
from medmoe_edge.runtimes.ort_providers import CPU
from medmoe_edge.runtimes.ort_sessions import one_of_many, session_options
from medmoe_edge.runtimes.paging_store import Expert

WEIGHTS = "expert.data"  # the file that the experts' graphs name, see export/ort_expert.py
COPIES = 3  # of an expert's stored bytes while it is loaded, beside the packed ones
SESSION = 2**18  # bytes that a session takes beside its weights
SLACK = 2**20  # what is smaller than this, the allocator holds ready anyway
Floats = npt.NDArray[np.float32]
Check = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Extent:
    """Where an expert's weights lie in `decoder.data`, their hash, and the graph to run them."""

    name: str
    offset: int
    bytes: int
    sha256: str
    graph: str
    loaded_bytes: int


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
    """Loads experts of a bundle's `decoder.data`, which it keeps open until it is collected.

    `check` says when an expert's hash is compared with the manifest's: when it is "first" loaded,
    "always" or "never". With `drop_pages` what was read does not stay in the kernel's page cache:
    the memory is really free, and the expert's next load reads the storage again.
    """

    def __init__(self, bundle: Bundle, *, check: Check = "first", drop_pages: bool = False) -> None:
        self.extents = read_extents(bundle)
        self._check, self._drop_pages = check, drop_pages
        self._path = bundle.path("decoder.data")
        self._graphs = {
            name: bundle.path(name).read_bytes()
            for name in {extent.graph for extent in self.extents.values()}
        }
        self._checked: set[Expert] = set()
        self._file = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.sizes: Mapping[Expert, int] = {
            expert: extent.loaded_bytes + SESSION for expert, extent in self.extents.items()
        }
        self.stored: Mapping[Expert, int] = {
            expert: extent.bytes for expert, extent in self.extents.items()
        }
        largest = max(extent.bytes for extent in self.extents.values())
        self.scratch = COPIES * largest if largest >= SLACK else 0

    def load(self, expert: Expert) -> OrtExpert:
        """Read, check and load one; raises `BundleError` for bytes that are not the expert's."""
        extent = self.extents[expert]
        try:
            return OrtExpert(self._session(extent, self._read(expert, extent)))
        finally:
            if self.scratch:
                return_free_memory()

    def release(self, value: OrtExpert) -> None:
        """Free its session, whoever still knows the expert."""
        value.session = None
        if self.scratch:
            return_free_memory()

    def announce(self, experts: Sequence[Expert]) -> None:
        """Have the kernel read ahead what will be loaded."""
        for expert in experts:
            extent = self.extents[expert]
            _advise(self._file, extent, "POSIX_FADV_WILLNEED")

    def _read(self, expert: Expert, extent: Extent) -> npt.NDArray[np.uint8]:
        content = np.empty(extent.bytes, np.uint8)
        done = 0
        while done < extent.bytes:
            count = os.preadv(self._file, [content.data[done:]], extent.offset + done)
            if not count:
                raise _damaged(self._path, extent)
            done += count
        if self._drop_pages:
            _advise(self._file, extent, "POSIX_FADV_DONTNEED")
        if self._check == "always" or (self._check == "first" and expert not in self._checked):
            if hashlib.sha256(content.data).hexdigest() != extent.sha256:
                raise _damaged(self._path, extent)
            self._checked.add(expert)
        return content

    def _session(self, extent: Extent, content: npt.NDArray[np.uint8]) -> ort.InferenceSession:
        options = one_of_many(session_options())
        options.add_external_initializers_from_files_in_memory(
            [WEIGHTS], [content], [content.nbytes]
        )
        try:
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


def read_extents(bundle: Bundle) -> dict[Expert, Extent]:
    """The bundle's routed experts; raises `BundleError` where it has no graphs to page them."""
    paging = bundle.manifest.get("paging")
    if bundle.config.moe is None or not paging:
        raise BundleError(
            f"{bundle.name} cannot be paged: it has "
            + ("no graphs of single experts." if bundle.config.moe else "no experts."),
            "Leave the memory budget out, or export the checkpoint again with this version.",
        )
    extents = {}
    for index, layer in enumerate(bundle.config.moe_layers):
        for number in range(bundle.config.moe.num_experts):
            owner = f"decoder.layers.{layer}.ffn.experts.{number}"
            offset, size = bundle.manifest["experts"][owner]
            own = paging["experts"][owner]
            extents[index, number] = Extent(
                f"expert {number} of layer {layer}",
                *(offset, size, own["sha256"], own["graph"], own["bytes"]),
            )
    return extents


def return_free_memory() -> None:
    """Give freed memory back to the system, which glibc would keep for the next load."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such thing
        trim: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
        return trim
    return None


def _advise(file: int, extent: Extent, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, extent.offset, extent.bytes, getattr(os, advice))


def _damaged(path: os.PathLike[str], extent: Extent) -> BundleError:
    return BundleError(
        f"{extent.name.capitalize()} in {path} was changed or is incomplete.",
        "Copy or export the bundle again.",
    )


def _no_memory(extent: Extent) -> ResourceError:
    return ResourceError(
        f"There is no memory for {extent.name}.", "Give it a smaller memory budget."
    )
