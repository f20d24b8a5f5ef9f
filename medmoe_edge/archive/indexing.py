"""A folder of images to an index: only what is new or changed is read, and kept part by part.

Entries are put and removed, and appear together when they are committed.
"""

import contextlib
import dataclasses
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from medmoe_edge._types import Progress
from medmoe_edge.archive.store import (
    DATABASE,
    FORMAT,
    SCHEMA,
    VECTORS,
    Entry,
    Header,
    Vector,
    busy,
    check_model,
    connect,
    new_vectors,
    read_header,
    read_vectors,
    refusal,
    undo,
    unwritable,
    using,
)
from medmoe_edge.atomic import file_sha256, writing
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.features import unit
from medmoe_edge.errors import (
    ImageError,
    InputError,
    MissingDependencyError,
    ResourceError,
    Told,
    of_machine,
)
from medmoe_edge.image.loading import files_below, load_image, preprocess
from medmoe_edge.image.pixels import Image, pick_frame

DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
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
        there, self._begun = folder.exists(), False
        if not (folder / DATABASE).exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise InputError(
                    f"{folder} exists and is no index.", "Choose another name with -o."
                )
            with writing(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # for its owner alone
        self.folder, self._changed = folder, False
        self._header = Header(
            FORMAT, model["name"], model["sha256"], size, os.fsencode(root), "", ""
        )
        with contextlib.ExitStack() as self._stack, using(folder):
            if not there:
                self._stack.callback(_remove_empty, folder)
            try:
                self._open(force)
            except sqlite3.DatabaseError as error:
                if not force or error.sqlite_errorcode & 0xFF not in DAMAGED:
                    raise
                self._stack.close()
                for name in (DATABASE, f"{DATABASE}-journal"):
                    (folder / name).unlink(missing_ok=True)
                self._open(force)
            self._stack = self._stack.pop_all()

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
            self._changed = self._begun = False
            self._database.execute("BEGIN IMMEDIATE")
            if read_header(self._database) != self._header:  # another was faster
                raise busy(self.folder)
            self._tidy()

    def _open(self, force: bool) -> None:
        self._database = self._stack.enter_context(contextlib.closing(connect(self.folder)))
        self._stack.callback(self._undo)
        self._database.execute("BEGIN IMMEDIATE")
        database = self.folder / DATABASE
        if not database.exists():  # whoever held it has undone what it had begun
            raise busy(self.folder)
        self._begun = not database.stat().st_size
        self._begin(force)

    def _undo(self) -> None:
        if self._begun:
            undo(self.folder, self._header.vectors)

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
            reason = error.strerror if isinstance(error, OSError) else None
            found = unwritable(self.folder, reason) if reason else refusal(self.folder)
            path.unlink(missing_ok=True)
            raise found from error
        self._header = self._header._replace(vectors=path.name, vectors_sha256=file_sha256(path))

    def _tidy(self) -> None:
        """Remove vectors of before, and what killed writers have left."""
        for path in self.folder.glob(VECTORS):
            if path.name != self._header.vectors:
                with contextlib.suppress(OSError):  # Windows keeps what a reader has mapped
                    path.unlink()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # something is in it
        folder.rmdir()


PART = 500  # images embedded between commits: what an interrupted run may lose
NAMED = 20  # skipped files that a report names


@dataclasses.dataclass(frozen=True)
class Indexing(Told):
    """What became of a folder: `entries` are in the index now.

    Images were `embedded`, had the pixels of an indexed one (`reused`) or were as before
    (`unchanged`); files that are gone were `removed`. `skipped` files are no images or cannot be
    read; the first of them are named in `skipped_files`, as paths below the folder.
    """

    index: str
    folder: str
    entries: int
    embedded: int
    reused: int
    unchanged: int
    removed: int
    skipped: int
    skipped_files: tuple[str, ...]
    seconds: float
    model: dict[str, str]
    notice: str = NOTICE


def index_folder(
    folder: str | os.PathLike[str],
    index: str | os.PathLike[str],
    engine: ModalityEngine,
    *,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Indexing:
    """Bring the index of a folder up to date; of a file with frames the middle one stands for it.

    Hidden files and folders are left out. Files of the same size and time of change are not read
    again; the same picture, moved or copied, is not embedded again. Killed at any moment, the index
    is as it was at the last commit. Raises `InputError` as `ArchiveWriter` does, and for a folder
    that cannot be read; `ResourceError` where the machine does not let a file be
    read, after all others.
    """
    started = time.perf_counter()
    root, index = Path(folder).resolve(), Path(index)
    files, skipped = files_below(root, index.resolve())
    model = {"name": engine.name, "sha256": engine.sha256}
    with ArchiveWriter(index, model, engine.config.size, root, force=force) as writer:
        work = _Work(root, engine, writer, skipped)
        for done, path in enumerate(files):
            progress("indexing", done, len(files))
            work.take(path)
        for path in work.known:  # and was not met
            writer.remove(path)
        writer.commit()
        if work.trouble:
            raise work.trouble
        return Indexing(
            index=str(index),
            folder=str(folder),
            entries=len(writer),
            embedded=work.embedded,
            reused=work.reused,
            unchanged=work.unchanged,
            removed=len(work.known),
            skipped=len(work.skipped),
            skipped_files=tuple(work.skipped[:NAMED]),
            seconds=time.perf_counter() - started,
            model=model,
        )


class _Work:
    """One run over a folder. `known` shrinks to the files that are gone."""

    def __init__(
        self, root: Path, engine: ModalityEngine, writer: ArchiveWriter, skipped: list[str]
    ) -> None:
        self.root, self.engine, self.writer = root, engine, writer
        self.known = writer.known()
        self.embedded = self.reused = self.unchanged = 0
        self.skipped = skipped
        self.trouble: ResourceError | None = None  # the first

    def take(self, path: str) -> None:
        """Bring one file up to date."""
        try:
            status = (self.root / path).stat()
            same = (status.st_size, status.st_mtime_ns)
            picture = None if self.known.get(path) == same else load_image(self.root / path)
        except (ImageError, MissingDependencyError):
            self.skipped.append(path)  # and what was known of it goes with the gone
            return
        except (OSError, ResourceError) as error:
            trouble = error if isinstance(error, ResourceError) else of_machine(path, error)
            if trouble is None:
                self.skipped.append(path)
            else:
                self.known.pop(path, None)  # it may be there still
                self.trouble = self.trouble or trouble
            return
        if picture is None:
            self.unchanged += 1
        else:
            self._put(path, same, picture)
        self.known.pop(path, None)

    def _put(self, path: str, same: tuple[int, int], picture: Image) -> None:
        digest = hashlib.sha256(repr(picture.pixels.shape).encode())
        digest.update(picture.pixels.data)
        sha256 = digest.hexdigest()
        found = self.writer.same_picture(sha256)
        vector, modality = found or self._embed(picture)
        frame = pick_frame(path, None, picture.frames)
        self.writer.put(Entry(path, *same, sha256, modality, frame, picture.frames), vector)
        if found:
            self.reused += 1
            return
        self.embedded += 1
        if self.embedded % PART == 0:
            self.writer.commit()

    def _embed(self, picture: Image) -> tuple[Vector, str]:
        """The unit vector `[D]` of a picture, and its modality by the router, in one pass."""
        config = self.engine.config
        features = self.engine.embed_images(preprocess(picture, config.vision))
        modality = config.modalities[int(features.router_logits[0].argmax())]
        return unit(features.pooled[0]), modality
