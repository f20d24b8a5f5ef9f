"""What a batch is about, images and questions, and what is done of it.

A folder gives all its files, also those in folders within, in the order of their paths; hidden ones
are left out. A CSV file gives its rows in their order: the column `image` holds paths, relative to
the CSV's folder, and the column `question`, where there is one, what is asked of that row's image.
Nothing is opened here: a file that is no image is found out when it is asked about.

What is done lies in SQLite beside the output, so that an interrupted batch can go on. An image's
results are one row, written in one transaction: there or not, and never twice. After a kill nothing
is lost; after a power cut at most the last images, which are then asked about again. It holds what
the output holds, and goes when that is whole.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from medmoe_edge.data.datasets import read_text
from medmoe_edge.errors import DataError, InputError, ResourceError
from medmoe_edge.prompt import check_question

COLUMNS = "Let its first line be: image, or image,question"


class Item(NamedTuple):
    """An image, as it is named in the results and as it is opened, and what is asked of it."""

    image: str
    path: str
    questions: tuple[str, ...]


def read_items(
    inputs: Path, questions: Path | None, *, besides: Collection[Path] = ()
) -> list[Item]:
    """The images of a folder (but the files `besides`) or of a CSV file, with their questions.

    Where a CSV file has questions of its own there must be no `questions`, else there must.
    Raises `DataError` that names file and line, and `InputError` for what cannot be put together.
    """
    if inputs.is_dir():
        asked = _shared(questions, "images of a folder")
        left_out = {path.resolve() for path in (*besides, *([questions] if questions else []))}
        items = [Item(name, path, asked) for name, path in _files(inputs, left_out)]
    else:
        items = _from_csv(inputs, questions)
    if not items:
        raise InputError(f"{inputs} names no images.", "Give a folder of images, or a CSV file.")
    return items


def read_questions(file: Path) -> tuple[str, ...]:
    """The questions in a text file, one on a line; empty lines are left out.

    Raises `DataError` that names the line of an unusable one.
    """
    lines = enumerate(read_text(file).split("\n"), start=1)
    found = tuple(_checked(line, file, number) for number, line in lines if line.strip())
    if not found:
        raise DataError(f"{file} holds no questions.", "Write one on each line.")
    return found


def fingerprint(items: Sequence[Item], *more: object) -> str:
    """SHA-256 of a job, by which an interrupted one is known again."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for item in items:
        digest.update(json.dumps([item.image, item.questions]).encode())
    return digest.hexdigest()


def _shared(questions: Path | None, of_what: str) -> tuple[str, ...]:
    if questions is None:
        raise InputError(
            f"There are no questions for the {of_what}.",
            "Write them into a file, one on each line: --questions FILE",
        )
    return read_questions(questions)


def _files(folder: Path, left_out: Collection[Path]) -> Iterator[tuple[str, str]]:
    """Of each file its path below the folder, with `/`, and its whole path."""

    def refuse(error: OSError) -> None:  # its images would be missing, and nobody would know
        raise InputError(
            f"{folder} or a folder within cannot be read: {(error.strerror or 'unknown').lower()}.",
            "Check its permissions, or name the images in a CSV file.",
        ) from error

    root = folder.resolve()
    found = []
    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path not in left_out]
    for path in sorted(found):
        yield path.relative_to(root).as_posix(), str(path)


def _from_csv(file: Path, questions: Path | None) -> list[Item]:
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        columns = rows.fieldnames or ()
        if "image" not in columns:
            raise DataError(f"{file} has no column named image.", COLUMNS)
        has_questions = "question" in columns
        if has_questions and questions is not None:
            raise InputError(
                f"{file} has questions of its own, and --questions gives others.",
                "Leave --questions out, or the column.",
            )
        asked = () if has_questions else _shared(questions, f"images of {file}")
        return [_item(row, file, rows.line_num, asked) for row in rows]
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: this is no CSV.", COLUMNS) from error


