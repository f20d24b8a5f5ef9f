"""The work queue of the DICOM node, in SQLite: survives the end of the process at any moment.

An object is `waiting` until its answers are recorded, in one transaction with what is to be sent of
them, and then `answered`; or `failed`, where it cannot be answered. Its key is the SHA-256 of its
SOP Instance UID, so that what is sent again is known. Sent again with other content it is another
version, under a key of its own; `origin` tells, in hashes, what versions and patients there are.
Times are not kept: a clock may jump.

The folder of the DICOM node, which holds patients' images and so is for its owner alone.

    queue.sqlite     what is to be done, and what was
    images/KEY.dcm   received objects, until they are answered
    documents/KEY/   the results of an object, a file for each question and kind of document
    audit.jsonl      unless the configuration names another file
    lock             held by the node that works here

KEY is the SHA-256 of the SOP Instance UID: no name of a file tells a UID or a patient.

A thread that does one job after another; what fails is tried again later, and later still.

When is kept in memory, by a clock that never jumps; after a restart everything is tried at once.
"""

import hashlib
import json
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medmoe_edge.atomic import atomic_file
from medmoe_edge.bedside.listen.header import Origin
from medmoe_edge.errors import MedMoEError, ResourceError
from medmoe_edge.image.pixels import Image, shown_name
from medmoe_edge.image.worker import Bounds, read_apart

BOUNDS = Bounds(seconds=30.0)  # of one picture: nobody waits at a screen


class Folder:
    """The paths, and writing that lasts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.documents = root / "images", root / "documents"
        self.queue, self.lock = root / "queue.sqlite", root / "lock"
        for folder in (root, self.images, self.documents):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def image(self, key: str) -> Path:
        """Where a received object lies."""
        return self.images / f"{key}.dcm"

    def picture(self, key: str) -> Image:
        """The picture of a received object, decoded in a process of its own, which is bounded.

        Raises what `load_image` does.
        """
        path = self.image(key)
        try:
            return read_apart(path, bounds=BOUNDS)
        except MedMoEError as error:
            error.what = error.what.replace(shown_name(path), "The object")
            error.args = (f"{error.what} {error.remedy}",)
            raise

    def free(self) -> int:
        """Bytes free on the disk."""
        return shutil.disk_usage(self.root).free

    def keep(self, path: Path, data: bytes) -> None:
        """Write a file that, on return, is on the disk whole, and so is its name."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic_file(path) as file:
            file.write(data)
        for folder in (path.parent, path.parent.parent):
            sync_folder(folder)

    def sweep(self, needed: Iterable[str]) -> None:
        """Remove images that nobody was told were kept, or that are answered."""
        names = {f"{key}.dcm" for key in needed}
        for path in self.images.iterdir():
            if path.name not in names:
                path.unlink()
        for part in self.documents.glob("*/.*.part"):
            part.unlink()


def key_of(uid: str) -> str:
    """The key of an object, from its SOP Instance UID."""
    return hashlib.sha256(uid.encode("ascii")).hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system knows how to."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


log = logging.getLogger(__name__)
IDLE = 1.0  # seconds between looks, when nobody wakes it
FIRST_DELAY, LONGEST_DELAY = 1.0, 300.0  # seconds, doubled with each failure


