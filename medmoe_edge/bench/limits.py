"""Memory that is really limited: by the kernel, so that a mapped file counts as well.

A limit on address space (`ulimit -v`) counts what is mapped and never touched, and Linux heeds none
on resident memory: only a control group binds. One is made beneath this process's own (version 1),
or systemd is asked for a scope (version 2). Whether it binds is tried with a process that asks for
more.

Pages of a file are charged to whoever brings them into memory first: what the page cache holds of a
model is let go before its process starts.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup/memory")
TRIAL = 128 * 2**20  # bytes, of which a process takes twice as many
JOIN = ("sh", "-c", 'echo $$ > "$0" && exec "$@"')
PATIENCE = 10.0  # seconds for the last page of a group's last process to be given back
Prefix = tuple[str, ...]  # what to put before a command


@contextmanager
def control_group(limit: int) -> Iterator[Prefix]:
    """A group of version 1 for processes of `limit` bytes together; raises `OSError`."""
    lines = (line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines())
    own = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
    if not own:
        raise FileNotFoundError(f"{MEMBERSHIP} names no such controller")
    group = GROUPS / own[0].lstrip("/") / f"medmoe-edge-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield (*JOIN, str(group / "cgroup.procs"))
    finally:
        _remove(group)


@contextmanager
def systemd_scope(limit: int) -> Iterator[Prefix]:
    """A transient scope of systemd's, of the system for root and of the user for others."""
    program = shutil.which("systemd-run")
    if program is None:
        raise FileNotFoundError("systemd-run")
    whose = () if os.geteuid() == 0 else ("--user",)
    properties = ("-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0")
    yield (program, *whose, "--scope", "--quiet", "--collect", *properties, "--")


WAYS: dict[str, Callable[[int], AbstractContextManager[Prefix]]] = {
    "a control group": control_group,
    "a scope of systemd's": systemd_scope,
}


def find_limit() -> str | None:
    """Which of `WAYS` binds on this machine; None where none does."""
    for name, way in WAYS.items():
        with contextlib.suppress(OSError), way(TRIAL) as prefix:
            if _takes(prefix, TRIAL // 4) and not _takes(prefix, 2 * TRIAL):
                return name
    return None


def forget(path: Path) -> None:
    """Have the page cache let go of a file, or of all in a folder."""
    for file in path.iterdir() if path.is_dir() else (path,):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only what is on storage can be let go
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _takes(prefix: Prefix, count: int) -> bool:
    """Whether a process under the limit gets so many bytes."""
    code = f"b'1' * {count}"
    command = [*prefix, sys.executable, "-S", "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode == 0


def _remove(group: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            group.rmdir()
        except OSError:  # busy: a process that was killed is not gone yet
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return
