"""Changing an index: entries are put and removed, and appear together when they are committed."""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from medmoe_edge.archive.archive import check_model
from medmoe_edge.archive.store import (
    DATABASE,
    FORMAT,
    SCHEMA,
    VECTORS,
    Entry,
    Header,
    Vector,
    busy,
    connect,
    file_sha256,
    new_vectors,
    read_header,
    read_vectors,
    unwritable,
    using,
)
from medmoe_edge.errors import InputError

INSERT = (
    f"INSERT INTO entries ({', '.join(Entry._fields)}) "
    f"VALUES ({', '.join('?' * len(Entry._fields))}) RETURNING key"
)


class ArchiveWriter:
    """The one writer of an index; a context manager, which undoes what was not committed.

    `model` names the model by `name` and `sha256`; it makes vectors of `size` values of images
    below `root`. Raises `InputError` for a folder that is no index, an index of another model or
    of another root (unless `force`, which starts anew), and while another one writes.
    """

    def __init__(
        self, folder: Path, model: Mapping[str, str], size: int, root: Path, *, force: bool = False
    ) -> None:
        _make(folder)
        self.folder, self._changed = folder, False
        self._header = Header(
            FORMAT, model["name"], model["sha256"], size, os.fsencode(root), "", ""
        )
        self._stack = contextlib.ExitStack()
        with using(folder), contextlib.ExitStack() as stack:
            self._database = stack.enter_context(contextlib.closing(connect(folder)))
            self._database.execute("BEGIN IMMEDIATE")
            self._begin(force)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self._vectors)

    def known(self) -> dict[str, tuple[int, int]]:
        """By path, the size and the time of change (ns) of each file that is indexed."""
        with using(self.folder):
            rows = self._database.execute("SELECT path, bytes, modified FROM entries")
            return {os.fsdecode(path): (size, modified) for path, size, modified in rows}

    def same_picture(self, sha256: str) -> tuple[Vector, str] | None:
        """The vector and the modality of an indexed picture with these pixels."""
        query = "SELECT key, modality FROM entries WHERE sha256 = ? LIMIT 1"
        with using(self.folder):
            found = self._database.execute(query, (sha256,)).fetchone()
            if found is None:
                return None
            return np.asarray(self._vectors.get(found[0]), np.float32), found[1]

    def put(self, entry: Entry, vector: Vector) -> None:
        """Add an image, or replace the one of the same path."""
        self.remove(entry.path)
        values = (os.fsencode(entry.path), *entry[1:])  # names of files need not be text
        with using(self.folder):
            (key,) = self._database.execute(INSERT, values).fetchone()
            self._vectors.add(key, vector)
        self._changed = True

    def remove(self, path: str) -> None:
        """Remove an image, if it is there."""
        with using(self.folder):
            delete = "DELETE FROM entries WHERE path = ? RETURNING key"
            found = self._database.execute(delete, (os.fsencode(path),)).fetchone()
            if found is not None:
                self._vectors.remove(found[0])
                self._changed = True

    def commit(self) -> None:
        """Let all that was put and removed appear; another part may follow."""
        with using(self.folder):
            if not self._changed:
                return
            self._save()
            self._database.execute("DELETE FROM header")
            marks = ", ".join("?" * len(self._header))
            self._database.execute(f"INSERT INTO header VALUES ({marks})", self._header)
            self._database.execute("COMMIT")
            self._changed = False
            self._database.execute("BEGIN IMMEDIATE")
            if read_header(self._database) != self._header:  # another was faster
                raise busy(self.folder)
            self._tidy()

    def _begin(self, force: bool) -> None:
        header = None if force else read_header(self._database)
        if header is None:
            for statement in SCHEMA.split(";"):  # executescript would commit
                self._database.execute(statement)
            self._vectors, self._changed = new_vectors(self._header.size), True
            return
        check_model(self.folder, header, self._header.model_sha256)
        if header.root != self._header.root:
            raise InputError(
                f"The index {self.folder} is of another folder.",
                "Give this folder an index of its own with -o, or replace that one with --force.",
            )
        self._header = header
        self._vectors = read_vectors(self.folder, header, view=False)
        self._tidy()

    def _save(self) -> None:
        path = self.folder / VECTORS.replace("*", secrets.token_hex(8))
        try:
            self._vectors.save(str(path))
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            raise unwritable(self.folder) from error
        self._header = self._header._replace(vectors=path.name, vectors_sha256=file_sha256(path))

    def _tidy(self) -> None:
        """Remove vectors of before, and what killed writers have left."""
        for path in self.folder.glob(VECTORS):
            if path.name != self._header.vectors:
                with contextlib.suppress(OSError):  # Windows keeps what a reader has mapped
                    path.unlink()


def _make(folder: Path) -> None:
    """The folder of an index, for its owner alone; raises `InputError` for one of anything else."""
    if not (folder / DATABASE).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is no index.", "Choose another name with -o.")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
