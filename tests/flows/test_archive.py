"""The archive: what is found, what is read again, and what is left when it is killed."""

import errno
import functools
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image as Pillow

from medmoe_edge._types import Floats
from medmoe_edge.archive.indexing import ArchiveWriter, Indexing, index_folder
from medmoe_edge.archive.store import DATABASE, VECTORS, Archive, Entry, Vector, is_image, retrieve
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.features import Reading
from medmoe_edge.errors import ImageError, InputError, ResourceError
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.runtimes.contrastive import ImageFeatures

ROOT = Path(__file__).parents[2]
CONFIG = MODALITY_PRESETS["modality-tiny"]
MODEL = {"name": "tiny", "sha256": "a" * 64}
SIZE = 8


class FakeEngine:
    """Of a picture it sees only how bright it is, of a text only how long."""

    name, sha256 = MODEL["name"], MODEL["sha256"]
    config = CONFIG

    def __init__(self) -> None:
        self.embedded = 0

    def embed_images(self, pixels: Floats) -> ImageFeatures:
        self.embedded += 1
        pooled = direction(float(pixels.mean()))[None]
        logits = np.eye(6, dtype=np.float32)[[int(pixels.mean() > 0)]]
        return ImageFeatures(pooled[:, None, None], pooled, logits)

    def embed_text(self, text: str) -> Vector:
        return direction(float(len(text)))

    def reading(self, features: ImageFeatures) -> Reading:
        return Reading({}, {}, "xray", {"xray": 1.0}, 0.0, unfamiliar=False)


def direction(value: float) -> Vector:
    angle = np.zeros(CONFIG.size, np.float32)
    angle[:2] = np.cos(value), np.sin(value)
    return angle


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, one below another folder, beside files that are none."""
    folder = tmp_path / "scans"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for number in range(10):
        place = folder / "more" if number == 9 else folder
        Pillow.new("L", (8, 8), 20 * number).save(place / f"{number}.png")
    (folder / "notes.txt").write_text("Doe^John")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Pillow.new("L", (8, 8)).save(folder / ".hidden" / "no.png")
    return folder


def update(folder: Path, engine: FakeEngine, **options: Any) -> Indexing:
    return index_folder(folder, folder / "index", cast(ModalityEngine, engine), **options)


def counts(made: Indexing) -> tuple[int, int, int, int, int]:
    return made.entries, made.embedded, made.reused, made.unchanged, made.removed


def unit_vectors(count: int, size: int = SIZE) -> Vector:
    values = np.random.default_rng(0).standard_normal((count, size))
    found: Vector = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return found


def entry(path: str, sha256: str = "") -> Entry:
    return Entry(path, 10, 20, sha256 or path, "ct", 1, 3)


def writer(folder: Path, **options: Any) -> ArchiveWriter:
    return ArchiveWriter(folder, MODEL, SIZE, Path("/scans"), **options)


def filled(folder: Path, vectors: Vector) -> Path:
    with writer(folder) as archive:
        for number, vector in enumerate(vectors):
            archive.put(entry(f"{number}"), vector)
        archive.commit()
    return folder


# --- The index ---------------------------------------------------------------------------------


def test_search_finds_what_comparing_all_finds(tmp_path: Path) -> None:
    vectors, query = unit_vectors(500), unit_vectors(1)[0]
    filled(tmp_path / "index", vectors)
    with Archive(tmp_path / "index", MODEL["sha256"]) as archive:
        assert (len(archive), archive.root) == (500, "/scans")
        hits = archive.search(query, 20)
    expected = vectors @ query
    best = np.argsort(-expected, kind="stable")[:20]
    assert [hit.similarity for hit in hits] == pytest.approx(expected[best], abs=2e-3)
    found = {hit.path for hit in hits}
    assert len(found & {str(number) for number in best}) >= 19  # halves may swap the last
    assert hits[0].path == "0"
    assert (hits[0].modality, hits[0].frame, hits[0].frames) == ("ct", 1, 3)


def test_what_is_removed_or_replaced_is_not_found(tmp_path: Path) -> None:
    vectors = unit_vectors(30)
    filled(tmp_path / "index", vectors)
    with writer(tmp_path / "index") as archive:
        archive.remove("3")
        archive.remove("no such")
        archive.put(entry("4"), vectors[20])
        archive.put(entry("new"), vectors[3])
        archive.commit()
    with Archive(tmp_path / "index", MODEL["sha256"]) as archive:
        assert len(archive) == 30
        assert archive.search(vectors[3], 1)[0].path == "new"
        assert {hit.path for hit in archive.search(vectors[20], 2)} == {"4", "20"}
        everything = [hit.path for hit in archive.search(vectors[0], 100)]
    assert sorted(everything) == sorted([*(str(n) for n in range(30) if n != 3), "new"])


def test_what_is_not_committed_does_not_appear(tmp_path: Path) -> None:
    vectors = unit_vectors(3)
    filled(tmp_path / "index", vectors)
    with writer(tmp_path / "index") as archive:
        archive.put(entry("new"), vectors[0])
        with Archive(tmp_path / "index", MODEL["sha256"]) as reader:  # while it is written
            assert len(reader.search(vectors[0], 9)) == 3
            archive.commit()
            assert len(reader.search(vectors[0], 9)) == 4
        archive.remove("1")
    with Archive(tmp_path / "index", MODEL["sha256"]) as reader:
        assert len(reader) == 4
    assert len(list((tmp_path / "index").glob(VECTORS))) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from medmoe_edge.archive import indexing as archive_writing
from medmoe_edge.archive.store import Entry

folder, when = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
model = {"name": "tiny", "sha256": "a" * 64}
with archive_writing.ArchiveWriter(folder, model, 8, Path("/scans")) as archive:
    for number in range(50):
        archive.put(Entry(f"new-{number}", 1, 1, "", "ct", 0, 1), np.eye(8, dtype=np.float32)[1])
    if when == "before the file":
        archive._save = die
    elif when == "before the commit":
        archive_writing.file_sha256 = die
    elif when == "after the commit":
        archive._tidy = die
    archive.commit()
"""


