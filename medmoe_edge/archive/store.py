"""The folder of an archive index: what is indexed in SQLite, its vectors in usearch.

    archive.sqlite         one row for each image, and the name and sha256 of the file of vectors
    vectors-*.usearch      unit vectors in half precision, each under the key of its row

New vectors go into a new file; the transaction that names it is the only moment of change. Whoever
is killed leaves the old index or the new one, and at worst a file that the next writer removes.
An index derives from patients' images and is as confidential: its folder is for its owner alone.
"""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# usearch, of hnswlib, faiss-cpu and itself: Apache-2.0 with wheels for x86 and ARM at a sixth of
# faiss's size (hnswlib has none), removes entries, maps its file, stores halves.
from usearch.index import Index

from medmoe_edge.errors import InputError, ResourceError

Vector = npt.NDArray[np.float32]

DATABASE = "archive.sqlite"
VECTORS = "vectors-*.usearch"
FORMAT = 1
AGAIN = "Make it anew: medmoe-edge index FOLDER --force"

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


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def using(folder: Path) -> Iterator[None]:
    """Around all that reads or writes an index: what is wrong with it, told to a person."""
    try:
        yield
    except sqlite3.Error as error:
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:  # the kind, without its details
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise busy(folder) from None
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                raise InputError(
                    f"The index {folder} may not be written.", "Check its permissions."
                ) from error
            case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
                raise unwritable(folder) from error
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


def unwritable(folder: Path) -> ResourceError:
    """The error for a disk that does not take an index."""
    return ResourceError(
        f"The index {folder} cannot be written.",
        "Free some space, check its permissions, or write elsewhere.",
    )


def damaged(folder: Path) -> InputError:
    """The error for an index that contradicts itself."""
    return InputError(f"The index {folder} is damaged or incomplete.", AGAIN)
