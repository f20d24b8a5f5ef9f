"""Experts' bytes as they lie in a bundle: one sequential read each, checked by their hash.

They go into one buffer or into several, one after the other.

They are read rather than mapped: a file that shrinks under us is an error instead of a SIGBUS.
"""

import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.paging.pager import Expert

Bytes = npt.NDArray[np.uint8]
Check = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Extent:
    """Where an expert's weights lie, and their hash.

    In a portable bundle also the graph that runs them, and how many bytes they take when loaded.
    """

    name: str
    offset: int
    bytes: int
    sha256: str
    graph: str = ""
    loaded_bytes: int = 0


class ExpertFile:
    """The routed experts in their file of a bundle, kept open until this is collected.

    `check` says when an expert's hash is compared with the manifest's: when it is "first" read,
    "always" or "never". With `drop_pages` what was read does not stay in the kernel's page cache:
    the memory is really free, and the expert's next load reads the storage again. Raises
    `BundleError` where the bundle says no hashes of single experts.
    """

    def __init__(self, bundle: Bundle, *, check: Check = "first", drop_pages: bool = False) -> None:
        self.extents = read_extents(bundle)
        self._check, self._drop_pages = check, drop_pages
        self._path = bundle.path(bundle.manifest["paging"].get("file", "decoder.data"))
        self._checked: set[Expert] = set()
        self._file = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    @property
    def sizes(self) -> Mapping[Expert, int]:
        """Bytes of each expert."""
        return {expert: extent.bytes for expert, extent in self.extents.items()}

    def announce(self, experts: Iterable[Expert]) -> None:
        """Have the kernel read ahead what will be read."""
        for expert in experts:
            self._advise(self.extents[expert], "POSIX_FADV_WILLNEED")

    def read(self, expert: Expert, *into: Bytes) -> None:
        """Read one to the front of `into`; raises `BundleError` for bytes that are not its own."""
        extent = self.extents[expert]
        content = _cut([part.data for part in into], 0, extent.bytes)
        done = 0
        while done < extent.bytes:
            rest = _cut(content, done, extent.bytes)
            count = os.preadv(self._file, rest, extent.offset + done)
            if not count:
                raise self._damaged(extent)
            done += count
        if self._drop_pages:
            self._advise(extent, "POSIX_FADV_DONTNEED")
        if self._check == "always" or (self._check == "first" and expert not in self._checked):
            digest = hashlib.sha256()
            for part in content:
                digest.update(part)
            if digest.hexdigest() != extent.sha256:
                raise self._damaged(extent)
            self._checked.add(expert)

    def _advise(self, extent: Extent, advice: str) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, extent.offset, extent.bytes, getattr(os, advice))

    def _damaged(self, extent: Extent) -> BundleError:
        return BundleError(
            f"{extent.name.capitalize()} in {self._path} was changed or is incomplete.",
            "Copy or export the bundle again.",
        )


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
                *(offset, size, own["sha256"], own.get("graph", ""), own.get("bytes", 0)),
            )
    return extents


def _cut(parts: Sequence[memoryview], begin: int, end: int) -> list[memoryview]:
    """The bytes from `begin` to `end` of parts that follow one another."""
    found = []
    for part in parts:
        found.append(part[max(begin, 0) : max(end, 0)])
        begin, end = begin - len(part), end - len(part)
    return [part for part in found if len(part)]
