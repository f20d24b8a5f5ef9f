"""A local archive: images found again by a text or by another image, within what was indexed."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from usearch.index import Index

from medmoe_edge.archive.store import (
    DATABASE,
    Header,
    Vector,
    connect,
    damaged,
    read_header,
    read_vectors,
    reading,
    using,
)
from medmoe_edge.errors import InputError


@dataclasses.dataclass(frozen=True)
class Hit:
    """An image that was found: `path` below the indexed folder, its `similarity` (-1 to 1).

    `modality` is the router's reading of it; of the file's `frames`, `frame` was looked at.
    """

    path: str
    similarity: float
    modality: str
    frame: int
    frames: int

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object."""
        return dataclasses.asdict(self)


class Archive:
    """An index open for reading; a context manager. What others commit meanwhile is seen."""

    def __init__(self, folder: str | os.PathLike[str], model_sha256: str) -> None:
        """Open the index that the model of this sha256 made.

        Raises `InputError` where there is none, it is damaged, or another model made it: vectors
        of different models cannot be compared.
        """
        self.folder, self.model_sha256 = Path(folder), model_sha256
        if not (self.folder / DATABASE).is_file():
            raise InputError(
                f"There is no index {str(folder)!r}.", "Make one first: medmoe-edge index FOLDER"
            )
        with contextlib.ExitStack() as stack:
            with using(self.folder):
                self._database = stack.enter_context(contextlib.closing(connect(self.folder)))
            with reading(self.folder, self._database):
                self._header, self._vectors = self._load()
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def root(self) -> str:
        """The folder that was indexed."""
        return os.fsdecode(self._header.root)

    def search(self, vector: Vector, k: int) -> list[Hit]:
        """The `k` images most similar to a unit vector `[D]`, the best first.

        Every image is compared, so that none is missed; 100,000 take a few milliseconds.
        """
        with reading(self.folder, self._database):
            if read_header(self._database) != self._header:
                self._header, self._vectors = self._load()
            found = self._vectors.search(vector, min(k, max(len(self), 1)), exact=True)
            return [
                self._hit(int(key), float(np.clip(1 - distance, -1, 1)))
                for key, distance in zip(found.keys, found.distances, strict=True)
            ]

    def _load(self) -> tuple[Header, Index]:
        header = read_header(self._database)
        if header is None:
            raise damaged(self.folder)
        check_model(self.folder, header, self.model_sha256)
        return header, read_vectors(self.folder, header, view=True)

    def _hit(self, key: int, similarity: float) -> Hit:
        query = "SELECT path, modality, frame, frames FROM entries WHERE key = ?"
        path, modality, frame, frames = self._database.execute(query, (key,)).fetchone()
        return Hit(os.fsdecode(path), similarity, modality, frame, frames)


def check_model(folder: Path, header: Header, model_sha256: str) -> None:
    """Raise `InputError` for an index that another model made."""
    if header.model_sha256 != model_sha256:
        raise InputError(
            f"The index {folder} was made by another model ({header.model}, "
            f"sha256 {header.model_sha256[:12]}).",
            "Name that model with --model, or make the index anew: medmoe-edge index --force",
        )
