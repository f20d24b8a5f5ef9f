"""A downloaded dataset, a folder or a zip or a folder with zips in it, seen as one list of files.

Names come from strangers. Nothing is extracted: a file is read only when asked for by name, and
whoever writes it elsewhere first passes the name through `safe_name`.
"""

import os
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Self

from medmoe_edge.errors import DataError

_MAX_FILES = 100_000  # PathVQA has 5,000 images; far more means the wrong folder was given
_MAX_BYTES = 1 << 28  # of one file; the largest that official downloads need has some megabytes


class Download:
    """Context manager over `source`; hidden files and Mac resource forks are passed over.

    Raises `DataError` where `source` is neither folder nor zip, is damaged or is far too large.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._open = ExitStack()
        self._files: dict[str, Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        self._by_last_part: dict[str, list[str]] = defaultdict(list)

    def __enter__(self) -> Self:
        if self.source.is_dir():
            self._add_folder()
        elif self.source.is_file():
            self._add_zip(self.source)
        else:
            raise DataError(f"{self.source} does not exist.", "Check the path.")
        for name in sorted(self._files, key=lambda name: (name.count("/"), name)):
            self._by_last_part[PurePosixPath(name).name].append(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def names(self, suffix: str) -> list[str]:
        """All files whose name ends with `suffix`, sorted."""
        return sorted(name for name in self._files if name.endswith(suffix))

    def find(self, name: str) -> str | None:
        """The file with this relative name in the outermost folder that has one."""
        candidates = self._by_last_part.get(PurePosixPath(name).name, [])
        return next((one for one in candidates if f"/{one}".endswith(f"/{name}")), None)

    def read(self, name: str) -> bytes:
        """The content of a file from `names` or `find`."""
        entry = self._files[name]
        where = f"{self.source}: {name}"
        size = entry.stat().st_size if isinstance(entry, Path) else entry[1].file_size
        if size > _MAX_BYTES:
            raise DataError(f"{where} is too large.", "Check that this is the official download.")
        try:
            return entry.read_bytes() if isinstance(entry, Path) else entry[0].read(entry[1])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise DataError(f"{where} is damaged.", "Download it again.") from error
        except (RuntimeError, NotImplementedError) as error:  # encrypted, exotic compression
            raise DataError(f"{where} cannot be unpacked.", "Unpack the zip yourself.") from error

    def path(self, name: str) -> Path:
        """Where a file lies on the disk; one inside a zip raises `DataError`."""
        entry = self._files[name]
        if not isinstance(entry, Path):
            raise DataError(f"{self.source}: {name} is inside a zip.", "Unpack the zip first.")
        return entry

    def _add_folder(self) -> None:
        for path in _walk(self.source):
            if path.parent == self.source and path.suffix.lower() == ".zip":
                self._add_zip(path)
            else:
                self._add(path.relative_to(self.source).as_posix(), path)

    def _add_zip(self, path: Path) -> None:
        try:
            archive = self._open.enter_context(zipfile.ZipFile(path))
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a readable zip.", "Give the downloaded folder or zip, complete."
            ) from error
        for member in archive.infolist():
            if not member.is_dir():
                self._add(member.filename, (archive, member))

    def _add(self, name: str, entry: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo]) -> None:
        if any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
            return
        self._files[name] = entry
        if len(self._files) > _MAX_FILES:
            raise DataError(
                f"{self.source} holds more than {_MAX_FILES} files.", "Give the dataset's folder."
            )


def safe_name(name: str, where: str) -> str:
    """The relative path `name`, if it stays inside the folder it is joined to; else `DataError`."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or set(name) & set("\\:\0"):
        raise DataError(
            f"{where} names a file outside the dataset.", "Use the official download; report this."
        )
    return path.as_posix()


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file():  # a device or a pipe would never end
                yield path
