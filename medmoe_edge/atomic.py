"""A folder or a file that appears whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from medmoe_edge.errors import InputError, ResourceError


@contextlib.contextmanager
def atomic_folder(target: Path, *, force: bool, marker: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place once the block has ended well.

    What may not be replaced is refused as `check_target` does; behind a link, the folder that it
    names is replaced. Raises `ResourceError` where the disk does not take it.
    """
    target = target.resolve()
    check_target(target, force=force, marker=marker)
    exists = target.exists()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if exists:
            _replace(temporary, target)
        else:
            temporary.rename(target)  # fails if another has come into being meanwhile
    except OSError as error:
        raise ResourceError(
            f"{target} cannot be written ({error.strerror or error}).",
            "Free some space, check its permissions, or write elsewhere.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `target` once the block has ended well."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def check_target(target: Path, *, force: bool, marker: str) -> None:
    """Raise `InputError` for an existing `target`, unless `force` is given and it is one of ours.

    Of ours is a folder that holds the file `marker`.
    """
    if target.exists() and not force:
        raise InputError(f"{target} exists already.", "Choose another name, or pass --force.")
    if target.exists() and not (target / marker).is_file():
        raise InputError(
            f"{target} holds no {marker}, so it will not be replaced.", "Choose another name."
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
