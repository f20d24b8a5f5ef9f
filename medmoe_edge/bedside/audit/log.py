"""The audit log: who asked which model what, and what it answered; written, verified and sent on.

It holds no pixels, no names of files and nothing of a DICOM header: the input is named by its
SHA-256. Several threads and processes may write one log.

Each line is one JSON object in canonical form (sorted keys, no spaces, ASCII):

    number         from 1
    time           UTC, ISO 8601; what the clock said, which may jump: order is the number's
    who, event, model, question, answer, input_sha256
    previous       the hash of the line before; 64 zeros in the first
    hash           SHA-256 of the same object without `hash`

`event` is "accepted" for a question before its first word is told, then "ask" with the whole
answer, or "aborted" with what was told of it; "classify", "locate" and "answer" (of the DICOM node)
stand alone, and before what they record. "restore" tells of a backup that was brought back.

A changed, missing or moved line breaks the chain. Nothing in it is secret: who can write the file
can also write a whole new one, or cut off its end. Against that the head (the last line's hash) is
kept in a second place, the user's state folder, where `verify_log` looks for it; or `ship` the log
to another machine, and give `verify_log` the head.

Messages to a collector are those of RFC 5424 with the log's line as their text, in the frames of
RFC 5425 (syslog over TLS). What was sent is remembered beside the log, in `LOG.shipped`, so that
the next run goes on behind it. Syslog confirms nothing: a line counts as sent once the connection
has taken it, and a connection that breaks loses what was still under way. The lines carry numbers
and a chain of hashes, so the collector sees what is missing.
"""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import platformdirs
from filelock import FileLock, Timeout

from medmoe_edge.atomic import atomic_file, sync_folder, writing
from medmoe_edge.errors import DataError, InputError, ResourceError, is_host, unreadable

log = logging.getLogger(__name__)
GENESIS = "0" * 64
MAX_LINE = 2**20  # bytes; a question has at most 10,000 characters
LOCK_SECONDS = 60  # that an entry waits for those of other processes
BEGINNING = b'{"answer":'  # of every line, whose keys are sorted

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
    """Follow the chain from the first line, and look for a recorded head in it.

    `head` is the hash of a line that must be there; None is the last head that was written on this
    machine, if it is known. Raises `InputError` where the log cannot be read.
    """
    if head is None:
        kept = kept_head(path)
        head = kept and kept[1]
    try:
        with path.open("rb") as file:
            return _follow(file, head)
    except OSError as error:
        raise InputError(*unreadable(f"The audit log {path}", error)) from error


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
        why = (
            "The recorded head is not in the log: lines are missing at its end, or it is another. "
            f"Heads are kept under {head_file(Path()).parent}."
        )
        return AuditReport(number, False, number + 1, "head", why, previous)
    return AuditReport(number, True, None, None, "Every line is as it was written.", previous)


def _judge(line: bytes, number: int, previous: str, file: IO[bytes]) -> tuple[Fault | None, str]:
    entry = parse(line)
    if entry is None:
        if not line.endswith(b"\n") and len(line) < MAX_LINE:
            return "torn", f"Line {number}, the last, was not finished, as after a crash."
        return "changed", f"Line {number} is not as it was written."
    if entry["number"] != number:
        later = any((parse(other) or {}).get("number") == number for other in _lines(file))
        if later or entry["number"] < number:
            return "reordered", f"Line {number} is entry {entry['number']}: the order was changed."
        return "deleted", f"Line {number} is entry {entry['number']}: lines before it are missing."
    if entry["previous"] != previous:
        return "changed", f"Line {number} does not follow from the line before: one was replaced."
    return None, ""


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.readline(MAX_LINE), b"")


