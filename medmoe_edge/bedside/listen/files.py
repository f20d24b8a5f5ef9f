"""The folder of the DICOM node, which holds patients' images and so is for its owner alone.

    queue.sqlite     what is to be done, and what was
    images/KEY.dcm   received objects, until they are answered
    documents/KEY/   the results of an object, a file for each question and kind of document
    audit.jsonl      unless the configuration names another file
    lock             held by the node that works here

KEY is the SHA-256 of the SOP Instance UID: no name of a file tells a UID or a patient.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from medmoe_edge.atomic import atomic_file
from medmoe_edge.errors import MedMoEError
from medmoe_edge.image.loading import Image, shown_name
from medmoe_edge.image.worker import Bounds, read_apart

BOUNDS = Bounds(seconds=30.0)  # of one picture: nobody waits at a screen


class Folder:
    """The paths, and writing that lasts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.documents = root / "images", root / "documents"
        self.queue, self.lock = root / "queue.sqlite", root / "lock"
        for folder in (root, self.images, self.documents):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def image(self, key: str) -> Path:
        """Where a received object lies."""
        return self.images / f"{key}.dcm"

    def picture(self, key: str) -> Image:
        """The picture of a received object, decoded in a process of its own, which is bounded.

        Raises what `load_image` does.
        """
        path = self.image(key)
        try:
            return read_apart(path, bounds=BOUNDS)
        except MedMoEError as error:
            error.what = error.what.replace(shown_name(path), "The object")
            error.args = (f"{error.what} {error.remedy}",)
            raise

    def free(self) -> int:
        """Bytes free on the disk."""
        return shutil.disk_usage(self.root).free

    def keep(self, path: Path, data: bytes) -> None:
        """Write a file that, on return, is on the disk whole, and so is its name."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic_file(path) as file:
            file.write(data)
        for folder in (path.parent, path.parent.parent):
            sync_folder(folder)

    def sweep(self, needed: Iterable[str]) -> None:
        """Remove images that nobody was told were kept, or that are answered."""
        names = {f"{key}.dcm" for key in needed}
        for path in self.images.iterdir():
            if path.name not in names:
                path.unlink()
        for part in self.documents.glob("*/.*.part"):
            part.unlink()


def key_of(uid: str) -> str:
    """The key of an object, from its SOP Instance UID."""
    return hashlib.sha256(uid.encode("ascii")).hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system knows how to."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