@pytest.mark.parametrize(
    ("when", "entries"),
    [("before the file", 3), ("before the commit", 3), ("after the commit", 53)],
)
def test_killed_at_any_moment_the_index_is_the_old_or_the_new(
    tmp_path: Path, when: str, entries: int
) -> None:
    index = filled(tmp_path / "index", unit_vectors(3))
    command = [sys.executable, "-c", KILLED, str(index), when]
    killed = subprocess.run(command, cwd=ROOT, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with Archive(index, MODEL["sha256"]) as archive:
        assert len(archive.search(unit_vectors(1)[0], 100)) == entries
    with writer(index) as archive_writer:
        assert len(archive_writer) == entries
    assert len(list(index.glob(VECTORS))) == 1  # what the killed one left is gone


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = functools.partial(sqlite3.connect, timeout=0.01)
    monkeypatch.setattr(sqlite3, "connect", impatient)
    with writer(tmp_path / "index"), pytest.raises(InputError, match="another command"):
        writer(tmp_path / "index")


def test_an_index_of_another_model_or_folder_is_refused(tmp_path: Path) -> None:
    index = filled(tmp_path / "index", unit_vectors(3))
    with pytest.raises(InputError, match=r"another model \(tiny"):
        Archive(index, "b" * 64)
    other = {"name": "other", "sha256": "b" * 64}
    with pytest.raises(InputError, match="another model"):
        ArchiveWriter(index, other, SIZE, Path("/scans"))
    with pytest.raises(InputError, match="another folder"):
        ArchiveWriter(index, MODEL, SIZE, Path("/else"))
    with ArchiveWriter(index, other, SIZE, Path("/else"), force=True) as archive:
        archive.put(entry("only"), unit_vectors(1)[0])
        with Archive(index, MODEL["sha256"]) as reader:  # until the new one is there
            assert len(reader) == 3
        archive.commit()
    with Archive(index, "b" * 64) as reader:
        assert [hit.path for hit in reader.search(unit_vectors(1)[0], 5)] == ["only"]


def test_what_is_no_index_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(InputError, match="no index"):
            writer(tmp_path / name, force=True)
        with pytest.raises(InputError, match="There is no index"):
            Archive(tmp_path / name, MODEL["sha256"])
    assert (tmp_path / "folder" / "mine.txt").read_text() == "mine"


def damage_vectors(index: Path) -> None:
    (path,) = index.glob(VECTORS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_vectors(index: Path) -> None:
    (path,) = index.glob(VECTORS)
    path.write_bytes(path.read_bytes()[:100])


def lose_vectors(index: Path) -> None:
    (path,) = index.glob(VECTORS)
    path.unlink()


def overwrite_database(index: Path) -> None:
    (index / DATABASE).write_bytes(b"no database" * 1000)


def empty_database(index: Path) -> None:
    (index / DATABASE).write_bytes(b"")


def point_elsewhere(index: Path) -> None:
    with sqlite3.connect(index / DATABASE) as database:
        database.execute("UPDATE header SET vectors = '../' || vectors")
    database.close()


def later_format(index: Path) -> None:
    with sqlite3.connect(index / DATABASE) as database:
        database.execute("UPDATE header SET format = 2")
    database.close()


@pytest.mark.parametrize(
    "damage",
    [
        *(damage_vectors, cut_vectors, lose_vectors, overwrite_database, empty_database),
        *(point_elsewhere, later_format),
    ],
)
def test_a_damaged_index_is_a_persons_error(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    index = filled(tmp_path / "index", unit_vectors(50))
    damage(index)
    with pytest.raises(InputError, match=r"damaged|another version") as error:
        Archive(index, MODEL["sha256"])
    assert "--force" in error.value.remedy
    with writer(index, force=True) as anew:  # which then makes it anew
        anew.put(entry("new"), unit_vectors(1)[0])
        anew.commit()
    with Archive(index, MODEL["sha256"]) as archive:
        assert len(archive) == 1


def test_a_full_disk_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled(tmp_path / "index", unit_vectors(3))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with writer(index) as archive:
        archive.put(entry("new"), unit_vectors(1)[0])
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="cannot be written"):
            archive.commit()
    with Archive(index, MODEL["sha256"]) as reader:
        assert len(reader) == 3
    assert len(list(index.glob(VECTORS))) == 1


def test_a_first_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    index = tmp_path / "index"

    def put(archive: ArchiveWriter, count: int) -> None:
        for number in range(count):
            archive.put(entry(f"{number}"), unit_vectors(1)[0])

    full = pytest.raises(ResourceError, match=r"cannot be written \(No space left on device\)")
    with writer(index) as archive:
        archive._database.execute("PRAGMA max_page_count = 12")  # as on a full disk
        with full:
            put(archive, 1000)
    assert not index.exists()
    with writer(index) as archive:
        put(archive, 1)
        archive._database.execute("PRAGMA query_only = 1")  # once the vectors are written
        with pytest.raises(ResourceError, match="cannot be written"):
            archive.commit()
        assert list(index.glob(VECTORS))
    assert not index.exists()
    index.mkdir()  # by somebody else, who keeps it
    with writer(index) as archive:
        put(archive, 1)
    assert not list(index.iterdir())
    filled(index, unit_vectors(3))  # and another run begins anew
    with Archive(index, MODEL["sha256"]) as reader:
        assert len(reader) == 3


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.EMFILE, "cannot be used now: too many open files"),
        (errno.EROFS, r"cannot be written \(Read-only file system\)"),
        (errno.EACCES, r"cannot be written \(Permission denied\)"),
    ],
)
def test_what_sqlite_was_refused_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, what: str
) -> None:
    index = filled(tmp_path / "index", unit_vectors(3))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with writer(index) as archive:
        archive._database.execute("PRAGMA query_only = 1")  # SQLITE_READONLY
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        with pytest.raises(ResourceError, match=what):
            archive.put(entry("new"), unit_vectors(1)[0])
    with Archive(index, MODEL["sha256"]) as reader:
        assert len(reader) == 3


