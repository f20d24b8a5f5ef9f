"""A large file is hashed once, and again as soon as anything about it has changed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from medmoe_edge.bundle import trust
from medmoe_edge.bundle.trust import remember_intact, settled, was_intact

SHA256 = "ab" * 32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No file is too new to be trusted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "SETTLED", 0)
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "decoder.data"
    path.write_bytes(bytes(10))
    return path


def test_a_file_is_known_once_it_was_found_intact(path: Path) -> None:
    assert not was_intact(path, SHA256)
    remember_intact(path, SHA256, settled(path))
    assert was_intact(path, SHA256)
    assert not was_intact(path, "cd" * 32)


def rewrite(path: Path) -> None:
    """Other bytes, with the old size and the old time of writing."""
    seen = path.stat()
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(10))
    other.replace(path)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"0")


@pytest.mark.parametrize("change", [rewrite, replace, lengthen])
def test_a_file_that_changed_is_not(path: Path, change: Callable[[Path], None]) -> None:
    remember_intact(path, SHA256, settled(path))
    before = path.stat().st_ctime_ns
    change(path)
    while path.stat().st_ctime_ns == before:  # the clock of some file systems is coarse
        change(path)
    assert not was_intact(path, SHA256)


def test_a_file_that_changes_while_it_is_hashed_is_not(path: Path) -> None:
    seen = settled(path)
    lengthen(path)  # after its bytes were read
    remember_intact(path, SHA256, seen)
    assert not was_intact(path, SHA256)


def test_a_file_of_the_same_name_elsewhere_is_not(path: Path, tmp_path: Path) -> None:
    remember_intact(path, SHA256, settled(path))
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / path.name
    copy.write_bytes(path.read_bytes())
    assert not was_intact(copy, SHA256)


def test_a_file_just_written_is_not_trusted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "SETTLED", 10**15)
    remember_intact(path, SHA256, settled(path))
    assert not was_intact(path, SHA256)


def test_a_damaged_record_is_none(path: Path, cache: Path) -> None:
    remember_intact(path, SHA256, settled(path))
    (record,) = cache.rglob("*.json")
    for content in (b"", b"[", b"{}", b"null", b"\xff"):
        record.write_bytes(content)
        assert not was_intact(path, SHA256)


def test_a_cache_that_cannot_be_written_is_done_without(path: Path, cache: Path) -> None:
    cache.write_bytes(b"a file, where a folder should be")
    remember_intact(path, SHA256, settled(path))
    assert not was_intact(path, SHA256)
