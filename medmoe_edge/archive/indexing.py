"""A folder of images to an index: only what is new or changed is read, and kept part by part."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medmoe_edge.archive.store import Entry, Vector
from medmoe_edge.archive.writing import ArchiveWriter
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.similarity import unit
from medmoe_edge.errors import ImageError, InputError, MissingDependencyError
from medmoe_edge.image.loading import Image, load_image, pick_frame, preprocess

PART = 500  # images embedded between commits: what an interrupted run may lose
NAMED = 20  # skipped files that a report names

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Indexing:
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

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object."""
        return dataclasses.asdict(self)


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
    that cannot be read.
    """
    started = time.perf_counter()
    root, index = Path(folder).resolve(), Path(index)
    files, skipped = _files(root, index.resolve())
    model = {"name": engine.name, "sha256": engine.sha256}
    with ArchiveWriter(index, model, engine.config.size, root, force=force) as writer:
        work = _Work(root, engine, writer, skipped)
        for done, path in enumerate(files):
            progress("indexing", done, len(files))
            work.take(path)
        work.remove_gone()
        return Indexing(
            index=str(index),
            folder=str(folder),
            entries=len(writer),
            embedded=work.embedded,
            reused=work.reused,
            unchanged=work.unchanged,
            removed=work.removed,
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
        self.embedded = self.reused = self.unchanged = self.removed = 0
        self.skipped = skipped

    def take(self, path: str) -> None:
        """Bring one file up to date."""
        try:
            status = (self.root / path).stat()
            same = (status.st_size, status.st_mtime_ns)
            if self.known.get(path) == same:
                self.unchanged += 1
            else:
                self._put(path, same, load_image(self.root / path))
        except (OSError, ImageError, MissingDependencyError):
            self.skipped.append(path)  # and what was known of it goes with the gone
        else:
            self.known.pop(path, None)

    def remove_gone(self) -> None:
        """What is known and was not met."""
        for path in self.known:
            self.writer.remove(path)
        self.removed = len(self.known)
        self.writer.commit()

    def _put(self, path: str, same: tuple[int, int], picture: Image) -> None:
        sha256 = picture_sha256(picture)
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


def picture_sha256(picture: Image) -> str:
    """Of a picture's shape and pixels, as they are shown."""
    digest = hashlib.sha256(repr(picture.pixels.shape).encode())
    digest.update(picture.pixels.data)
    return digest.hexdigest()


def _files(root: Path, index: Path) -> tuple[list[str], list[str]]:
    """All files below `root` in order, and what folders cannot be read, as paths below it.

    Hidden ones and the index are left out.
    """
    if not root.is_dir():
        raise InputError(f"There is no folder {str(root)!r}.", "Give a folder of images.")
    files: list[str] = []
    unread: list[str] = []

    def skip(error: OSError) -> None:
        below = os.path.relpath(error.filename, root)
        if below == os.curdir:  # all that is indexed would count as gone
            raise error
        unread.append(below)

    for parent, folders, names in os.walk(root, onerror=skip):
        folders[:] = [
            name for name in folders if not name.startswith(".") and Path(parent, name) != index
        ]
        below = os.path.relpath(parent, root)
        files += [
            os.path.normpath(os.path.join(below, name))
            for name in names
            if not name.startswith(".")
        ]
    return sorted(files), unread
