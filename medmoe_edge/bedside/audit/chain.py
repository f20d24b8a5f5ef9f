"""What a line of the audit log is, and whether a log is whole.

Each line is one JSON object in canonical form (sorted keys, no spaces, ASCII):

    number         from 1
    time           UTC, ISO 8601; what the clock said, which may jump: order is the number's
    who, event, model, question, answer, input_sha256
    previous       the hash of the line before; 64 zeros in the first
    hash           SHA-256 of the same object without `hash`

A changed, missing or moved line breaks the chain. Nothing in it is secret: who can write the file
can also write a whole new one, or cut off its end. Against that, keep the head (the last line's
hash) elsewhere and give it to `verify_log`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from medmoe_edge.errors import InputError

GENESIS = "0" * 64
MAX_LINE = 2**20  # bytes; a question has at most 10,000 characters
FIELDS = {
    *("number", "time", "who", "event", "model", "question", "answer", "input_sha256"),
    *("previous", "hash"),
}

Fault = Literal["changed", "deleted", "reordered", "torn", "head"]


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """Whether a log is what was written.

    `entries` counts the good lines from the start, `head` is the hash of the last of them. Of a
    log that is not `intact`, `first_broken_line` (from 1) is where, `fault` what and `why` the same
    for people. "torn": the last line was never finished, as after a crash, and all before it is
    good. "head": the lines are good, but the recorded head is not among them: the end was cut off,
    or the log is another.
    """

    entries: int
    intact: bool
    first_broken_line: int | None
    fault: Fault | None
    why: str
    head: str

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object."""
        return dataclasses.asdict(self)


def sealed(entry: Mapping[str, Any]) -> bytes:
    """The entry as its line, with its hash."""
    return canonical({**entry, "hash": hash_of(entry)}) + b"\n"


def canonical(entry: Mapping[str, Any]) -> bytes:
    """The entry as JSON; the same bytes for the same values."""
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def hash_of(entry: Mapping[str, Any]) -> str:
    """SHA-256 of an entry that has no hash yet."""
    return hashlib.sha256(canonical(entry)).hexdigest()


def parse(line: bytes) -> dict[str, Any] | None:
    """The entry of a line with its newline; None where it is not as it was written."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or set(entry) != FIELDS:
            return None
        unsealed = {key: value for key, value in entry.items() if key != "hash"}
        return entry if sealed(unsealed) == line else None
    except (ValueError, RecursionError):
        return None


def verify_log(path: Path, head: str | None = None) -> AuditReport:
    """Follow the chain from the first line; with `head`, also look for that recorded hash.

    Raises `InputError` where the log cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _follow(file, head)
    except OSError as error:
        raise InputError(
            f"The audit log cannot be read: {(error.strerror or 'unknown reason').lower()}.",
            "Check the path and its permissions.",
        ) from error


def _follow(file: IO[bytes], head: str | None) -> AuditReport:
    previous, number, found = GENESIS, 0, head in (None, GENESIS)
    for line in _lines(file):
        number += 1
        fault, why = _judge(line, number, previous, file)
        if fault:
            return AuditReport(number - 1, False, number, fault, why, previous)
        previous = json.loads(line)["hash"]
        found = found or previous == head
    if not found:
        why = "The recorded head is not in the log: lines are missing at its end, or it is another."
        return AuditReport(number, False, number + 1, "head", why, previous)
    return AuditReport(number, True, None, None, "Every line is as it was written.", previous)


def _judge(line: bytes, number: int, previous: str, file: IO[bytes]) -> tuple[Fault | None, str]:
    entry = parse(line)
    if entry is None:
        if not line.endswith(b"\n") and len(line) < MAX_LINE:
            return "torn", f"Line {number}, the last, was not finished, as after a crash."
        return "changed", f"Line {number} is not as it was written."
    if entry["number"] != number:
        later = any(_number(other) == number for other in _lines(file))
        if later or entry["number"] < number:
            return "reordered", f"Line {number} is entry {entry['number']}: the order was changed."
        return "deleted", f"Line {number} is entry {entry['number']}: lines before it are missing."
    if entry["previous"] != previous:
        return "changed", f"Line {number} does not follow from the line before: one was replaced."
    return None, ""


def _number(line: bytes) -> object:
    entry = parse(line)
    return entry and entry["number"]


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.readline(MAX_LINE), b"")