def head_file(path: Path) -> Path:
    """Where the head of a log is kept apart from it: in the user's state folder."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return platformdirs.user_state_path("medmoe-edge") / "audit-heads" / f"{name}.json"


def kept_head(path: Path) -> tuple[int, str] | None:
    """Number and hash of the last line that this machine wrote to a log; None if not known."""
    try:
        found = json.loads(head_file(path).read_bytes())
        return int(found["number"]), str(found["hash"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _keep_head(path: Path, number: int, value: str) -> None:
    file = head_file(path)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(file) as part:
            part.write(json.dumps({"number": number, "hash": value}).encode())
    except OSError as error:
        log.warning(
            "The audit log's head cannot be kept apart from it (%s): a cut end would go unnoticed.",
            error.strerror or type(error).__name__,
        )


class AuditLog:
    """An audit log at `path`, made with the first entry; only its owner may read it.

    Raises `InputError` where its folder is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            what = f"{self.path.parent}, where the audit log is to be, is not a folder."
            raise InputError(what, "Make it first, or choose another.")
        # A lock of the system's, which ends with its process; never a file that a crash leaves.
        self._lock = FileLock(f"{self.path}.lock", LOCK_SECONDS, 0o600, fallback_to_soft=False)
        self._missing: str | None = None  # a kept head that is not in it, as was said

    @property
    def files(self) -> tuple[Path, ...]:
        """The log, and what lies beside it."""
        return self.path, Path(self._lock.lock_file), _shipped(self.path)

    def append(
        self,
        *,
        who: str,
        event: str,
        model: Mapping[str, Any],
        question: str,
        answer: str,
        input_sha256: str,
        is_head: bool = False,
    ) -> None:
        """Write one entry; on return it is on the disk.

        With `is_head` it becomes the head that is kept, whatever that was before.

        An unfinished last line, which a crash left, is cut off first: its writer was never told
        that it was kept. Raises `InputError` for an entry over 1 MiB, `DataError` where the log's
        last line was changed and `ResourceError` where the disk does not take the entry; the log is
        then as it was.
        """
        entry = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(),
            "who": who,
            "event": event,
            "model": dict(model),
            "question": question,
            "answer": answer,
            "input_sha256": input_sha256,
        }
        with self._opened() as file:
            number, previous = _last(file)
            line = sealed({**entry, "number": number + 1, "previous": previous})
            if len(line) >= MAX_LINE:
                raise InputError("An audit entry is too long.", "Ask a shorter question.")
            _write(file, line)
            if is_head or self._has_kept_head(file, number, previous):
                _keep_head(self.path, number + 1, json.loads(line)["hash"])

    def record_restore(self, backup_sha256: str, *, is_restored: bool) -> None:
        """Write an entry about a backup that is being restored; raises what `append` does.

        Where the log itself is from it (`is_restored`), it may be older than the head that was
        kept, which the entry tells of, and from here on the head is this entry.
        """
        kept = kept_head(self.path)
        text = "A backup was restored."
        if is_restored and kept is not None:
            text += f" The last entry written here before was {kept[0]}, {kept[1]}."
        self.append(
            who="restore",
            event="restore",
            answer=text,
            model={},
            question="",
            input_sha256=backup_sha256,
            is_head=is_restored,
        )

    def check(self) -> None:
        """Raise `ResourceError` unless the next entries could be written."""
        try:
            with self._opened() as file:
                _last(file)
                room = shutil.disk_usage(self.path.parent).free
        except DataError as error:
            raise ResourceError(error.what, error.remedy) from error
        if room < MAX_LINE:
            raise _unwritable("the disk is full")

    def _has_kept_head(self, file: IO[bytes], number: int, previous: str) -> bool:
        """Whether the head that was kept is in the log; one that is not proves that lines are gone.

        `number` and `previous` are of the entry before the new one.
        """
        kept = kept_head(self.path)
        if kept in (None, (number, previous)):
            return True
        assert kept is not None
        if kept[1] == self._missing:  # nothing is added before what is there
            return False
        file.seek(0)
        holds = any((parse(each) or {}).get("hash") == kept[1] for each in _lines(file))
        file.seek(0, os.SEEK_END)
        if holds:
            return True
        self._missing = kept[1]
        log.error(
            "The audit log has %d entries and not the last one that was written here, %d: "
            "its end was cut off, or it is another log.",
            *(number, kept[0]),
        )
        return False

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The log, for nobody else meanwhile; what the system refuses is a `ResourceError`."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        if not self.path.parent.is_dir():  # which the lock would make anew
            raise _unwritable("its folder is gone")
        try:
            with self._lock:
                is_new = not self.path.exists()
                descriptor = os.open(self.path, flags, 0o600)
                if is_new:
                    sync_folder(self.path.parent)
                if os.name == "posix" and stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
                    os.fchmod(descriptor, 0o600)  # whoever made it
                with os.fdopen(descriptor, "r+b", buffering=0) as file:
                    yield file
        except Timeout as error:
            what = f"Another process has held the audit log for {LOCK_SECONDS} s."
            raise ResourceError(what, "End it; nothing is answered unaudited.") from error
        except OSError as error:
            raise _unwritable(error.strerror or type(error).__name__) from error


