"""The tables of the node's queue, how those of earlier versions become these, and their rows.

    series     objects that are answered together: those of a patient, study and series, by a hash
    object     what was received, each version of it once
    origin     hashes of what an object is and whose, to compare
    result     answers about a series; `replaced` names the result that took its place
    source     the objects that a result is about
    answer     a result's answers, by question
    delivery   which document goes where; `refused` says why it is set aside
    place      the Instance Numbers given to documents, in their DICOM series
    marked     objects that key objects name, by the hash of their UID
    tally      how often something happened that leaves no row
    commitment which documents a destination was asked to keep, and what it said; `asked` is empty
               of those that were gone, about which it cannot be asked
    request    studies that a person wants fetched; their UIDs are in files of a folder beside

A series is `waiting` until its answers are recorded, in one transaction with what is to be sent of
them, and then `answered`; `failed` where it cannot be answered; `aside` where nothing is asked.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from medmoe_edge.errors import ResourceError

VERSION = 5  # PRAGMA user_version; those before 0.3 have none
TABLES = """
CREATE TABLE IF NOT EXISTS series (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'answered', 'failed', 'aside')),
    attempts INTEGER NOT NULL DEFAULT 0,
    revision INTEGER NOT NULL DEFAULT 0,
    why TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS series_state ON series (state, attempts, number);
