"""Files that appear whole or not at all, as folders do; their hashes, and what of them is read."""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medmoe_edge.errors import InputError, ResourceError

MOST_TEXT = 64 * 10**6  # bytes: an index of the largest checkpoints has a few million


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal; raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular(path: Path) -> None:
    """Raise `OSError` for a pipe or a device, reading which might never end, or no file at all."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_small(path: Path) -> bytes:
    """A file of text beside a model's weights; raises `OSError`, also where it is too large."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        what = f"it has more than {MOST_TEXT // 10**6} million bytes"
        raise OSError(errno.EFBIG, what, str(path))
    return content


@contextlib.contextmanager
def atomic_folder(target: Path, *, force: bool, marker: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place once the block has ended well.

    What may not be replaced is refused as `check_target` does; behind a link, the folder that it
    names is replaced. Raises `ResourceError` where the disk does not take it.
    """
    target = target.resolve()
    check_target(target, force=force, marker=marker)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_target(target, force=force, marker=marker)  # which another may have made meanwhile
        if target.exists():
            _replace(temporary, target)
        else:
            temporary.rename(target)
    except OSError as error:
        raise ResourceError(
            f"{target} cannot be written ({error.strerror or error}).",
            "Free some space, check its permissions, or write elsewhere.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `target` once the block has ended well.

    An `OSError` says which file it was about, also where the system did not: `write` never does.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        part.replace(target)
    except OSError as error:
        if error.filename in (None, str(part)):
            error.filename = str(target)
        raise
    finally:
        with contextlib.suppress(OSError):  # which would hide the first one
            part.unlink()


def refuse_special(path: Path) -> None:
    """Raise `InputError` for an output that is a device, a pipe or a socket, which a file replaces.

    That of /dev/stdout too, where it leads to a file: who is root would take it from everybody.
    """
    if path.exists() and (not (path.is_file() or path.is_dir()) or path.parent == Path("/dev")):
        raise InputError(
            f"{path} stands for a device or a pipe, and is not replaced by a file.",
            "Give the name of a file.",
        )


def _sync(descriptor: int) -> None:
    """Bring a file or a folder to the disk, where the file system knows how to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system knows how to."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def size_of(path: Path) -> int:
    """Bytes of a file; none of one that has just gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def bytes_under(folder: Path, skipped: Iterable[Path] = ()) -> int:
    """Bytes of all files in a folder, but for paths that begin as those that are `skipped`."""
    beginnings, found = tuple(map(str, skipped)), 0
    for at, _, names in os.walk(folder):  # rglob raises where a folder goes meanwhile
        if not at.startswith(beginnings):
            found += sum(size_of(Path(at, name)) for name in names)
    return found


class Places:
    """What lay at some paths when this was made, to tell whether it lies there still.

    At those of `same` the very same file or folder has to lie, at those of `folders` one on the
    same disk: file systems may number a folder anew that nobody has open.
    """

    def __init__(self, same: Iterable[Path] = (), folders: Iterable[Path] = ()) -> None:
        self._same = {path: path.stat() for path in same}
        self._disks = {path: path.stat().st_dev for path in folders}

    def lost(self) -> Path | None:
        """The first path at which nothing lies any more, or something else."""
        for path in (*self._same, *self._disks):
            try:
                now = path.stat()
            except OSError:
                return path
            known = self._same.get(path)
            if not os.path.samestat(now, known) if known else now.st_dev != self._disks[path]:
                return path
        return None


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system has no hard links.

    A symbolic link is made anew with the same text, by which a relative one may name another file.
    """
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def carry_over(source: Path, target: Path, *, without: Set[Path]) -> None:
    """Link everything of the folder `source` into `target`, but what is there already.

    `without` are files and folders of `source` that are left out. Folders keep their permissions.
    """
    for entry in source.iterdir():
        into = target / entry.name
        if entry in without:
            continue
        if entry.is_dir() and (into.is_dir() or not entry.is_symlink()):
            into.mkdir(exist_ok=True)
            carry_over(entry, into, without=without)
        elif not os.path.lexists(into):
            link(entry, into)
    shutil.copymode(source, target)


def check_unicode(folder: Path) -> None:
    """Raise `InputError` for a name that is no Unicode, by which ONNX Runtime opens nothing."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{str(folder)!r} is not valid Unicode, and no model can be opened by such a name.",
            "Rename it, and each folder around it that is named so.",
        ) from error


def check_target(target: Path, *, force: bool, marker: str) -> None:
    """Raise `InputError` for an existing `target`, unless `force` is given and it is one of ours.

    Of ours is a folder that holds the file `marker`. `check_unicode` is asked, too.
    """
    check_unicode(target)
    if target.exists() and not force:
        raise InputError(f"{target} exists already.", "Choose another name, or pass --force.")
    if target.exists() and not (target / marker).is_file():
        raise InputError(
            f"{target} holds no {marker}, so it will not be replaced.", "Choose another name."
        )


def check_apart(
    output: Path, *inputs: Path | None, around: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Raise `InputError` for an output that is, holds or lies in one of its inputs.

    It may lie in those that are `around` it, such as a folder of images.
    """
    out = output.resolve()
    apart = [path.resolve() for path in inputs if path]
    wide = [Path(path).resolve() for path in around if path]
    holds = any(path.is_relative_to(out) for path in (*apart, *wide))
    if holds or any(out.is_relative_to(path) for path in apart):
        raise InputError(
            f"{output} would replace or change its own input.", "Choose a place beside it."
        )


def _replace(temporary: Path, target: Path) -> None:
    old = temporary.with_suffix(".old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)  # the new folder stands: what is left is only litter


if TYPE_CHECKING:  # the command line writes files before it knows whether it computes
    import numpy.typing as npt

    Array = npt.NDArray[Any]
Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, and shape

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4}  # bytes
_NAMES = {"<f8": "F64", "<i8": "I64", "<f4": "F32", "<i4": "I32"}  # of numpy's


def spec_of(array: "Array") -> Spec:
    """What the file's header says of an array."""
    return _NAMES[array.dtype.str], array.shape


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: "Iterable[tuple[str, Array]]",
    metadata: Mapping[str, str],
    *,
    force: bool = False,
) -> None:
    """Write `tensors`, which come in any order and one at a time, each as `specs` announced it.

    Raises `InputError` for an existing file without `force`, and `ResourceError` where the disk
    does not take it.
    """
    import numpy as np

    refuse_existing(path, force=force)
    header, places = _layout(specs, metadata)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with writing(path):
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(header)
                for name, array in tensors:
                    if spec_of(array) != specs[name]:
                        raise ValueError(f"{name} is {spec_of(array)}, not {specs[name]}")
                    file.seek(len(header) + places.pop(name))
                    file.write(np.ascontiguousarray(array).data)
            if places:
                raise ValueError(f"{next(iter(places))} was not given")
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise `InputError` unless a file may be written to `path`."""
    refuse_special(path)
    if path.exists() and not force:
        raise InputError(f"{path} exists already.", "Choose another name, or pass --force.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into `ResourceError`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written ({error.strerror or error}).",
            "Free some space, check its permissions, or write elsewhere.",
        ) from error


@contextlib.contextmanager
def permitted(folder: Path) -> Iterator[None]:
    """Turn into `ResourceError` that nothing may be written in a folder; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ResourceError(
            f"{folder} cannot be written ({error.strerror}).",
            "Check its permissions, its owner, and whether its disk is mounted read-only.",
        ) from error


def _layout(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header with its length, and each tensor's offset behind it; wide types come first."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (-SIZES[specs[name][0]], name)):
        dtype, shape = specs[name]
        places[name], end = end, end + SIZES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [places[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
