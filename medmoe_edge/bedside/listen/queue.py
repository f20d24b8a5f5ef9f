"""The work queue of the DICOM node, in SQLite: survives the end of the process at any moment.

What is answered is a series; its tables and states are in `schema`. An object's key is the SHA-256
of its SOP Instance UID, so that what is sent again is known. Sent again with other content it is
another version, under a key of its own; `origin` tells, in hashes, what versions and patients there
are. Times are not kept, as a clock may jump: how long a series has been quiet is known in memory.

The folder of the DICOM node, which holds patients' images and so is for its owner alone.

    queue.sqlite     what is to be done, and what was
    images/KEY.dcm   received objects, until they are answered
    unknown/         received objects that a start has found there and not in the queue
    documents/KEY/   a result of a series, a file for each question and kind of document
    requests/        UIDs of studies that are to be fetched, until they are
    audit.jsonl      unless the configuration names another file
    lock             held by the node that works here

KEY is a SHA-256: no name of a file tells a UID or a patient.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medmoe_edge.atomic import Places, atomic_file, bytes_under, permitted, sync_folder
from medmoe_edge.bedside.listen.header import Origin, same_patient
from medmoe_edge.bedside.listen.schema import (
    CURRENT,
    IN_TURN,
    LEFT,
    MOVED,
    REPLACED,
    SETTLED,
    UNSENT,
    Extent,
    Job,
    Membership,
    Request,
    Slice,
    explaining,
    prepare,
)
from medmoe_edge.errors import MedMoEError, ResourceError
from medmoe_edge.image.pixels import Image, shown_name
from medmoe_edge.image.worker import Bounds, read_apart

RECOUNT = 30.0  # seconds
BOUNDS = Bounds(seconds=30.0)  # of one picture: nobody waits at a screen
STAGING = (".backup.", ".restore.")  # how folders of links begin, while those are at work


class Folder:
    """The paths, and writing that lasts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.documents = root / "images", root / "documents"
        self.requests = root / "requests"
        self.queue, self.lock = root / "queue.sqlite", root / "lock"
        self._used, self._counted = 0, -math.inf
        self._places = Places()
        with permitted(root):
            for folder in (root, self.images, self.documents, self.requests):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if os.name == "posix" and stat.S_IMODE(folder.stat().st_mode) & 0o077:
                    folder.chmod(0o700)  # whoever made it, nobody else may look into it

    def remember(self) -> None:
        """From now on `check` holds the folder against what it is now."""
        subfolders = (self.images, self.documents, self.requests)
        self._places = Places((self.root, self.queue, self.lock), subfolders)

    def check(self) -> None:
        """Raise `ResourceError` where a part was moved away, removed or covered by a mount."""
        if (lost := self._places.lost()) is not None:
            part = "The" if lost == self.root else f"{lost.name} of the"
            raise ResourceError(
                f"{part} node's folder was moved, removed or covered while it runs.",
                "Bring back what the node began with, or start it anew.",
            )

    def image(self, key: str) -> Path:
        """Where a received object lies."""
        return self.images / f"{key}.dcm"

    def picture(self, key: str, frame: int | None = None) -> Image:
        """A frame of a received object, the middle one if none is named.

        Decoded in a process of its own, which is bounded. Raises what `load_image` does.
        """
        path = self.image(key)
        try:
            return read_apart(path, frame, BOUNDS)
        except MedMoEError as error:
            error.what = error.what.replace(shown_name(path), "The object")
            error.args = (f"{error.what} {error.remedy}",)
            raise

    def free(self) -> int:
        """Bytes free on the disk."""
        return shutil.disk_usage(self.root).free

    def used(self) -> int:
        """Bytes that images, documents and the queue take; counted anew once in a while."""
        now = time.monotonic()
        if now >= self._counted + RECOUNT:
            self._used = bytes_under(self.root, (self.root / name for name in STAGING))
            self._counted = now
        return self._used

    def keep(self, path: Path, data: bytes) -> None:
        """Write a file that, on return, is on the disk whole, and so is its name."""
        self.check()
        if path.is_relative_to(self.documents):
            path.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic_file(path) as file:
            file.write(data)
        for folder in (path.parent, path.parent.parent):
            sync_folder(folder)
        self._used += len(data)


def key_of(uid: str) -> str:
    """The key of an object, from its SOP Instance UID."""
    return hashlib.sha256(uid.encode("ascii")).hexdigest()