class Worker(threading.Thread):
    """Calls `do` for the keys that `pending(limit)` names, in order.

    `do` ends well, or raises: then the key is left for later. It must not be in the log what the
    key stands for, so the log tells the kind of an error alone.
    """

    def __init__(
        self,
        name: str,
        pending: Callable[[int], Sequence[str]],
        do: Callable[[str], None],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._pending, self._do = pending, do
        self._stopping, self._awake = threading.Event(), threading.Event()
        self._delayed: dict[str, tuple[float, float]] = {}  # key -> not before, next delay

    def wake(self) -> None:
        """There is something new."""
        self._awake.set()

    def stop(self) -> None:
        """End after the job at hand; `join` waits for that."""
        self._stopping.set()
        self._awake.set()

    def run(self) -> None:
        """The thread's life."""
        while not self._stopping.is_set():
            self._awake.clear()
            try:
                key = self._next()
                if key is not None:
                    self._attempt(key)
                    continue
            except Exception as error:
                log.error("%s cannot work (%s): waiting.", self.name, type(error).__name__)
            self._awake.wait(IDLE)

    def _next(self) -> str | None:
        """The first key that is due; one more than the delayed are asked for, so it is seen."""
        now = time.monotonic()
        keys = self._pending(len(self._delayed) + 1)
        return next((key for key in keys if self._delayed.get(key, (0.0,))[0] <= now), None)

    def _attempt(self, key: str) -> None:
        try:
            self._do(key)
            self._delayed.pop(key, None)
        except Exception as error:
            _, delay = self._delayed.get(key, (0.0, FIRST_DELAY))
            self._delayed[key] = time.monotonic() + delay, min(2 * delay, LONGEST_DELAY)
            kind = type(error).__name__
            log.warning("%s: %s failed (%s), again in %.0f s.", self.name, key[:16], kind, delay)


SCHEMA = """
CREATE TABLE IF NOT EXISTS object (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    sha256 TEXT NOT NULL,
    peer TEXT NOT NULL,
    questions TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'answered', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS object_state ON object (state, attempts, number);
CREATE TABLE IF NOT EXISTS answer (
    key TEXT NOT NULL REFERENCES object (key),
    question TEXT NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (key, question)
) STRICT;
CREATE TABLE IF NOT EXISTS delivery (
    number INTEGER PRIMARY KEY,
    document TEXT NOT NULL,
    destination TEXT NOT NULL,
    sent INTEGER NOT NULL DEFAULT 0,
    UNIQUE (document, destination)
) STRICT;
CREATE TABLE IF NOT EXISTS origin (
    key TEXT PRIMARY KEY,
    uid TEXT NOT NULL,
    content TEXT NOT NULL,
    patient TEXT NOT NULL,
    study TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS origin_uid ON origin (uid);
CREATE INDEX IF NOT EXISTS origin_study ON origin (study);
CREATE INDEX IF NOT EXISTS delivery_open ON delivery (destination, sent, number);
"""
# Of an object that needs nothing more when it comes again.
SETTLED = "object.state != 'failed' AND object.questions != '[]'"


class Job(NamedTuple):
    """An object to be answered; `sha256` is of its file, `attempts` counts those before."""

    key: str
    sha256: str
    peer: str
    questions: tuple[str, ...]
    attempts: int


class Queue:
    """The queue in the file `path`; its methods may be called from any thread.

    What a method recorded is on the disk when it returns. Raises `ResourceError` where SQLite
    cannot do it: full disk, damaged file.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(path, timeout=10, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            with self._database:
                self._database.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise _explained(error) from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def add(
        self,
        key: str,
        sha256: str,
        peer: str,
        questions: Sequence[str],
        origin: Origin | None = None,
    ) -> None:
        """Add an object; one without questions needs no answer.

        Known ones are left alone, but for those that were given up, or of which nothing was asked:
        they wait again.
        """
        values = (key, sha256, peer, json.dumps(questions), "waiting" if questions else "answered")
        with self._lock, _explaining(), self._database as database:
            database.execute(
                "INSERT INTO object (key, sha256, peer, questions, state) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET sha256 = excluded.sha256, peer = excluded.peer, "
                "questions = excluded.questions, state = excluded.state, attempts = 0 "
                f"WHERE NOT ({SETTLED})",
                values,
            )
            if origin is not None:
                statement = "INSERT OR REPLACE INTO origin VALUES (?, ?, ?, ?, ?)"
                database.execute(statement, (key, *origin))

    def settles(self, key: str) -> bool:
        """Whether an object is answered or will be."""
        return bool(self._read(f"SELECT 1 FROM object WHERE key = ? AND {SETTLED}", key))

    def state(self, key: str) -> str | None:
        """The state of an object; None of one that was never added."""
        rows = self._read("SELECT state FROM object WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def origin(self, key: str) -> Origin | None:
        """What is known of where an object comes from."""
        rows = self._read("SELECT uid, content, patient, study FROM origin WHERE key = ?", key)
        return Origin(*rows[0]) if rows else None

    def versions(self, uid: str) -> list[tuple[str, Origin]]:
        """The keys of all objects of a SOP Instance UID, in the order in which they came."""
        rows = self._read(
            "SELECT key, uid, content, patient, study FROM origin JOIN object USING (key) "
            "WHERE uid = ? ORDER BY number",
            uid,
        )
        return [(key, Origin(*values)) for key, *values in rows]

    def shares_study(self, origin: Origin) -> bool:
        """Whether the study of an object holds another object of another patient."""
        statement = "SELECT 1 FROM origin WHERE study = ? AND patient != ? AND uid != ? LIMIT 1"
        return bool(self._read(statement, origin.study, origin.patient, origin.uid))

    def waiting(self, limit: int) -> list[str]:
        """The first objects to be answered; those last that were attempted most."""
        rows = self._read(
            "SELECT key FROM object WHERE state = 'waiting' ORDER BY attempts, number LIMIT ?",
            limit,
        )
        return [key for (key,) in rows]

    def job(self, key: str) -> Job:
        """What is known of an object."""
        statement = "SELECT sha256, peer, questions, attempts FROM object WHERE key = ?"
        ((sha256, peer, questions, attempts),) = self._read(statement, key)
        return Job(key, sha256, peer, tuple(json.loads(questions)), attempts)

    def count_attempt(self, key: str) -> None:
        """Before each attempt, so that one that ends the process is counted too."""
        self._write("UPDATE object SET attempts = attempts + 1 WHERE key = ?", [(key,)])

    def forgive_attempt(self, key: str) -> None:
        """Take back an attempt that failed for no fault of the object's."""
        self._write("UPDATE object SET attempts = attempts - 1 WHERE key = ?", [(key,)])

    def fail(self, key: str) -> None:
        """Give an object up."""
        self._write("UPDATE object SET state = 'failed' WHERE key = ?", [(key,)])

    def answered(
        self, key: str, answers: dict[str, str], deliveries: Iterable[tuple[str, str]]
    ) -> None:
        """Record the answers by question, and which documents go where, all or nothing."""
        rows = [(key, question, text) for question, text in answers.items()]
        with self._lock, _explaining(), self._database as database:
            database.executemany("INSERT INTO answer VALUES (?, ?, ?)", rows)
            database.executemany(
                "INSERT INTO delivery (document, destination) VALUES (?, ?)", deliveries
            )
            database.execute("UPDATE object SET state = 'answered' WHERE key = ?", (key,))

    def unsent(self, destination: str, limit: int) -> list[str]:
        """The first documents that are to be sent to a destination."""
        rows = self._read(
            "SELECT document FROM delivery WHERE destination = ? AND sent = 0 "
            "ORDER BY number LIMIT ?",
            destination,
            limit,
        )
        return [document for (document,) in rows]

    def sent(self, document: str, destination: str) -> None:
        """Record that a destination has a document."""
        self._write(
            "UPDATE delivery SET sent = 1 WHERE document = ? AND destination = ?",
            [(document, destination)],
        )

    def keys(self, state: str) -> set[str]:
        """The objects in a state."""
        return {key for (key,) in self._read("SELECT key FROM object WHERE state = ?", state)}

    def counts(self) -> dict[str, int]:
        """How many objects are waiting, answered and failed, and documents unsent."""
        found = dict(self._read("SELECT state, count(*) FROM object GROUP BY state"))
        ((unsent,),) = self._read("SELECT count(*) FROM delivery WHERE sent = 0")
        states = {state: found.get(state, 0) for state in ("waiting", "answered", "failed")}
        return states | {"unsent": unsent}

    def _read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _explaining():
            return self._database.execute(statement, values).fetchall()

    def _write(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with self._lock, _explaining(), self._database as database:
            database.executemany(statement, rows)


class _explaining:
    """Around SQLite: its errors as ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            raise _explained(error) from error


def _explained(error: sqlite3.Error) -> ResourceError:
    return ResourceError(
        f"The node's queue cannot be used ({error.sqlite_errorname}).",
        "Free some space, check the folder's permissions, or restore the folder.",
    )
