"""A local archive: images found again by a text or by another image, within what was indexed.

    archive.sqlite         one row for each image, and the name and sha256 of the file of vectors
    vectors-*.usearch      unit vectors in half precision, each under the key of its row

New vectors go into a new file; the transaction that names it is the only moment of change. Whoever
is killed leaves the old index or the new one, and at worst a file that the next writer removes.
An index derives from patients' images and is as confidential: its folder is for its owner alone.
"""

import contextlib
import dataclasses
import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

# Before usearch: loaded after it, ONNX Runtime ends the process (usearch 2.26, numkong 7.8).
import onnxruntime  # noqa: F401
from usearch.index import Index

from medmoe_edge.atomic import file_sha256
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.bundle.machine import tried
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.features import Reading, unit
from medmoe_edge.errors import ImageError, InputError, ResourceError, Told, of_machine
from medmoe_edge.image.loading import load_image, preprocess

Vector = npt.NDArray[np.float32]
DATABASE = "archive.sqlite"
VECTORS = "vectors-*.usearch"
FORMAT = 1
AGAIN = "Make it anew: medmoe-edge index FOLDER --force"
REFUSED = {
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
    sqlite3.SQLITE_IOERR,
}

SCHEMA = """
DROP TABLE IF EXISTS header;
DROP TABLE IF EXISTS entries;
CREATE TABLE header (
    format INTEGER, model TEXT, model_sha256 TEXT, size INTEGER, root BLOB, vectors TEXT,
    vectors_sha256 TEXT
);
CREATE TABLE entries (
    key INTEGER PRIMARY KEY, path BLOB UNIQUE, bytes INTEGER, modified INTEGER, sha256 TEXT,
    modality TEXT, frame INTEGER, frames INTEGER
);
CREATE INDEX pictures ON entries (sha256);
"""


class Header(NamedTuple):
    """Of what an index is: `model` made vectors of `size` values of the images below `root`."""

    format: int
    model: str
    model_sha256: str
    size: int
    root: bytes
    vectors: str
    vectors_sha256: str


class Entry(NamedTuple):
    """One image: its `path` below the root, and what tells whether the file is still the same.

    `bytes` and `modified` (ns) are the file's, `sha256` that of the picture's pixels; `modality` is
    the router's reading of it, `frame` the one of `frames` that was looked at.
    """

    path: str
    bytes: int
    modified: int
    sha256: str
    modality: str
    frame: int
    frames: int


def connect(folder: Path) -> sqlite3.Connection:
    """The database of an index; also to read it, since a killed writer's journal is rolled back."""
    return sqlite3.connect(folder / DATABASE, isolation_level=None)


