"""What a person does with the node's queue: look at it, have something tried, sent or fetched.

It works beside a running node, which finds what is asked of it within a second. So does a backup:
one file with the queue, the documents, the images that are still needed and the audit log, as they
were at one moment. What is old is removed by the node itself (`Tidying`).
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmoe_edge.atomic import atomic_file, file_sha256, link
from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.listen.config import Configuration, without_secrets
from medmoe_edge.bedside.listen.queue import STAGING, Folder, Queue
from medmoe_edge.bedside.listen.schema import UNSENT, explaining
from medmoe_edge.errors import InputError, MedMoEError, ResourceError

log = logging.getLogger(__name__)
SHORTEST = 4  # letters of a key that are enough
QUEUE, AUDIT = "queue.sqlite", "audit.jsonl"  # in a backup
UNKNOWN = "unknown"  # a folder of images
STATES = ("waiting", "answered", "failed", "aside")  # of series
NO_LIMIT = -1  # to SQLite
PASSES = 2  # without a lock: the second links what came during the first, which may take minutes
# Of deliveries: what was refused and is wanted still. What another result has taken the place of is
# not, but what withdraws a third one is: nothing else does.
WITHDRAWS = "(document LIKE '%/withdrawn.%' OR document LIKE '%.withdrawal.dcm')"
REFUSED = (
    f"refused != '' AND ({WITHDRAWS} OR substr(document, 1, 64) NOT IN "
    "(SELECT key FROM result WHERE replaced != ''))"
)
# The results of a series that stand, and those that they correct. One that was withdrawn from
# another series is not sent again: that it is withdrawn would not be said again after it.
STANDING = """WITH RECURSIVE standing (key) AS (
    SELECT key FROM result WHERE series = ?1 AND replaced = ''
    UNION SELECT old.key FROM standing JOIN result AS old ON old.replaced = standing.key
    WHERE old.series = ?1)"""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TIDY_EVERY, DAY = 3600.0, 86400.0  # seconds
EARLIEST = 1577836800.0  # 2020, before which this program was not
KEY = re.compile(r"[0-9a-f]{64}")


class Desk(Queue):
    """The queue in a node's folder, which must be there, as a person uses it.

    Series are named by the first letters of their keys.
    """

    def __init__(self, root: Path) -> None:
        if not (root / QUEUE).exists():
            raise InputError(
                "The node has no queue in its folder yet.", "Start it: medmoe-edge listen."
            )
        self.folder = Folder(root)
        super().__init__(self.folder.queue)

    def status(self, configuration: Configuration) -> dict[str, Any]:
        """How the queue stands, as one stable JSON object; numbers alone."""
        ((objects,),) = self._read("SELECT count(*) FROM object")
        unsent = dict.fromkeys((each.name for each in configuration.destinations), 0)
        counted = "SELECT destination, count(*) FROM {} GROUP BY destination"
        unsent |= dict(self._read(counted.format(f"delivery WHERE {UNSENT}")))
        set_aside = dict(self._read(counted.format(f"delivery WHERE {REFUSED}")))
        unkept = "commitment WHERE state != 'kept' AND asked != ''"
        uncommitted = dict(self._read(counted.format(unkept)))
        for name in configuration.committing:
            uncommitted[name] = uncommitted.get(name, 0) + len(self.uncommitted(name, NO_LIMIT))
        requests = dict(self._read("SELECT state, count(*) FROM request GROUP BY state"))
        series = dict(self._read("SELECT state, count(*) FROM series GROUP BY state"))
        return {
            "objects": objects,
            "series": {state: series.get(state, 0) for state in STATES},
            "results": self.counts()["answered"],
            "not_asked": self.asides(),
            "unsent": _shown(unsent),
            "set_aside": _shown(set_aside),
            "uncommitted": {name: count for name, count in _shown(uncommitted).items() if count},
            "requests": {
                state: requests.get(state, 0) for state in ("waiting", "fetched", "failed")
            },
        }

    def request(self, study: str, priors: int, source: str) -> int:
        """Have a study fetched and answered; the request's number."""
        file = secrets.token_hex(16)
        self.folder.keep(self.folder.requests / file, study.encode("ascii"))
        with self._lock, explaining(), self._database as database:
            number = database.execute(
                "INSERT INTO request (file, priors, source) VALUES (?, ?, ?)",
                (file, priors, source),
            ).lastrowid
        assert number is not None
        return number

    def fetched(self, number: int) -> tuple[str, str]:
        """The state of a request, and why it failed."""
        ((state, why),) = self._read("SELECT state, why FROM request WHERE number = ?", number)
        return state, why

    def series(self) -> list[dict[str, Any]]:
        """The last hundred series."""
        rows = self._read(
            "SELECT key, state, why, attempts, "
            "(SELECT count(*) FROM object WHERE series = series.key), "
            "(SELECT count(DISTINCT result) FROM source JOIN result ON result.key = source.result "
            "WHERE series = series.key) FROM series ORDER BY number DESC LIMIT 100"
        )
        names = ("series", "state", "why", "attempts", "objects", "results")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def show(self, letters: str) -> dict[str, Any]:
        """All that is known of a series: its objects, its results, and what was sent of them."""
        key = self._key(letters)
        ((state, why, attempts),) = self._read(
            "SELECT state, why, attempts FROM series WHERE key = ?", key
        )
        objects = self._read(
            "SELECT key, instance, aside FROM object WHERE series = ? ORDER BY number", key
        )
        results = self._read(
            "SELECT key, replaced FROM result WHERE series = ? ORDER BY number", key
        )
        return {
            "series": key,
            "state": state,
            "why": why,
            "attempts": attempts,
            "objects": [
                {"object": name, "instance_number": number, "not_asked": aside}
                for name, number, aside in objects
            ],
            "results": [self._result(name, replaced) for name, replaced in results],
        }

    def _result(self, key: str, replaced: str) -> dict[str, Any]:
        answers = self._column("SELECT answer FROM answer WHERE key = ?", key)
        deliveries = self._read(
            "SELECT document, destination, sent, refused FROM delivery WHERE document LIKE ? "
            "ORDER BY number",
            f"{key}/%",
        )
        return {
            "result": key,
            "replaced_by": replaced or None,
            "about": self.sources(key),
            "answers": list(map(json.loads, answers)),
            "deliveries": [
                {
                    "document": document,
                    "destination": without_secrets(name),
                    "sent": bool(sent),
                    "refused": refused or None,
                }
                for document, name, sent, refused in deliveries
            ],
        }

    def retry(self, keys: Sequence[str]) -> tuple[int, int, int]:
        """Have what was given up tried again, of the series named, or of all.

        Nothing is sent again that another result has taken the place of meanwhile, but for what
        withdraws another.

        Returns:
            How many series are answered again, how many documents that were refused are sent again,
            and how many more of these are gone.
        """
        failed = self._column("SELECT key FROM series WHERE state = 'failed'")
        refused = self._read(
            "SELECT series, document, destination FROM delivery "
            f"JOIN result ON key = substr(document, 1, 64) WHERE {REFUSED}"
        )
        wanted = set(map(self._key, keys) if keys else (*failed, *(row[0] for row in refused)))
        if not wanted <= {*failed, *(row[0] for row in refused)}:
            raise InputError("Of a series nothing was given up or refused.", "See: listen show.")
        again = [(key,) for key in failed if key in wanted]
        sent, gone = self._there([tuple(row) for series, *row in refused if series in wanted])
        with self._lock, explaining(), self._database as database:
            database.executemany(
                "UPDATE series SET state = 'waiting', attempts = 0, why = '', "
                "revision = revision + 1 WHERE key = ?",
                again,
            )
            database.executemany(
                "UPDATE delivery SET refused = '' WHERE document = ? AND destination = ?", sent
            )
        return len(again), len(sent), gone

    def requeue(self, keys: Sequence[str], destination: str | None) -> tuple[int, int]:
        """Have all documents of series sent again; how many, and how many more are gone.

        Those of a result that was withdrawn are not. `destination` is where to, as `status` names
        it; None: to all of them.
        """
        again = gone = 0
        for key in map(self._key, keys):
            rows = self._read(
                f"{STANDING} SELECT document, destination FROM delivery "
                f"JOIN result ON result.key = substr(document, 1, 64) WHERE NOT ({UNSENT}) "
                f"AND series = ?1 AND ({WITHDRAWS} OR result.key IN (SELECT key FROM standing))",
                key,
            )
            there, missing = self._there(
                row for row in rows if destination in (None, without_secrets(row[1]))
            )
            this = "WHERE document = ? AND destination = ?"
            with self._lock, explaining(), self._database as database:
                database.executemany(f"DELETE FROM commitment {this}", there)
                database.executemany(f"UPDATE delivery SET sent = 0, refused = '' {this}", there)
            again += len(there)
            gone += missing
        return again, gone

    def _there(self, deliveries: Iterable[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], int]:
        """Of documents and where they go, those that can be sent; and how many more are gone."""
        rows = list(deliveries)
        there = [row for row in rows if (self.folder.documents / row[0]).exists()]
        return there, len(rows) - len(there)

    def is_finished(self, result: str, committing: Collection[str]) -> bool:
        """Whether nothing of a result is to be sent, and all is kept where that was asked.

        What was refused is not to be sent any more once another result has taken its place.
        `committing` are the destinations that are to say that they keep what they have: what was
        sent there is not finished before they do, though they may not be asked yet.
        """
        rows = self._read(
            "SELECT document, destination, sent, state, asked FROM delivery "
            "LEFT JOIN commitment USING (document, destination) "
            f"WHERE substr(document, 1, 64) = ? AND (refused = '' OR {REFUSED})",
            result,
        )
        return all(
            sent
            and (
                state == "kept"
                or asked == ""  # it is gone, so that nobody can be asked
                or (state is None and not (name in committing and document.endswith(".dcm")))
            )
            for document, name, sent, state, asked in rows
        )

    def forget_answers(self, result: str) -> None:
        """Remove the words of a result; what it is about stays known."""
        self._write("DELETE FROM answer WHERE key = ?", [(result,)])

    def back_up(self, audit: Path, output: Path) -> int:
        """Write a tar file of all that the node keeps, and its audit log; how many files.

        The files are linked into a folder of their own, and read from there afterwards. Only
        while the last few are linked is nothing recorded, so that queue, images and documents fit
        each other: a node that waits for longer refuses what it receives.
        """
        folder = self.folder
        remove_leftovers(folder, self)
        with tempfile.TemporaryDirectory(dir=folder.root, prefix=STAGING[0]) as place:
            staging = Path(place)
            for _ in range(PASSES):
                self._stage(staging)
            with (
                contextlib.closing(sqlite3.connect(folder.queue, isolation_level=None)) as source,
                contextlib.closing(sqlite3.connect(staging / QUEUE)) as copy,
                explaining(),
            ):
                with self._lock:
                    self._database.execute("BEGIN IMMEDIATE")
                    try:
                        for gone in _files(staging) - self._stage(staging) - {Path(QUEUE)}:
                            (staging / gone).unlink()
                        source.execute("BEGIN")
                        source.execute("SELECT 1 FROM series").fetchone()  # it sees this moment
                    finally:
                        self._database.rollback()
                source.backup(copy)
            if audit.exists():  # afterwards, so that it has all that the queue tells of
                shutil.copy2(audit, staging / AUDIT)
            paths = sorted(_files(staging))
            with atomic_file(output) as part, tarfile.open(fileobj=part, mode="w") as archive:
                Path(part.name).chmod(0o600)  # whatever the umask is
                for path in paths:
                    archive.add(staging / path, path.as_posix())
        return len(paths)

    def _stage(self, staging: Path) -> set[Path]:
        """Link what is not there yet; what the folder holds, by its places in it."""
        folder, there = self.folder, _files(staging)
        found = {
            path.relative_to(folder.root)
            for path in (
                *folder.images.iterdir(),
                *folder.requests.iterdir(),
                *folder.documents.glob("*/*"),
            )
            if path.is_file() and not path.name.endswith(".part")
        }
        for place in found - there:
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # an image that was answered just now
                link(folder.root / place, staging / place)  # none is ever changed
        return found

    def _key(self, letters: str) -> str:
        """The one series whose key begins so; that of an object or a result of it counts too."""
        if len(letters) < SHORTEST or not letters.isalnum():
            raise InputError("That is no key of a series.", "See: listen show.")
        found = self._column(
            "SELECT key FROM series WHERE key LIKE ?1 UNION "
            "SELECT series FROM object WHERE key LIKE ?1 UNION "
            "SELECT series FROM result WHERE key LIKE ?1",
            f"{letters.lower()}%",
        )
        if len(found) != 1:
            what = "No series has" if not found else "More than one series has"
            raise InputError(f"{what} a key that begins so.", "See: listen show.")
        return found[0]