CREATE TABLE IF NOT EXISTS object (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    sha256 TEXT NOT NULL,
    peer TEXT NOT NULL,
    questions TEXT NOT NULL,
    series TEXT NOT NULL,
    aside TEXT NOT NULL DEFAULT '',
    position REAL,
    instance INTEGER,
    intent TEXT NOT NULL DEFAULT '',
    view TEXT NOT NULL DEFAULT '',
    expected INTEGER NOT NULL DEFAULT 0,
    any_issuer TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS object_series ON object (series, number);
CREATE INDEX IF NOT EXISTS object_aside ON object (aside);
CREATE INDEX IF NOT EXISTS object_any_issuer ON object (any_issuer);
CREATE TABLE IF NOT EXISTS origin (
    key TEXT PRIMARY KEY,
    uid TEXT NOT NULL,
    content TEXT NOT NULL,
    patient TEXT NOT NULL,
    study TEXT NOT NULL,
    person TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS origin_uid ON origin (uid);
CREATE INDEX IF NOT EXISTS origin_study ON origin (study);
CREATE TABLE IF NOT EXISTS result (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    series TEXT NOT NULL,
    replaced TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS result_series ON result (series);
CREATE INDEX IF NOT EXISTS result_replaced ON result (replaced);
CREATE TABLE IF NOT EXISTS source (
    result TEXT NOT NULL,
    object TEXT NOT NULL,
    PRIMARY KEY (result, object)
) STRICT;
CREATE INDEX IF NOT EXISTS source_object ON source (object);
CREATE TABLE IF NOT EXISTS answer (
    key TEXT NOT NULL,
    question TEXT NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (key, question)
) STRICT;
CREATE TABLE IF NOT EXISTS delivery (
    number INTEGER PRIMARY KEY,
    document TEXT NOT NULL,
    destination TEXT NOT NULL,
    sent INTEGER NOT NULL DEFAULT 0,
    refused TEXT NOT NULL DEFAULT '',
    UNIQUE (document, destination)
) STRICT;
CREATE INDEX IF NOT EXISTS delivery_open ON delivery (destination, sent, number);
CREATE TABLE IF NOT EXISTS place (
    series TEXT NOT NULL,
    document TEXT NOT NULL,
    number INTEGER NOT NULL,
    PRIMARY KEY (series, document)
) STRICT;
CREATE TABLE IF NOT EXISTS marked (uid TEXT PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS tally (name TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS commitment (
    document TEXT NOT NULL,
    destination TEXT NOT NULL,
    uid TEXT NOT NULL,
    asked TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'asked' CHECK (state IN ('asked', 'kept', 'failed')),
    PRIMARY KEY (document, destination)
) STRICT;
CREATE TABLE IF NOT EXISTS request (
    number INTEGER PRIMARY KEY,
    file TEXT NOT NULL,
    priors INTEGER NOT NULL,
    source TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'fetched', 'failed')),
    why TEXT NOT NULL DEFAULT ''
) STRICT;
"""
UNSENT = "delivery.sent = 0 AND delivery.refused = ''"
# Nothing of a result goes to a destination before what it takes the place of: a receiver would take
# the earlier one, which may be another patient's, for the later.
# CROSS and + keep SQLite from looking through all that is unsent for each document.
IN_TURN = f"""{UNSENT} AND NOT EXISTS (
    SELECT 1 FROM result AS old CROSS JOIN delivery AS before
    ON before.document > old.key || '/' AND before.document < old.key || '0'
    WHERE old.replaced = substr(delivery.document, 1, 64)
    AND +before.destination = delivery.destination AND +before.sent = 0
    AND before.refused = '')"""
# Of an object that needs nothing more when it comes again.
SETTLED = "object.aside = '' AND series.state != 'failed'"
LATER = """EXISTS (SELECT 1 FROM origin AS mine
    JOIN origin AS other ON other.uid = mine.uid JOIN object AS later ON later.key = other.key
    WHERE mine.key = object.key AND later.number > object.number AND {})"""
# Whether an object has come again as one of another series, mostly another patient's.
MOVED = LATER.format("later.series != object.series")
REPEATED = LATER.format("later.series = object.series AND later.aside = ''")
LATEST = f"object.aside = '' AND NOT {MOVED} AND NOT {REPEATED}"
# The objects of a series that may be asked about, each in its latest version.
CURRENT = f"object.series = ? AND {LATEST}"
# The results about objects that have a later version in a series.
REPLACED = """SELECT DISTINCT result.key FROM object AS later
    JOIN origin AS new ON new.key = later.key JOIN origin AS old ON old.uid = new.uid
    JOIN object AS earlier ON earlier.key = old.key
    JOIN source ON source.object = earlier.key JOIN result ON result.key = source.result
    WHERE later.series = ? AND later.number > earlier.number AND result.replaced = ''"""
# The series that an object of a UID has left for another, with objects that stay: those that wait,
# and those whose result rests on it.
LEFT = f"""SELECT earlier.series FROM origin AS old JOIN object AS earlier ON earlier.key = old.key
    JOIN series AS its ON its.key = earlier.series
    WHERE old.uid = ?1 AND earlier.series != ?2
    AND (its.state = 'waiting' OR EXISTS (
        SELECT 1 FROM source JOIN result ON result.key = source.result
        WHERE source.object = earlier.key AND result.series = its.key AND result.replaced = ''))
    AND EXISTS (SELECT 1 FROM object WHERE object.series = its.key AND {LATEST})"""
# What tables of before version 4, and of before 5, lack, by table.
ADDED = {
    "origin": "person TEXT NOT NULL DEFAULT ''",
    "delivery": "refused TEXT NOT NULL DEFAULT ''",
    "object": "any_issuer TEXT NOT NULL DEFAULT ''",
}
# Until 0.2 each object was answered by itself: it becomes a series of its own, under its key.
UPGRADE = f"""
ALTER TABLE object RENAME TO old_object;
ALTER TABLE answer RENAME TO old_answer;
DROP INDEX IF EXISTS object_state;
{TABLES}
INSERT INTO series (number, key, state, attempts)
    SELECT number, key, CASE questions WHEN '[]' THEN 'aside' ELSE state END, attempts
    FROM old_object;
INSERT INTO object (number, key, sha256, peer, questions, series, aside)
    SELECT number, key, sha256, peer, questions, key,
        CASE questions WHEN '[]' THEN 'no_question' ELSE '' END
    FROM old_object;
INSERT INTO result (key, series)
    SELECT key, key FROM old_object WHERE state = 'answered' AND questions != '[]' ORDER BY number;
INSERT INTO source SELECT key, key FROM result;
INSERT INTO answer SELECT key, question, answer FROM old_answer;
DROP TABLE old_answer;
DROP TABLE old_object;
"""


class Membership(NamedTuple):
    """Where an object belongs.

    Attributes:
        series: A hash of its patient, study and series.
        position: Along the normal of its plane, in mm; None where it has none.
        instance: Its Instance Number.
        intent: "processing" or "presentation", where it says so.
        view: A hash of what it shows, to find the other intent's picture of the same.
        expected: How many objects its series has, 0 where it does not say.
        any_issuer: A hash as `series`, without who issued the patient's number.
    """

    series: str
    position: float | None = None
    instance: int | None = None
    intent: str = ""
    view: str = ""
    expected: int = 0
    any_issuer: str = ""


class Slice(NamedTuple):
    """An object that may be asked about; `sha256` is of its file."""

    key: str
    sha256: str
    peer: str
    questions: tuple[str, ...]
    position: float | None
    instance: int | None
    intent: str
    view: str


class Job(NamedTuple):
    """A series to be answered.

    Attributes:
        key: A hash of its patient, study and series.
        attempts: How often it was tried before.
        revision: Counts its objects as they come, so that none that comes meanwhile is missed.
    """

    key: str
    attempts: int
    revision: int


class Request(NamedTuple):
    """A study that is to be fetched, with so many earlier ones of its patient.

    `file` is the name of the one with its UID, while it waits; `source` is the one to ask, as a
    person names it; empty: the first.
    """

    number: int
    file: str
    priors: int
    source: str


class Extent(NamedTuple):
    """How much of a series is there.

    Attributes:
        objects: How many have come that may be asked about; one sent again counts once.
        instances: How many have come, with those set aside; one sent again counts once.
        expected: How many instances it has to have by its own word, 0 where it does not say.
        has_processing: Whether some of them are for processing.
        study: The hash of its study, empty where it is not known.
    """

    objects: int
    instances: int
    expected: int
    has_processing: bool
    study: str


def prepare(database: sqlite3.Connection) -> None:
    """Make the tables, or bring those of an earlier version to this one, all or nothing.

    Raises `ResourceError` where they are of a later version.
    """
    ((version,),) = database.execute("PRAGMA user_version")
    if version > VERSION:
        raise ResourceError(
            "The node's queue was written by a later version.", "Install that version again."
        )
    if version == VERSION:
        return
    script = "BEGIN IMMEDIATE;"
    for table, column in ADDED.items():
        there = _columns(database, table)
        if there and column.split()[0] not in there:
            script += f"ALTER TABLE {table} ADD COLUMN {column};"
    there = _columns(database, "object")
    script += UPGRADE if there and "series" not in there else TABLES
    try:
        database.executescript(f"{script} PRAGMA user_version = {VERSION}; COMMIT;")
    except sqlite3.Error:
        database.rollback()
        raise


def _columns(database: sqlite3.Connection, table: str) -> list[str]:
    """Of a table; none of one that is not there."""
    return [row[1] for row in database.execute(f"PRAGMA table_info({table})")]


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Around SQLite: its errors as ours."""
    try:
        yield
    except sqlite3.Error as error:
        why = getattr(error, "sqlite_errorname", type(error).__name__)
        raise ResourceError(
            f"The node's queue cannot be used ({why}).",
            "Free some space, check the folder's permissions, or restore the folder.",
        ) from error
