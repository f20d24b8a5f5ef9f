"""A bundle with paged experts, and peers whose files are mapped, under the same memory limit.

Each runs alone under a limit that the kernel holds, so that a mapped file counts as well; the
bundle with the largest budget with which it answers. What storage had to bring meanwhile is
counted: a mapped file's pages by faults, paged experts by reads.

A limit on address space (`ulimit -v`) counts what is mapped and never touched, and Linux heeds none
on resident memory: only a control group binds. One is made beneath this process's own (version 1),
or systemd is asked for a scope (version 2). Whether it binds is tried with a process that asks for
more. Pages of a file are charged to whoever brings them into memory first: what the page cache
holds of a model is let go before its process starts.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.bench import worker
from medmoe_edge.bench.backends import find_bundle, shape_of
from medmoe_edge.bench.measurement import Allowance, Measured, Shape
from medmoe_edge.bench.paging import BUDGETS, expert_budgets
from medmoe_edge.bench.peers import Materials, Peer
from medmoe_edge.bench.worker import Measurement
from medmoe_edge.embedded import checkpoint_path
from medmoe_edge.errors import ResourceError, Told, plain

MAPPED = ("llama.cpp-q8-0", "llama.cpp-q4-0")  # peers that map their file
ALLOWANCE = 60.0  # seconds in which a model's questions are repeated
TIMEOUT = 900.0  # seconds: who waits for storage at every token may take that long
NONE = "No limit on memory binds here: none is set with control groups or systemd-run."
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup/memory")
TRIAL = 128 * 2**20  # bytes, of which a process takes twice as many
JOIN = ("sh", "-c", 'echo $$ > "$0" && exec "$@"')
PATIENCE = 10.0  # seconds for the last page of a group's last process to be given back
Prefix = tuple[str, ...]  # what to put before a command
Ways = Mapping[str, Callable[[int], AbstractContextManager[Prefix]]]  # by a name for people


@dataclass(frozen=True)
class Limited:
    """One model under the limit.

    Attributes:
        budget: A bundle's, in bytes for its experts.
        failed: What came of larger budgets.
        faults: Major page faults, for each question.
        read: Bytes that came from storage, for each question.
        why: Why it did not answer.
    """

    name: str
    title: str
    differences: tuple[str, ...] = ()
    budget: int | None = None
    failed: Mapping[int, str] = field(default_factory=dict)
    measured: Measured | None = None
    faults: float | None = None
    read: float | None = None
    why: str = ""


@dataclass(frozen=True)
class LimitBench(Told):
    """All under `limit` bytes, set by `how`: None where no limit binds, and nothing was run."""

    TOLD = ("why",)

    model: str
    sha256: str
    precision: str
    limit: int
    how: str | None
    shape: Shape
    found: tuple[Limited, ...]

    @property
    def why(self) -> str | None:
        """What stood against it, in words."""
        return None if self.how else NONE

    def rates(self, found: Limited) -> tuple[float | None, float | None]:
        """Tokens per second of its prefill and of its answer."""
        if found.measured is None:
            return None, None
        return found.measured.prefill_rate(self.shape), found.measured.decode_rate(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; seconds and bytes."""
        names = ("prefill_tokens_per_second", "decode_tokens_per_second")
        found = [
            plain(each) | dict(zip(names, self.rates(each), strict=True)) for each in self.found
        ]
        return super().to_json() | {"found": found}


def bench_limited(
    model: str,
    limit: int,
    peers: Sequence[Peer],
    *,
    checkpoint: str | None = None,
    rounds: int = 5,
    ways: Ways | None = None,
    progress: Progress = no_progress,
) -> LimitBench:
    """Measure a bundle and peers under a limit on all of a process's memory.

    Args:
        model: A bundle whose experts can be paged.
        limit: Bytes.
        peers: What is measured beside it.
        checkpoint: What peers load; random weights of the same shapes by default.
        rounds: Turns of each, or fewer if they take long.
        ways: How a limit may be set; `WAYS` by default.
        progress: Told of each model.

    Returns:
        All under the limit; nothing was run where no limit binds.

    Raises:
        ModelError: The bundle cannot be paged.
        InputError: It is no bundle.
    """
    bundle = find_bundle(model)
    _, least, amounts = expert_budgets(bundle, BUDGETS)
    ways = WAYS if ways is None else ways
    shape, how = shape_of(bundle), find_limit(ways)
    found = []
    if how is not None:
        weights = checkpoint_path(checkpoint) if checkpoint else None
        with ways[how](limit) as prefix, Materials(bundle, weights) as materials:
            run = _Run(materials, shape, prefix, rounds)
            progress(bundle.name, 0, 1 + len(peers))
            found.append(run.ours(sorted({least, *amounts}, reverse=True)))
            for done, peer in enumerate(peers, 1):
                progress(peer.title, done, 1 + len(peers))
                found.append(run.theirs(peer))
    precision = bundle.manifest["quantisation"]["precision"]
    return LimitBench(bundle.name, bundle.sha256, precision, limit, how, shape, tuple(found))


@dataclass(frozen=True)
class _Run:
    materials: Materials
    shape: Shape
    prefix: Prefix
    rounds: int

    def ours(self, budgets: Sequence[int]) -> Limited:
        """The bundle, with the first of the budgets with which it answers."""
        bundle = self.materials.bundle
        told = Limited(bundle.name, f"{bundle.name}, experts paged")
        failed: dict[int, str] = {}
        for budget in budgets:
            forget(bundle.folder)
            try:
                found = self._measure(Measurement(bundle, self.shape, form=f"{budget}B"))
                return replace(told, budget=budget, failed=failed, **found)
            except ResourceError as error:
                failed[budget] = error.what
        return replace(told, failed=failed, why=failed[budgets[-1]])

    def theirs(self, peer: Peer) -> Limited:
        """A peer."""
        told = Limited(peer.name, peer.title, peer.differences)
        if peer.missing:
            return replace(told, why=f"Not installed: {peer.install}")
        bundle = self.materials.bundle
        try:
            with TemporaryDirectory() as folder:
                model = self.materials.model(peer, Path(folder))
                forget(model)
                measurement = Measurement(bundle, self.shape, peer.kind, model, peer.form)
                return replace(told, **self._measure(measurement))
        except ResourceError as error:
            return replace(told, why=error.what)

    def _measure(self, measurement: Measurement) -> dict[str, Any]:
        allowance = Allowance(ALLOWANCE)
        with worker.Worker(TIMEOUT, self.prefix) as own:
            measurement.open(own)
            before = own.ask("storage")
            for _ in range(self.rounds):
                allowance.take("question", partial(measurement.turn, own))
            after = own.ask("storage")
        measured = measurement.result()
        questions = measured.seconds["question"].count
        each = {
            name: None if first is None else (after[name] - first) / questions
            for name, first in before.items()
        }
        return {"measured": measured, **each}


@contextmanager
def control_group(
    limit: int, membership: Path = MEMBERSHIP, groups: Path = GROUPS
) -> Iterator[Prefix]:
    """A group of version 1 for processes of `limit` bytes together; raises `OSError`."""
    lines = (line.split(":", 2) for line in membership.read_text().splitlines())
    own = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
    if not own:
        raise FileNotFoundError(f"{membership} names no such controller")
    group = groups / own[0].lstrip("/") / f"medmoe-edge-{os.getpid()}"
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


WAYS: Ways = {
    "a control group": control_group,
    "a scope of systemd's": systemd_scope,
}


def find_limit(ways: Ways = WAYS) -> str | None:
    """Which of the ways binds on this machine; None where none does."""
    for name, way in ways.items():
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
