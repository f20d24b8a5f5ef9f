"""A folder appears whole or not at all, and nothing precious is replaced."""

import errno
import os
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest

from medmoe_edge.atomic import (
    atomic_file,
    atomic_folder,
    check_apart,
    sync_folder,
    write_tensors,
)
from medmoe_edge.errors import InputError, ResourceError
from medmoe_edge.pipeline import check_output

MARKER = "marker.json"


def write(target: Path, text: str = "new", *, force: bool = False) -> None:
    with atomic_folder(target, force=force, marker=MARKER) as folder:
        assert not target.exists() or force
        assert folder.parent == target.resolve().parent  # so that it can be renamed
        (folder / MARKER).write_text(text)


def test_it_appears_when_all_is_written(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / MARKER).read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert stat.S_IMODE((tmp_path / "deep" / "out").stat().st_mode) & 0o500 == 0o500


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [True, False])
def test_an_exception_leaves_what_was(
    tmp_path: Path, error: type[BaseException], old: bool
) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "out", force=True, marker=MARKER) as folder:
            (folder / MARKER).write_text("half")
            raise error

    if old:
        write(tmp_path / "out", "old")
    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * old
    assert not old or (tmp_path / "out" / MARKER).read_text() == "old"


@pytest.mark.parametrize("kind", ["own", "empty", "file"])
def test_what_exists_is_refused(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "own":
        write(out, "old")
    elif kind == "empty":
        out.mkdir()
    else:
        out.write_text("thesis")
    with pytest.raises(InputError, match="exists already") as caught:
        write(out)
    assert "--force" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_only_its_own_kind(tmp_path: Path) -> None:
    own, other, file = (tmp_path / name for name in ("own", "other", "file"))
    write(own, "old")
    (own / "more").write_text("old")
    write(own, force=True)
    assert [path.name for path in own.iterdir()] == [MARKER]
    assert (own / MARKER).read_text() == "new"
    other.mkdir()
    (other / "thesis.txt").write_text("all of it")
    file.write_text("thesis")
    for precious in (other, file):
        with pytest.raises(InputError, match=r"holds no marker\.json"):
            write(precious, force=True)
    assert (other / "thesis.txt").read_text() == "all of it"
    assert file.read_text() == "thesis"
    assert {path.name for path in tmp_path.iterdir()} == {"own", "other", "file"}


def test_behind_a_link_the_folder_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    link = tmp_path / "link"
    link.symlink_to("real")
    with pytest.raises(InputError, match="exists"):
        write(link)
    write(link, force=True)
    assert link.is_symlink()
    assert (tmp_path / "real" / MARKER).read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_two_at_once_have_a_folder_each(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", force=False, marker=MARKER) as left:
        write(tmp_path / "out")
        assert left.exists()
        shutil.rmtree(tmp_path / "out")


def test_without_force_the_first_to_finish_stays(tmp_path: Path) -> None:
    def second() -> None:
        with atomic_folder(tmp_path / "out", force=False, marker=MARKER) as folder:
            (folder / MARKER).write_text("second")
            write(tmp_path / "out", "first")

    with pytest.raises(InputError, match="exists already"):
        second()
    assert (tmp_path / "out" / MARKER).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_force_what_came_meanwhile_is_replaced(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", force=True, marker=MARKER) as folder:
        (folder / MARKER).write_text("second")
        write(tmp_path / "out", "first")
    assert (tmp_path / "out" / MARKER).read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_brings_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match="No space left"):
        write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("output", "refused", "refused_around"),
    [
        ("in", True, True),
        ("in/out", True, False),
        (".", True, True),
        ("link", True, True),
        ("out", False, False),
        ("in-too", False, False),
    ],
)
def test_an_output_is_apart_from_its_inputs(
    tmp_path: Path, output: str, refused: bool, refused_around: bool
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    check_apart(tmp_path / output, None, around=(None, tmp_path.parent / "elsewhere"))
    with pytest.raises(InputError, match="own input") if refused else nullcontext():
        check_apart(tmp_path / output, source)
    with pytest.raises(InputError, match="own input") if refused_around else nullcontext():
        check_apart(tmp_path / output, around=[str(source)])


# --- files ------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes")
def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for special in pipe, Path("/dev/null"), Path("/dev/stdout"):
        with pytest.raises(InputError, match="stands for a device or a pipe"):
            check_output(special, True)
        with pytest.raises(InputError, match="stands for"):
            write_tensors(special, {}, (), {}, force=True)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_file_system_without_fsync_keeps_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"whole")
    sync_folder(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_the_first_error_of_a_file_is_the_one_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that was made read-only meanwhile lets the part not be removed either."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with (
        pytest.raises(OSError, match="No space") as caught,
        atomic_file(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")