CLOSE = "UPDATE series SET state = ?, why = ?"
MOST_REMEMBERED, REMEMBERED = 10_000, 3600.0  # series and studies, and for how many seconds


class Queue:
    """The queue in the file `path`; its methods may be called from any thread.

    What a method recorded is on the disk when it returns. Raises `ResourceError` where SQLite
    cannot do it: full disk, damaged file.
    """

    def __init__(self, path: Path) -> None:
        self._lock, self._clock = threading.Lock(), threading.Lock()
        self._opened = time.monotonic()
        self._arrived: dict[str, float] = {}  # of series and studies, when something last came
        self._arriving: Counter[str] = Counter()  # how much comes at the moment
        with explaining():
            self._database = sqlite3.connect(path, timeout=10, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            prepare(self._database)

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
        membership: Membership | None = None,
        aside: str = "",
    ) -> None:
        """Add an object; its series then waits, unless the object is set `aside` for a reason.

        Known ones are left alone, but for those that were given up or set aside. Without
        `membership` it is a series of its own. A series that another patient's result rests on
        waits even if nothing is asked of it: that result is to be withdrawn. What is left of the
        series that the object was of before waits too, until nothing more leaves it.
        """
        membership = membership or Membership(key)
        values = {"key": key, "sha256": sha256, "peer": peer, "questions": json.dumps(questions)}
        values |= {**membership._asdict(), "aside": aside}
        changed = ", ".join(f"{name} = excluded.{name}" for name in values if name != "key")
        with self._lock, explaining(), self._database as database:
            database.execute(
                f"INSERT INTO object ({', '.join(values)}) VALUES ({', '.join('?' * len(values))}) "
                f"ON CONFLICT (key) DO UPDATE SET {changed} WHERE NOT EXISTS "
                f"(SELECT 1 FROM series WHERE series.key = object.series AND {SETTLED})",
                tuple(values.values()),
            )
            if origin is not None:
                statement = "INSERT OR REPLACE INTO origin VALUES (?, ?, ?, ?, ?, ?)"
                database.execute(statement, (key, *origin))
            replaced = database.execute(REPLACED, (membership.series,)).fetchone()
            waits = not aside or replaced is not None
            database.execute(
                "INSERT INTO series (key, state, why) VALUES (?1, ?2, ?3) "
                "ON CONFLICT (key) DO UPDATE SET state = 'waiting', attempts = 0, why = '', "
                "revision = revision + 1 WHERE ?2 = 'waiting'",
                (membership.series, "waiting" if waits else "aside", aside),
            )
            if origin is not None:
                left = database.execute(
                    "UPDATE series SET state = 'waiting', revision = revision + 1 "
                    f"WHERE key IN ({LEFT}) RETURNING key",
                    (origin.uid, membership.series),
                ).fetchall()
                with self._clock:
                    self._arrived.update((name, time.monotonic()) for (name,) in left)

    @contextlib.contextmanager
    def arriving(self, *names: str) -> Iterator[None]:
        """While an object of a series, and of a study by its origin, comes."""
        with self._clock:
            self._arriving.update(names)
        try:
            yield
        finally:
            now = time.monotonic()
            with self._clock:
                self._arriving.subtract(names)
                self._arriving = +self._arriving  # those that are not zero
                self._arrived.update(dict.fromkeys(names, now))
                if len(self._arrived) > MOST_REMEMBERED:
                    recent = {n: t for n, t in self._arrived.items() if now - t < REMEMBERED}
                    self._arrived = recent

    def quiet(self, name: str) -> float:
        """Seconds since an object of a series, or of a study by its origin, last came."""
        with self._clock:
            if name in self._arriving:
                return 0.0
            return time.monotonic() - self._arrived.get(name, self._opened)

    def settles(self, key: str) -> bool:
        """Whether an object is answered or will be."""
        joined = "SELECT 1 FROM object JOIN series ON series.key = object.series"
        return bool(self._read(f"{joined} WHERE object.key = ? AND {SETTLED}", key))

    def has_moved(self, key: str) -> bool:
        """Whether an object has come again as one of another series."""
        return bool(self._read(f"SELECT 1 FROM object WHERE key = ? AND {MOVED}", key))

    def state(self, key: str) -> str | None:
        """The state of the series of an object; None of one that was never added."""
        joined = "SELECT state FROM object JOIN series ON series.key = object.series"
        return next(iter(self._column(f"{joined} WHERE object.key = ?", key)), None)

    def sha256(self, key: str) -> str:
        """The hash of an object's file."""
        ((found,),) = self._read("SELECT sha256 FROM object WHERE key = ?", key)
        return str(found)

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
        statement = "SELECT DISTINCT patient FROM origin WHERE study = ? AND uid != ?"
        found = self._column(statement, origin.study, origin.uid)
        return not all(same_patient(each, origin.patient) for each in found)

    def joined(self, membership: Membership, patient: str) -> Membership:
        """Where an object of a patient belongs: where it, or the others of its series, lack the
        issuer of the number, to these. Of several issuers one without is neither's.
        """
        neithers = key_of(f"{membership.any_issuer} of several issuers")
        statement = "SELECT DISTINCT series, patient FROM object JOIN origin USING (key) "
        rows = self._read(f"{statement} WHERE any_issuer = ?", membership.any_issuer)
        others = {series for series, other in rows if not same_patient(patient, other)}
        found = {series for series, _ in rows} - others - {neithers}
        if len(found) == 1:
            return membership._replace(series=found.pop())
        has_issuer = membership.series != membership.any_issuer
        return membership if has_issuer or not found else membership._replace(series=neithers)

    def waiting(self, limit: int, is_complete: Callable[[str], bool] = lambda _: True) -> list[str]:
        """The first series to be answered that are complete; those last that were tried most."""
        waiting = "SELECT key FROM series WHERE state = 'waiting' ORDER BY attempts, number"
        return list(itertools.islice(filter(is_complete, self._column(waiting)), limit))

    def extent(self, key: str) -> Extent:
        """How much of a series is there."""
        uid = "coalesce(uid, key)"  # those of before 0.3 may have no origin
        ((objects, instances, expected, has_processing, study),) = self._read(
            f"SELECT count(DISTINCT CASE aside WHEN '' THEN {uid} END), count(DISTINCT {uid}), "
            "coalesce(max(expected), 0), coalesce(max(intent = 'processing'), 0), "
            "coalesce(max(study), '') FROM object LEFT JOIN origin USING (key) WHERE series = ? "
            f"AND NOT {MOVED}",
            key,
        )
        return Extent(objects, instances, expected, bool(has_processing), study)

    def job(self, key: str) -> Job:
        """What is known of a series."""
        rows = self._read("SELECT key, attempts, revision FROM series WHERE key = ?", key)
        return Job(*rows[0])

    def patients(self, series: str) -> set[str]:
        """Whose a series is, hashed: more than one where some of it lacks the number's issuer."""
        found = "SELECT patient FROM origin JOIN object USING (key) WHERE series = ?"
        return set(self._column(found, series))

    def settled(self, series: str) -> list[str]:
        """The objects of a series, in all versions; none while it waits, or where it was given up.

        Nor what was set aside: that has no image unless one is just coming.
        """
        statement = "SELECT object.key FROM object JOIN series ON series.key = object.series WHERE "
        where = "object.series = ? AND aside = '' AND state IN ('answered', 'aside')"
        return self._column(statement + where, series)

    def slices(self, series: str) -> list[Slice]:
        """The objects of a series that may be asked about, each in its latest version."""
        rows = self._read(
            "SELECT key, sha256, peer, questions, position, instance, intent, view FROM object "
            f"WHERE {CURRENT} ORDER BY number",
            series,
        )
        return [Slice._make((*row[:3], tuple(json.loads(row[3])), *row[4:])) for row in rows]

    def persons(self, series: str) -> list[str]:
        """What these objects say of their patient, as `Origin.person`."""
        statement = "SELECT DISTINCT person FROM object JOIN origin USING (key) WHERE "
        return self._column(statement + CURRENT, series)

    def shown_elsewhere(self, key: str) -> bool:
        """Whether what an object shows is in its study for presentation too."""
        rows = self._read(
            "SELECT DISTINCT beside.patient, own.patient FROM object AS mine "
            "JOIN origin AS own ON own.key = mine.key "
            "JOIN origin AS beside ON beside.study = own.study "
            "JOIN object AS other ON other.key = beside.key "
            "WHERE mine.key = ? AND other.aside = '' AND other.view = mine.view "
            "AND other.intent = 'presentation'",
            key,
        )
        return any(itertools.starmap(same_patient, rows))

    def mark(self, uids: Iterable[str]) -> None:
        """Record the objects that key objects name, by the hashes of their UIDs."""
        self._write("INSERT OR IGNORE INTO marked VALUES (?)", [(uid,) for uid in uids])

    def marked(self, series: str) -> set[str]:
        """The keys of a series' objects that key objects name."""
        statement = "SELECT key FROM object JOIN origin USING (key) JOIN marked USING (uid) "
        return set(self._column(f"{statement} WHERE series = ?", series))

    def replaced(self, series: str) -> dict[str, list[str]]:
        """The results that versions in a series contradict, and the objects that they are about."""
        return {key: self.sources(key) for key in self._column(REPLACED, series)}

    def results(self, series: str) -> list[str]:
        """The results of a series that none has taken the place of."""
        statement = "SELECT key FROM result WHERE series = ? AND replaced = '' ORDER BY number"
        return self._column(statement, series)

    def series_of(self, result: str) -> str:
        """The series that a result is about."""
        return self._column("SELECT series FROM result WHERE key = ?", result)[0]

    def is_replaced(self, result: str) -> bool:
        """Whether another result has taken the place of one."""
        return bool(self._read("SELECT 1 FROM result WHERE key = ? AND replaced != ''", result))

    def told(self, result: str) -> dict[str, str] | None:
        """The warnings of a result's answers, by their codes; None where these are gone."""
        answers = self._column("SELECT answer FROM answer WHERE key = ?", result)
        warned = (each for text in answers for each in json.loads(text).get("warnings", ()))
        return {each["code"]: each["message"] for each in warned} if answers else None

    def sources(self, result: str) -> list[str]:
        """The objects that a result is about."""
        return self._column("SELECT object FROM source WHERE result = ?", result)

    def count_attempt(self, key: str) -> None:
        """Before each attempt, so that one that ends the process is counted too."""
        self._write("UPDATE series SET attempts = attempts + 1 WHERE key = ?", [(key,)])

    def forgive_attempt(self, key: str) -> None:
        """Take back an attempt that failed for no fault of the object's."""
        self._write("UPDATE series SET attempts = max(0, attempts - 1) WHERE key = ?", [(key,)])

    def close_series(self, job: Job, state: str, why: str = "") -> None:
        """Record that a series needs no answer any more, and why, unless objects came meanwhile."""
        self._write(
            f"{CLOSE} WHERE key = ? AND revision = ?", [(state, why, job.key, job.revision)]
        )

    def answered(
        self,
        job: Job,
        result: str,
        sources: Iterable[str],
        answers: dict[str, str],
        deliveries: Iterable[tuple[str, str]],
        replaced: Iterable[str] = (),
    ) -> None:
        """Record a result: its answers by question, and which documents go where, all or nothing.

        `replaced` are the results whose place it takes. A series of which objects came meanwhile
        goes on waiting.
        """
        with self._lock, explaining(), self._database as database:
            database.execute("INSERT INTO result (key, series) VALUES (?, ?)", (result, job.key))
            database.executemany(
                "INSERT INTO source VALUES (?, ?)", [(result, key) for key in sources]
            )
            rows = [(result, question, text) for question, text in answers.items()]
            database.executemany("INSERT INTO answer VALUES (?, ?, ?)", rows)
            database.executemany(
                "INSERT INTO delivery (document, destination) VALUES (?, ?)", deliveries
            )
            database.executemany(
                "UPDATE result SET replaced = ? WHERE key = ?", [(result, old) for old in replaced]
            )
            state = "answered" if answers else "aside"
            values = (state, "", job.key, job.revision)
            database.execute(f"{CLOSE} WHERE key = ? AND revision = ?", values)

    def instance_number(self, series: str, document: str) -> int:
        """The Instance Number of a document in its DICOM series: always the same for the same."""
        with self._lock, explaining(), self._database as database:
            database.execute(
                "INSERT OR IGNORE INTO place SELECT ?1, ?2, 1 + coalesce(max(number), 0) "
                "FROM place WHERE series = ?1",
                (series, document),
            )
            statement = "SELECT number FROM place WHERE series = ? AND document = ?"
            ((number,),) = database.execute(statement, (series, document))
            return int(number)

    def unsent(self, destination: str, limit: int) -> list[str]:
        """The first documents whose turn it is to be sent to a destination."""
        unsent = f"SELECT document FROM delivery WHERE destination = ? AND {IN_TURN} "
        return self._column(f"{unsent} ORDER BY number LIMIT ?", destination, limit)

    def sent(self, document: str, destination: str) -> None:
        """Record that a destination has a document."""
        self._write(
            "UPDATE delivery SET sent = 1 WHERE document = ? AND destination = ?",
            [(document, destination)],
        )

    def refused(self, document: str, destination: str, why: str) -> None:
        """Record why a destination refuses a document for good: it is not sent any more."""
        self._write(
            "UPDATE delivery SET refused = ? WHERE document = ? AND destination = ?",
            [(why, document, destination)],
        )

    def uncommitted(self, destination: str, limit: int) -> list[str]:
        """The first documents that were sent and that it was not asked to keep."""
        return self._column(
            "SELECT document FROM delivery WHERE destination = ? AND sent = 1 AND document LIKE "
            "'%.dcm' AND NOT EXISTS (SELECT 1 FROM commitment WHERE commitment.document = "
            "delivery.document AND commitment.destination = delivery.destination) "
            "ORDER BY number LIMIT ?",
            destination,
            limit,
        )

    def ask_commitment(self, destination: str, asked: str, uids: dict[str, str]) -> None:
        """Record, by document, the UIDs that a destination is `asked`, by that UID, to keep."""
        rows = [(document, destination, uid, asked) for document, uid in uids.items()]
        statement = "INSERT OR REPLACE INTO commitment (document, destination, uid, asked) VALUES "
        self._write(f"{statement}(?, ?, ?, ?)", rows)

    def commit(self, asked: str, uids: Iterable[str], state: str) -> None:
        """Record what a destination said of documents that it was `asked` to keep."""
        self._write(
            "UPDATE commitment SET state = ? WHERE asked = ? AND uid = ?",
            [(state, asked, uid) for uid in uids],
        )

    def forget_commitment(self, destination: str, asked: str | None = None) -> None:
        """Forget what was not answered, to ask anew: of one request, or of all."""
        self._write(
            "DELETE FROM commitment WHERE destination = ?1 AND state = 'asked' "
            "AND (?2 IS NULL OR asked = ?2)",
            [(destination, asked)],
        )

    def requests(self) -> list[Request]:
        """The studies to be fetched."""
        statement = "SELECT number, file, priors, source FROM request WHERE state = 'waiting' "
        return [Request(*row) for row in self._read(f"{statement} ORDER BY number")]

    def close_request(self, number: int, state: str, why: str = "") -> None:
        """Record that a study was fetched, or why it cannot be."""
        self._write(
            "UPDATE request SET state = ?, why = ? WHERE number = ?", [(state, why, number)]
        )

    def tally(self, name: str) -> None:
        """Count something that leaves no row."""
        statement = "INSERT INTO tally VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET count = count"
        self._write(f"{statement} + 1", [(name,)])

    def images(self, state: str) -> set[str]:
        """The objects of the series in a state."""
        statement = "SELECT object.key FROM object JOIN series ON series.key = object.series "
        return set(self._column(f"{statement} WHERE state = ?", state))

    def counts(self) -> dict[str, int]:
        """How many series are waiting and failed, results were answered, and documents are unsent.

        A series of which objects were sent again has more than one result.
        """
        found = dict(self._read("SELECT state, count(*) FROM series GROUP BY state"))
        ((results,),) = self._read("SELECT count(DISTINCT result) FROM source")
        ((unsent,),) = self._read(f"SELECT count(*) FROM delivery WHERE {UNSENT}")
        return {
            "waiting": found.get("waiting", 0),
            "answered": results,
            "failed": found.get("failed", 0),
            "unsent": unsent,
        }

    def asides(self) -> dict[str, int]:
        """How many objects were set aside, by reason, and what else was counted."""
        rows = self._read("SELECT aside, count(*) FROM object WHERE aside != '' GROUP BY aside")
        return dict(rows) | dict(self._read("SELECT name, count FROM tally"))

    def _read(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, explaining():
            return self._database.execute(statement, values).fetchall()

    def _column(self, statement: str, *values: Any) -> list[str]:
        return [value for (value,) in self._read(statement, *values)]

    def _write(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with self._lock, explaining(), self._database as database:
            database.executemany(statement, rows)
