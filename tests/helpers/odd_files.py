"""Files of a model that cannot be read, or not to their end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def forbid_opening(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let nobody open files of this name: root, who may run the tests, may read everything."""
    real = Path.open

    def opened(path: Path, *more: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(Path, "open", opened)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


ENDLESS: tuple[Callable[[Path], None], ...] = (make_pipe, make_endless)
