"""What a person does with the node's queue: look at it, have something tried or sent again.

It works beside a running node, which finds what is asked of it within a second.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe_edge.bedside.listen.config import Configuration
from medmoe_edge.bedside.listen.queue import Queue, explaining
from medmoe_edge.errors import InputError

SHORTEST = 4  # letters of a key that are enough


class Desk(Queue):
    """The queue in the file `path`, which must be there, as a person uses it.

    Series are named by the first letters of their keys.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise InputError(
                "The node has no queue in its folder yet.", "Start it: medmoe-edge listen."
            )
        super().__init__(path)

    def status(self, configuration: Configuration) -> dict[str, Any]:
        """How the queue stands, as one stable JSON object; numbers alone."""
        ((objects,),) = self._read("SELECT count(*) FROM object")
        unsent = {each.name: 0 for each in configuration.destinations}
        unsent |= dict(
            self._read(
                "SELECT destination, count(*) FROM delivery WHERE sent = 0 GROUP BY destination"
            )
        )
        series = dict(self._read("SELECT state, count(*) FROM series GROUP BY state"))
        return {
            "objects": objects,
            "series": {
                state: series.get(state, 0) for state in ("waiting", "answered", "failed", "aside")
            },
            "results": self.counts()["answered"],
            "not_asked": self.asides(),
            "unsent": unsent,
        }

    def series(self, state: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """The last series, all or those in a state."""
        rows = self._read(
            "SELECT key, state, why, attempts, "
            "(SELECT count(*) FROM object WHERE series = series.key), "
            "(SELECT count(DISTINCT result) FROM source JOIN result ON result.key = source.result "
            "WHERE series = series.key) FROM series WHERE ?1 IS NULL OR state = ?1 "
            "ORDER BY number DESC LIMIT ?2",
            state,
            limit,
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
        answers = self._read("SELECT answer FROM answer WHERE key = ?", key)
        deliveries = self._read(
            "SELECT document, destination, sent FROM delivery WHERE document LIKE ? "
            "ORDER BY number",
            f"{key}/%",
        )
        return {
            "result": key,
            "replaced_by": replaced or None,
            "about": self.sources(key),
            "answers": [json.loads(text) for (text,) in answers],
            "deliveries": [
                {"document": document, "destination": destination, "sent": bool(sent)}
                for document, destination, sent in deliveries
            ],
        }

    def retry(self, keys: Sequence[str]) -> int:
        """Have series that were given up answered again: those named, or all; how many they are."""
        failed = [key for (key,) in self._read("SELECT key FROM series WHERE state = 'failed'")]
        wanted = [self._key(each) for each in keys] if keys else failed
        if not set(wanted) <= set(failed):
            raise InputError(
                "A series that was not given up cannot be tried again.", "See: listen show."
            )
        self._write(
            "UPDATE series SET state = 'waiting', attempts = 0, why = '', revision = revision + 1 "
            "WHERE key = ?",
            [(key,) for key in wanted],
        )
        return len(wanted)

    def requeue(self, keys: Sequence[str], destination: str | None) -> int:
        """Have all documents of series sent again, to all destinations or one; how many."""
        found = 0
        for key in map(self._key, keys):
            with self._lock, explaining(), self._database as database:
                found += database.execute(
                    "UPDATE delivery SET sent = 0 WHERE sent = 1 "
                    "AND (?2 IS NULL OR destination = ?2) AND substr(document, 1, 64) IN "
                    "(SELECT key FROM result WHERE series = ?1)",
                    (key, destination),
                ).rowcount
        return found

    def _key(self, letters: str) -> str:
        """The one series whose key begins so; that of an object or a result of it counts too."""
        if len(letters) < SHORTEST or not letters.isalnum():
            raise InputError("That is no key of a series.", "See: listen show.")
        pattern = f"{letters.lower()}%"
        rows = self._read(
            "SELECT key FROM series WHERE key LIKE ?1 UNION "
            "SELECT series FROM object WHERE key LIKE ?1 UNION "
            "SELECT series FROM result WHERE key LIKE ?1",
            pattern,
        )
        if len(rows) != 1:
            what = "No series has" if not rows else "More than one series has"
            raise InputError(f"{what} a key that begins so.", "See: listen show.")
        return str(rows[0][0])