def _unwritable(why: str) -> ResourceError:
    return ResourceError(
        f"The audit log cannot be written ({why}).",
        "Free some space, check its folder and permissions; nothing is answered unaudited.",
    )


def _last(file: IO[bytes]) -> tuple[int, str]:
    """The number and hash of the last entry; the file then ends with it."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - 2 * MAX_LINE)
    file.seek(start)
    lines = file.read(end - start).splitlines(keepends=True)
    is_torn = bool(lines) and not lines[-1].endswith(b"\n") and len(lines[-1]) < MAX_LINE
    torn = lines.pop() if is_torn else b""
    entry = parse(lines[-1]) if lines else None
    if entry is None and (lines or not torn.startswith(BEGINNING[: len(torn)])):
        raise DataError(  # before anything is cut off: it may be another file
            "The audit log's last line is not as it was written.",
            "See: medmoe-edge audit verify; then keep that log, and begin one of another name.",
        )
    if torn:
        end -= len(torn)
        file.truncate(end)
        log.warning("The audit log ended in an unfinished line, as after a crash: it is cut off.")
    file.seek(end)
    if entry is None:
        return 0, GENESIS
    return int(entry["number"]), str(entry["hash"])


def _write(file: IO[bytes], line: bytes) -> None:
    end = file.tell()
    try:
        if file.write(line) != len(line):
            raise OSError("the disk is full")
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


PRIORITY = 13 * 8 + 6  # facility "log audit", severity "informational"
PORT = 6514  # of syslog over TLS
PAUSE = 1.0  # seconds until the log is looked at again
PATIENCE = 10.0  # seconds for the collector to answer


@dataclass(frozen=True)
class Collector:
    """Where a log is sent.

    Attributes:
        host: A name that the collector's certificate is for.
        port: Its port.
        authority: PEM of whom its certificate is from; None is whom this machine trusts.
        certificate: PEM of this machine's own, where the collector asks for one.
        key: PEM of its key.
    """

    host: str
    port: int = PORT
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def at(cls, place: str, **files: Path | None) -> "Collector":
        """From `HOST`, `HOST:PORT` or `[ADDRESS]:PORT`; raises `InputError`."""
        host, colon, port = place.rpartition(":")
        if not colon or place.endswith("]"):
            host, port = place, str(PORT)
        if not is_host(host.strip("[]")) or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"{place!r} is not HOST or HOST:PORT.", f"Syslog's is {PORT}.")
        return cls(host.strip("[]"), int(port), **files)

    @contextlib.contextmanager
    def connected(self) -> Iterator[ssl.SSLSocket]:
        """A connection; raises `InputError` for files of no use, and `ResourceError`."""
        try:
            context = ssl.create_default_context(cafile=self.authority)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The certificates cannot be used ({type(error).__name__}).", "Give PEM files."
            ) from error
        with contextlib.ExitStack() as stack:
            with self.reached():
                plain = socket.create_connection((self.host, self.port), PATIENCE)
                stack.enter_context(plain)
                connection = context.wrap_socket(plain, server_hostname=self.host)
                stack.enter_context(connection)
            connection.settimeout(PATIENCE)
            yield connection
            with contextlib.suppress(OSError):  # it may just close
                connection.unwrap()  # or closing would throw away what is under way

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Around what is done with a connection: its errors as ours."""
        try:
            yield
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ResourceError(
                f"The collector {self.host}, port {self.port}, takes no entries ({why}).",
                "Check its address and its certificate; what was not sent is sent next time.",
            ) from error