def test_a_folder_of_an_index_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"index cannot be written \(Not a directory\)"):
        writer(tmp_path / "file" / "index")


# --- A folder ----------------------------------------------------------------------------------


def test_only_what_is_new_or_changed_is_read(folder: Path, engine: FakeEngine) -> None:
    first = update(folder, engine)
    assert counts(first) == (10, 10, 0, 0, 0)
    assert (first.skipped, first.skipped_files) == (2, ("broken.png", "notes.txt"))
    assert counts(update(folder, engine)) == (10, 0, 0, 10, 0)
    assert engine.embedded == 10
    (folder / "0.png").rename(folder / "moved.png")
    (folder / "1.png").unlink()
    Pillow.new("L", (8, 8), 255).save(folder / "2.png")
    os.utime(folder / "3.png", ns=(1, 1))  # touched, but the same
    (folder / "4.png").write_bytes(b"no longer an image")
    made = update(folder, engine)
    assert counts(made) == (8, 1, 2, 5, 3)
    assert made.skipped_files == ("4.png", "broken.png", "notes.txt")
    assert engine.embedded == 11


@pytest.mark.parametrize("what", ["stat", "open", "scandir"])
def test_what_the_disk_does_not_give_now_is_not_taken_for_gone(
    what: str, folder: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(folder, engine)
    os.utime(folder / "3.png", ns=(1, 1))
    owner = os if what == "scandir" else Path
    read = getattr(owner, what)

    def troubled(path: Any, *arguments: Any, **options: Any) -> Any:
        if Path(path).name in ("3.png", "more"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, what, troubled)
        Pillow.new("L", (8, 8), 99).save(folder / "5.png")
        with pytest.raises(ResourceError, match="cannot be used now: input/output error"):
            update(folder, engine)
    with Archive(folder / "index", MODEL["sha256"]) as archive:
        assert len(archive) == 10
    others = 0 if what == "scandir" else 1
    assert engine.embedded == 10 + others, "what can be read is indexed all the same"


def test_names_that_are_no_text(folder: Path, engine: FakeEngine) -> None:
    name = os.fsdecode(b"\xff\xe9.png")
    (folder / "0.png").rename(folder / name)
    update(folder, engine)
    assert update(folder, engine).unchanged == 10
    with Archive(folder / "index", MODEL["sha256"]) as archive:
        assert name in {hit.path for hit in archive.search(direction(0), 10)}


def test_an_interrupted_run_keeps_its_parts(
    folder: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmoe_edge.archive.indexing.PART", 4)

    def interrupt(step: str, done: int, total: int) -> None:
        assert (step, total) == ("indexing", 12)
        if engine.embedded == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(folder, engine, progress=interrupt)
    assert counts(update(folder, engine)) == (10, 6, 0, 4, 0)


def test_a_folder_without_images(tmp_path: Path, engine: FakeEngine) -> None:
    assert counts(update(tmp_path, engine)) == (0, 0, 0, 0, 0)
    found = retrieve("heart", tmp_path / "index", cast(ModalityEngine, engine))
    assert (found.hits, found.entries) == ((), 0)
    with pytest.raises(InputError, match="no folder"):
        update(tmp_path / "none", engine)
    assert not (tmp_path / "none").exists()


def test_an_index_is_for_its_owner_alone(folder: Path, engine: FakeEngine) -> None:
    update(folder, engine)
    assert (folder / "index").stat().st_mode & 0o077 == 0


# --- Queries -----------------------------------------------------------------------------------


def test_queries_are_images_or_texts(folder: Path, engine: FakeEngine) -> None:
    update(folder, engine)
    image = folder / "5.png"
    found = retrieve(str(image), folder / "index", cast(ModalityEngine, engine), 3)
    assert (found.kind, found.hits[0].path, len(found.hits)) == ("image", "5.png", 3)
    assert found.hits[0].similarity == pytest.approx(1, abs=1e-3)
    assert found.reading is not None
    asked = retrieve("heart", folder / "index", cast(ModalityEngine, engine), 99)
    assert (asked.kind, asked.reading, len(asked.hits)) == ("text", None, 10)
    assert asked.to_json()["hits"][0].keys() == {
        *("path", "similarity", "modality", "frame", "frames")
    }
    with pytest.raises(InputError, match="0 images"):
        retrieve("heart", folder / "index", cast(ModalityEngine, engine), 0)


def test_a_name_of_no_file_is_not_searched_for_as_a_text(tmp_path: Path) -> None:
    for text in ("heart", "AP/PA view", "a\0b", "long " * 5000, "胸水"):
        assert not is_image(text)
    for name in ("none.png", "None.DCM", "none.nii.gz"):
        with pytest.raises(ImageError):
            is_image(name)
    (tmp_path / "scan").touch()
    assert is_image(str(tmp_path / "scan"))