def restore(backup: Path, folder: Folder, audit: Path) -> int:
    """Bring back what `back_up` wrote into a folder that holds no queue yet; how many files.

    An existing audit log stays; it gets an entry about this. Raises `InputError` where the folder
    holds a queue or the file is no whole backup, `DataError` where the audit log that is there was
    changed, and `ResourceError` where the disk does not take the files, or the entry.

    Whatever of these is raised, nothing is restored: the folder is as it was. The queue is the last
    of the files, and the entry comes after it: it is never about what was not restored. Only a
    process that is killed between the two leaves a queue without it.
    """
    has_queue = InputError(
        "The node's folder holds a queue already.",
        "Restore into another folder, or move this one away.",
    )
    if folder.queue.exists():
        raise has_queue
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder.root, prefix=STAGING[1]) as place,
            tarfile.open(backup) as archive,
        ):
            staging = Path(place)
            archive.extractall(staging, filter="data")
            with contextlib.closing(sqlite3.connect(staging / QUEUE)) as database:
                ((verdict,),) = database.execute("PRAGMA integrity_check")
                database.execute("SELECT 1 FROM series")
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            paths, had_log = _files(staging), audit.exists()
            with contextlib.ExitStack() as undo:  # which an error does, the last first
                if not had_log:
                    undo.callback(audit.unlink, missing_ok=True)  # it is made with its first entry
                for path in sorted(paths - {Path(QUEUE)}):
                    target = audit if path == Path(AUDIT) else folder.root / path
                    if _move(staging / path, target):
                        undo.callback(target.unlink, missing_ok=True)
                if not _move(staging / QUEUE, folder.queue):  # a node has begun one meanwhile
                    raise has_queue
                undo.callback(folder.queue.unlink, missing_ok=True)
                AuditLog(audit).record_restore(file_sha256(backup), is_restored=not had_log)
                undo.pop_all()
    except MedMoEError as error:
        raise type(error)(f"{error.what} Nothing was restored.", error.remedy) from error
    except (OSError, tarfile.TarError, sqlite3.Error) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise ResourceError(
                f"{backup} cannot be restored ({error.strerror}): nothing was.",
                "Make room, and restore it again.",
            ) from error
        raise InputError(
            f"{backup} cannot be restored ({type(error).__name__}).",
            "Give a whole file that `listen backup` wrote.",
        ) from error
    return len(paths)


