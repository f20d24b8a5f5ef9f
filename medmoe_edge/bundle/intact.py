"""Large files that were found intact before, so that gigabytes are not hashed at every start.

A file counts as unchanged while its size, its times, and its place on the disk are those of when it
was hashed last; its `ctime` is set by every write and by no user. A file that was written in the
very seconds before it was hashed is not trusted, since a later write could leave the same times
(git's index has the same rule, and calls such files racy). What the disk itself loses goes
unnoticed until the record is removed; of an expert, until it is paged in.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from medmoe_edge.atomic import atomic_file

LARGE = 2**26  # bytes; smaller files are hashed faster than looked up
SETTLED = 2_000_000_000  # nanoseconds without a write


def was_intact(path: Path, sha256: str) -> bool:
    """Whether the file, as it is now, was found to have this hash before."""
    seen = path.stat()
    return seen.st_size >= LARGE and _read(_record(path)) == _state(seen, sha256)


def remember_intact(path: Path, sha256: str) -> None:
    """Keep in the user's cache that the file has this hash, if it is large and not just written.

    Where the cache cannot be written, the file is hashed again next time.
    """
    seen = path.stat()
    if seen.st_size < LARGE or time.time_ns() - seen.st_ctime_ns < SETTLED:
        return
    record = _record(path)
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(record) as file:
            file.write(json.dumps(_state(seen, sha256)).encode())


def _state(seen: os.stat_result, sha256: str) -> list[str | int]:
    times = (seen.st_mtime_ns, seen.st_ctime_ns)
    return [sha256, seen.st_size, *times, seen.st_ino, seen.st_dev]


def _record(path: Path) -> Path:
    import platformdirs  # a small model never needs it

    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return platformdirs.user_cache_path("medmoe-edge") / "intact" / f"{name}.json"


def _read(record: Path) -> object:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(record.read_bytes())
    return None