def _item(row: dict[str, str | None], file: Path, line: int, asked: tuple[str, ...]) -> Item:
    image = row["image"]
    if not image:
        raise DataError(f"{file}, line {line}: there is no image.", "Fill it in.")
    questions = asked or (_checked(row["question"] or "", file, line),)
    return Item(image, str(file.parent.resolve() / image), questions)


def _checked(question: str, file: Path, line: int) -> str:
    try:
        return check_question(question)
    except InputError as error:
        raise DataError(f"{file}, line {line}: {error.what}", error.remedy) from error


Row = dict[str, Any]
BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR}

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS job (fingerprint TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS done (number INTEGER PRIMARY KEY, rows TEXT NOT NULL) STRICT",
)


def journal_path(output: Path) -> Path:
    """Where the journal of an output lies: hidden, so that no folder of images shows it."""
    return output.with_name(f".{output.name}.journal")


class Journal:
    """The journal of one job, for this process alone while it is open; a context manager.

    Raises `InputError` for one of another job (unless `force`, which begins anew), for one that
    another command holds and for a damaged one; `ResourceError` where the disk does not take it.
    """

    def __init__(self, output: Path, fingerprint: str, *, force: bool = False) -> None:
        self.path, self._output = journal_path(output), output
        try:
            self._open(fingerprint, force)
        except _Damaged:
            if not force:
                raise
            self._delete()
            self._open(fingerprint, force)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self._database.close()

    def done(self) -> set[int]:
        """The numbers of the images whose results are kept."""
        with self._explaining():
            return {number for (number,) in self._database.execute("SELECT number FROM done")}

    def keep(self, number: int, rows: list[Row]) -> None:
        """Keep the results of an image; what comes a second time is left out."""
        with self._explaining():
            self._database.execute(
                "INSERT OR IGNORE INTO done VALUES (?, ?)", (number, json.dumps(rows))
            )

    def results(self) -> Iterator[tuple[int, list[Row]]]:
        """The results of all images, in their order."""
        with self._explaining():
            for number, rows in self._database.execute("SELECT * FROM done ORDER BY number"):
                yield number, json.loads(rows)

    def remove(self) -> None:
        """The output is whole: close the journal and delete it."""
        self._database.close()
        self._delete()

    def _open(self, fingerprint: str, force: bool) -> None:
        with contextlib.ExitStack() as stack, self._explaining():
            self._database = sqlite3.connect(self.path, timeout=1, isolation_level=None)
            stack.callback(self._database.close)
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                self._database.execute(statement)
            self._begin(fingerprint, force)
            self._database.execute("COMMIT")
            stack.pop_all()

    def _begin(self, fingerprint: str, force: bool) -> None:
        found = self._database.execute("SELECT fingerprint FROM job").fetchone()
        if found == (fingerprint,):
            return
        if found is not None and not force:
            raise InputError(
                f"An unfinished run to {self._output} had other images, questions or options, "
                "or another model.",
                "Give it the same again to finish it, or begin anew with --force.",
            )
        self._database.execute("DELETE FROM done")
        self._database.execute("DELETE FROM job")
        self._database.execute("INSERT INTO job VALUES (?)", (fingerprint,))

    def _delete(self) -> None:
        for ending in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Around SQLite: its errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the kind, without its details
            if code in BUSY:
                raise InputError(
                    f"Another command is at work on {self._output}.", "Let it end first."
                ) from error
            if code in DAMAGED:
                raise _Damaged(
                    f"What was kept of an unfinished run to {self._output} is damaged.",
                    "Begin anew with --force.",
                ) from error
            raise ResourceError(
                f"What is done cannot be kept beside {self._output} ({type(error).__name__}).",
                "Free some space, check the folder's permissions, or write elsewhere.",
            ) from error


class _Damaged(InputError):
    """A journal that contradicts itself."""