def sweep(folder: Folder, queue: Queue, *, keep_images: bool) -> None:
    """Remove images that are answered or that nobody was told were kept, and unfinished files.

    Of the latter a node that is killed leaves one. More, or any beside a queue that knows nothing,
    were received under another queue: they are moved aside.
    """
    needed = queue.images("waiting") | queue.images("failed")
    if keep_images:
        needed |= queue.images("answered")
    for part in (*folder.images.glob(".*.part"), *folder.documents.glob("*/.*.part")):
        part.unlink()
    images = [path for path in folder.images.glob("*.dcm") if path.is_file()]
    excess = [path for path in images if path.stem not in needed]
    unknown = [path for path in excess if queue.state(path.stem) is None]
    if len(unknown) > 1 or (unknown and not any(map(queue.images, STATES))):
        aside = folder.root / UNKNOWN
        aside.mkdir(mode=0o700, exist_ok=True)
        for path in unknown:
            path.replace(aside / path.name)
        log.error(
            "%d received images are not in the node's queue, which is new or from a backup: they "
            "were moved to %s. Send them again, then remove it.",
            *(len(unknown), aside),
        )
    for path in excess:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Folder, queue: Queue) -> None:
    """Remove what a backup or a restore that was killed has left of patients' images, and what a
    node has left of the UIDs of studies that nobody waits for any more.
    """
    wanted = {each.file for each in queue.requests()}
    found = [each for prefix in STAGING for each in folder.root.glob(f"{prefix}*")]
    requests = filter(Path.is_file, folder.requests.iterdir())
    found += [each for each in requests if each.name not in wanted]
    for place in found:
        with contextlib.suppress(FileNotFoundError):  # its owner removes it at this moment
            if place.stat().st_mtime > time.time() - DAY:  # none takes so long
                continue
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink()


