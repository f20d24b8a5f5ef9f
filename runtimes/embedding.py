"""The token embeddings of a bundle, read row by row.

A vocabulary of 100,000 takes 400 MB, of which an answer needs a few dozen rows. They are read and
not mapped: a file that shrinks under us is then an error, and not the end of the process.
"""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmoe_edge.errors import BundleError
from medmoe_edge.runtimes.base import Floats


class EmbeddingTable:
    """Rows `[V, D]` of an `.npy` file, which stays open until the table is collected.

    Raises `BundleError` for a file that is not one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
            self._file = os.open(path, os.O_RDONLY)
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(path) from error
        weakref.finalize(self, os.close, self._file)
        self._dtype, self._width, self._start = table.dtype, table.shape[1], table.offset

    def __getitem__(self, ids: Sequence[int]) -> Floats:
        """The rows of some tokens `[S, D]`; raises `BundleError` where the file ends before."""
        size = self._width * self._dtype.itemsize
        rows = b"".join(os.pread(self._file, size, self._start + token * size) for token in ids)
        if len(rows) < size * len(ids):
            raise _damaged(self._path)
        return np.frombuffer(rows, self._dtype).reshape(len(ids), self._width).astype(np.float32)


def _damaged(path: Path) -> BundleError:
    return BundleError(f"{path} was changed or is incomplete.", "Copy or export the bundle again.")
