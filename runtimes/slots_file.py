"""Experts' bytes as they lie in a bundle: one sequential read each, checked by their hash."""

import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping

from medmoe_edge.bundle import Bundle
from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.device_memory import Bytes
from medmoe_edge.runtimes.ort_experts import Extent, read_extents
from medmoe_edge.runtimes.paging_store import Expert


class ExpertFile:
    """The routed experts in a bundle's `decoder.data`, kept open until this is collected.

    Raises `BundleError` where the bundle says no hashes of single experts.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.extents = read_extents(bundle)
        self._path = bundle.path("decoder.data")
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
            extent = self.extents[expert]
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, extent.offset, extent.bytes, os.POSIX_FADV_WILLNEED)

    def read(self, expert: Expert, into: Bytes) -> None:
        """Read one to the front of `into`; raises `BundleError` for bytes that are not its own.

        They are compared with its hash the first time.
        """
        extent = self.extents[expert]
        content = into[: extent.bytes]
        done = 0
        while done < extent.bytes:
            count = os.preadv(self._file, [content.data[done:]], extent.offset + done)
            if not count:
                raise self._damaged(extent)
            done += count
        if expert not in self._checked:
            if hashlib.sha256(content.data).hexdigest() != extent.sha256:
                raise self._damaged(extent)
            self._checked.add(expert)

    def _damaged(self, extent: Extent) -> BundleError:
        return BundleError(
            f"{extent.name.capitalize()} in {self._path} was changed or is incomplete.",
            "Copy or export the bundle again.",
        )
