"""The audit log: who asked which model what, and what it answered; append-only and hash-chained.

It holds no pixels, no names of files and nothing of a DICOM header: the input is named by its
SHA-256. Several threads and processes may write one log. `audit_chain` has the format.
"""

import datetime
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from medmoe_edge.bedside.audit.chain import GENESIS, MAX_LINE, parse, sealed
from medmoe_edge.errors import DataError, InputError, ResourceError

log = logging.getLogger(__name__)


class AuditLog:
    """An audit log at `path`, made with the first entry; only its owner may read it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # A lock of the system's, which ends with its process; never a file that a crash leaves.
        self._lock = FileLock(f"{self.path}.lock", mode=0o600, fallback_to_soft=False)

    def append(
        self,
        *,
        who: str,
        event: str,
        model: Mapping[str, Any],
        question: str,
        answer: str,
        input_sha256: str,
    ) -> None:
        """Write one entry; on return it is on the disk.

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
        try:
            with self._lock, self._opened() as file:
                number, previous = _last(file)
                line = sealed({**entry, "number": number + 1, "previous": previous})
                if len(line) >= MAX_LINE:
                    raise InputError("An audit entry is too long.", "Ask a shorter question.")
                _write(file, line)
        except OSError as error:
            raise ResourceError(
                f"The audit log cannot be written ({error.strerror or type(error).__name__}).",
                "Free some space or check its permissions; nothing is answered unaudited.",
            ) from error

    def _opened(self) -> IO[bytes]:
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        if is_new and os.name == "posix":  # elsewhere folders cannot be opened
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return os.fdopen(descriptor, "r+b", buffering=0)


def _last(file: IO[bytes]) -> tuple[int, str]:
    """The number and hash of the last entry; the file then ends with it."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - 2 * MAX_LINE)
    file.seek(start)
    lines = file.read(end - start).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < MAX_LINE:
        log.warning("The audit log ended in an unfinished line, as after a crash: it is cut off.")
        end -= len(lines.pop())
        file.truncate(end)
    file.seek(end)
    if end == 0:
        return 0, GENESIS
    entry = parse(lines[-1])
    if entry is None:
        raise DataError(
            "The audit log's last line is not as it was written.",
            "See: medmoe-edge audit verify; then keep that log and begin another.",
        )
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
