"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from medmoe_edge.errors import InputError, ResourceError


@contextlib.contextmanager
def atomic_folder(target: Path, *, force: bool, marker: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place once the block has ended well.

    An existing `target` is refused without `force`; with it, only a folder that holds
    `marker` (one of our own kind) is replaced. Raises `InputError`, and `ResourceError` where the
    disk does not take it.
    """
    target = target.absolute()
    if target.exists() or target.is_symlink():
        if not force:
            raise InputError(f"{target} exists already.", "Choose another name, or pass --force.")
        if marker and not (target / marker).exists():
            raise InputError(
                f"{target} holds no {marker}, so it will not be replaced.", "Choose another name."
            )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, target)
    except OSError as error:
        raise ResourceError(
            f"{target} cannot be written ({error.strerror or error}).",
            "Free some space, check its permissions, or write elsewhere.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_suffix(".old")
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old)