def read_header(database: sqlite3.Connection) -> Header | None:
    """The header, or None where nothing was ever committed."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'header'").fetchone():
        return None
    (version,) = database.execute("SELECT format FROM header").fetchone()
    if version != FORMAT:
        raise InputError("The index was made by another version of medmoe-edge.", AGAIN)
    return Header(*database.execute("SELECT * FROM header").fetchone())


def read_vectors(folder: Path, header: Header, *, view: bool) -> Index:
    """The vectors, mapped (`view`) or in memory, of a header that a transaction holds on to.

    The hash is compared first: usearch trusts what it reads.
    """
    path = folder / header.vectors
    if path.parent != folder or file_sha256(path) != header.vectors_sha256:
        raise damaged(folder)
    vectors = Index.restore(str(path), view=view)
    if vectors is None or vectors.ndim != header.size:
        raise damaged(folder)
    return vectors


def new_vectors(size: int) -> Index:
    """No vectors yet. All are compared with a query, so the graph is as small as it can be."""
    return Index(ndim=size, metric="cos", dtype="f16", connectivity=2, expansion_add=1)


@contextlib.contextmanager
def using(folder: Path) -> Iterator[None]:
    """Around all that reads or writes an index: what is wrong with it, told to a person."""
    try:
        yield
    except sqlite3.Error as error:
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the kind, without its details
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise busy(folder) from None
            case sqlite3.SQLITE_FULL:
                raise unwritable(folder, os.strerror(errno.ENOSPC)) from error
            case kind if kind in REFUSED:
                raise refusal(folder) from error
        raise damaged(folder) from error
    except (FileNotFoundError, TypeError, ValueError, OverflowError) as error:
        raise damaged(folder) from error


@contextlib.contextmanager
def reading(folder: Path, database: sqlite3.Connection) -> Iterator[None]:
    """One state of an index: until the block ends, nobody commits another."""
    with using(folder):
        database.execute("BEGIN")
        try:
            yield
        finally:
            database.execute("ROLLBACK")


def busy(folder: Path) -> InputError:
    """The error for an index that another writer holds."""
    return InputError(
        f"The index {folder} is being written by another command.", "Try again when it has ended."
    )


def refusal(folder: Path) -> ResourceError:
    """The error for a database that the system refused, with the reason that SQLite does not tell.

    `tried` finds it.
    """
    error = tried(folder / DATABASE)
    found = of_machine(f"The index {folder}", error)
    return found or unwritable(folder, error.strerror if error else None)


def undo(folder: Path, vectors: str) -> None:
    """Remove an index of which nothing was committed, while nobody else may write to it."""
    # the journal first: another database would take it over
    with contextlib.suppress(OSError):  # Windows keeps what is open
        for name in (f"{DATABASE}-journal", DATABASE, vectors or DATABASE):
            (folder / name).unlink(missing_ok=True)


def unwritable(folder: Path, reason: str | None = None) -> ResourceError:
    """The error for a disk that does not take an index."""
    return ResourceError(
        f"The index {folder} cannot be written{f' ({reason})' if reason else ''}.",
        "Free some space, check its permissions, or write elsewhere.",
    )


def damaged(folder: Path) -> InputError:
    """The error for an index that contradicts itself."""
    return InputError(f"The index {folder} is damaged or incomplete.", AGAIN)


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
            hits = []
            for key, distance in zip(found.keys, found.distances, strict=True):
                query = "SELECT path, modality, frame, frames FROM entries WHERE key = ?"
                path, *told = self._database.execute(query, (int(key),)).fetchone()
                hits.append(Hit(os.fsdecode(path), float(np.clip(1 - distance, -1, 1)), *told))
            return hits

    def _load(self) -> tuple[Header, Index]:
        header = read_header(self._database)
        if header is None:
            raise damaged(self.folder)
        check_model(self.folder, header, self.model_sha256)
        return header, read_vectors(self.folder, header, view=True)


def check_model(folder: Path, header: Header, model_sha256: str) -> None:
    """Raise `InputError` for an index that another model made."""
    if header.model_sha256 != model_sha256:
        raise InputError(
            f"The index {folder} was made by another model ({header.model}, "
            f"sha256 {header.model_sha256[:12]}).",
            "Name that model with --model, or make the index anew: medmoe-edge index --force",
        )


IMAGE_NAMES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".nii", ".nii.gz")


@dataclasses.dataclass(frozen=True)
class Retrieval(Told):
    """The `hits` for a query, the best first, of `entries` images below `folder`.

    `kind` says what the query was taken for; `reading` is the router's view of a query image, None
    for a text. Similarities are cosines: only their order tells something, and the first hit of a
    query that nothing fits is a first hit too.
    """

    query: str
    kind: Literal["text", "image"]
    hits: tuple[Hit, ...]
    entries: int
    index: str
    folder: str
    reading: Reading | None
    seconds: float
    model: dict[str, str]
    notice: str = NOTICE


def retrieve(
    query: str, index: str | os.PathLike[str], engine: ModalityEngine, k: int = 10
) -> Retrieval:
    """The `k` images of an index most like a query: an image, if there is such a file, or a text.

    Raises `InputError` as `Archive` does, for a text without a word, and for a query that is named
    like an image file where there is none; `ImageError` for a file that is no image.
    """
    started = time.perf_counter()
    if k < 1:
        raise InputError(f"{k} images were asked for.", "Ask for at least one.")
    with Archive(index, engine.sha256) as archive:
        reading = None
        if is_image(query):
            features = engine.embed_images(preprocess(load_image(query), engine.config.vision))
            vector, reading = unit(features.pooled[0]), engine.reading(features)
        else:
            vector = engine.embed_text(query)
        return Retrieval(
            query=query,
            kind="image" if reading else "text",
            hits=tuple(archive.search(vector, k)),
            entries=len(archive),
            index=str(index),
            folder=archive.root,
            reading=reading,
            seconds=time.perf_counter() - started,
            model={"name": engine.name, "sha256": engine.sha256},
        )


def is_image(query: str) -> bool:
    """Whether a query is the path of a file; raises `ImageError` where it only looks like one."""
    try:
        if Path(query).is_file():
            return True
    except (OSError, ValueError):  # too long for a path
        return False
    if query.lower().endswith(IMAGE_NAMES):
        raise ImageError("There is no such image file.", "Check its path, or ask in words.")
    return False