def ship(path: Path, collector: Collector, *, follow: bool = False) -> int:
    """Send what was not sent yet to a collector; how many lines that were.

    With `follow` it waits for further ones, until a signal ends it. Raises `InputError` for a log
    or a certificate that cannot be read, `DataError` where the log does not go on from what was
    sent, as it was cut, changed or replaced, and `ResourceError` where the collector cannot be
    reached, or the disk does not take what was sent.
    """
    sent = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(*unreadable(f"The audit log {path}", error)) from error
    with file, collector.connected() as connection:
        number, head = _skip(file, path)
        known = ""  # of the last line that was sent
        while True:
            with collector.reached():
                _check_open(connection)
            for line in _whole_lines(file):
                entry = parse(line)
                if entry is None or (entry["number"], entry["previous"]) != (number + 1, head):
                    raise _broken(number + 1)
                with collector.reached():
                    connection.sendall(_frame(line, str(entry["time"])))
                number, head = entry["number"], entry["hash"]
                sent += 1
            if known != head:
                shipped, known = _shipped(path), head
                with writing(shipped), atomic_file(shipped) as told:
                    told.write(json.dumps({"number": number, "hash": head}).encode())
            if not follow:
                return sent
            time.sleep(PAUSE)
            if not _is_at(path, file):
                raise _broken(number + 1)


def _check_open(connection: ssl.SSLSocket) -> None:
    """Raise `OSError` where the collector has closed it: it would take a line, and lose it."""
    connection.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        if not connection.recv(2**16):  # what it may say is nothing to us
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
    connection.settimeout(PATIENCE)


def _skip(file: IO[bytes], path: Path) -> tuple[int, str]:
    """Read on to behind the last line that was sent; its number and hash."""
    try:
        told = json.loads(_shipped(path).read_bytes())
        number, head = int(told["number"]), str(told["hash"])
    except FileNotFoundError:
        return 0, GENESIS
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{_shipped(path)} does not say what was sent.", "Remove it to send the whole log."
        ) from error
    for _ in range(number):
        line = file.readline(MAX_LINE)
    entry = parse(line) if number else None
    if number and (entry is None or entry["hash"] != head):
        raise _broken(number)
    return number, head


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open log is still the one at that path, and what was read of it is there."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file.fileno())) and there.st_size >= file.tell()


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines from here on; one that is being written is left for the next time."""
    while line := file.readline(MAX_LINE):
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line


def _frame(line: bytes, when: str) -> bytes:
    stamp = datetime.datetime.fromisoformat(when).astimezone(datetime.UTC)
    name = socket.gethostname().encode("ascii", errors="ignore").decode()
    host = "".join(mark for mark in name if mark.isprintable() and mark != " ")[:255] or "-"
    head = f"<{PRIORITY}>1 {stamp:%Y-%m-%dT%H:%M:%S.%fZ} {host} medmoe-edge {os.getpid()} audit - "
    message = head.encode("ascii") + line.rstrip(b"\n")
    return b"%d %s" % (len(message), message)


def _shipped(path: Path) -> Path:
    return path.with_name(f"{path.name}.shipped")


def _broken(number: int) -> DataError:
    return DataError(
        f"The audit log does not go on at entry {number} from what was sent before.",
        "See: medmoe-edge audit verify; keep the log as it is, and find out who could write it.",
    )
