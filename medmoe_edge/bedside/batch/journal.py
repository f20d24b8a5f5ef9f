"""What is done of a batch, in SQLite beside its output, so that an interrupted one can go on.

An image's results are one row, written in one transaction: there or not, and never twice. After a
kill nothing is lost; after a power cut at most the last images, which are then asked about again.
It holds what the output holds, and goes when that is whole.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medmoe_edge.errors import InputError, ResourceError

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