class Tidying:
    """The work of a thread that removes what the configuration keeps no longer."""

    def __init__(self, configuration: Configuration, desk: Desk) -> None:
        self.days, self.folder, self.desk = configuration.keep_days, desk.folder, desk
        self.committing = configuration.committing
        self._plan()

    def _plan(self) -> None:
        self._due, self._ahead = time.monotonic() + TIDY_EVERY, _ahead()

    def _now(self) -> float:
        """The time, whatever is done to the clock during a pass."""
        return time.monotonic() + self._ahead

    def pending(self, _: int) -> list[str]:
        """Once an hour, the first time an hour after the start."""
        return ["old files"] if self.days and time.monotonic() >= self._due else []

    def do(self, _: str) -> None:
        """Remove documents that were sent, and images of what was answered, that are old enough.

        Not by a clock that was set meanwhile: that makes old what is new.
        """
        if abs(_ahead() - self._ahead) > TIDY_EVERY or self._now() < EARLIEST:
            log.warning("The clock was set, or is wrong: nothing is removed by keep_days for now.")
            self._plan()
            return
        results = images = 0
        for result in filter(Path.is_dir, self.folder.documents.iterdir()):
            if not KEY.fullmatch(result.name) or not self._is_old(result, *result.iterdir()):
                continue  # another may have made it: a file system, a person
            if self.desk.is_finished(result.name, self.committing):
                self.desk.forget_answers(result.name)  # by its folder, which goes after them
                shutil.rmtree(result)
                results += 1
        for image in self.folder.images.glob("*.dcm"):
            is_answered = self.desk.state(image.stem) in ("answered", "aside")
            if is_answered and self._is_old(image):
                image.unlink(missing_ok=True)
                images += 1
        if results or images:
            told = "Removed after keep_days: the documents of %d results, and %d images."
            log.info(told, results, images)
        self._plan()

    def _is_old(self, *paths: Path) -> bool:
        """Whether all of these are from before `keep_days`.

        A time that none can be from, as of a clock that was not set yet, begins anew now.
        """
        now = self._now()
        times = {path: path.stat().st_mtime for path in paths}
        wrong = [path for path, at in times.items() if not EARLIEST <= at <= now + TIDY_EVERY]
        for path in wrong:
            os.utime(path)
        return not wrong and max(times.values()) < now - self.days * DAY


def _ahead() -> float:
    """How far the clock is ahead of one that is never set, in seconds."""
    return time.time() - time.monotonic()


def _shown(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by destination, named as others may see them."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        found[without_secrets(name)] += count
    return dict(found)


def _files(folder: Path) -> set[Path]:
    """The files under a folder, by their places in it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _move(path: Path, target: Path) -> bool:
    """Bring a file to its place, unless there is one; whether there was none."""
    if target.exists():
        return False
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o600)
    shutil.move(path, target)
    return True
