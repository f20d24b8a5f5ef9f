"""A bundle whose experts are paged, and peers whose files are mapped, in as little memory.

Each runs alone under the limit; the bundle with the largest budget with which it answers. What
storage had to bring meanwhile is counted: a mapped file's pages by faults, paged experts by reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medmoe_edge.bench.backends import Shape
from medmoe_edge.bench.limits import WAYS, Prefix, find_limit, forget
from medmoe_edge.bench.measurement import (
    Measured,
    Measurement,
    Progress,
    decode_rate,
    find_bundle,
    no_progress,
    prefill_rate,
    shape_of,
)
from medmoe_edge.bench.paging import BUDGETS, expert_budgets
from medmoe_edge.bench.peers import Materials, Peer
from medmoe_edge.bench.process import Worker
from medmoe_edge.bench.timing import Ration
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.embedded import checkpoint_path
from medmoe_edge.errors import ResourceError

MAPPED = ("llama.cpp-q8-0", "llama.cpp-q4-0")  # peers that map their file
ALLOWANCE = 60.0  # seconds in which a contestant's questions begin again
TIMEOUT = 900.0  # seconds: who waits for storage at every token may take that long
NONE = "No limit on memory binds here: none is set with control groups or systemd-run."


@dataclass(frozen=True)
class Limited:
    """One contestant under the limit; or `why` it did not answer.

    `budget` is a bundle's for its experts, and `failed` what came of larger ones; `faults` are
    major ones, and `read` the bytes that came from storage, for each question.
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
class LimitBench:
    """All under `limit` bytes, set by `how`: None where no limit binds, and nothing was run."""

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

    def rates(self, found: Limited) -> tuple[float, float] | None:
        """Tokens per second of its prefill and of its answer."""
        if found.measured is None:
            return None
        return prefill_rate(found.measured, self.shape), decode_rate(found.measured, self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; seconds and bytes."""
        rates = (self.rates(each) or (None, None) for each in self.found)
        found = [
            asdict(each)
            | {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
            for each, (prefill, decode) in zip(self.found, rates, strict=True)
        ]
        return asdict(self) | {"why": self.why, "found": found}


def bench_limited(
    model: str,
    limit: int,
    peers: Sequence[Peer],
    *,
    checkpoint: str | None = None,
    rounds: int = 5,
    progress: Progress = no_progress,
) -> LimitBench:
    """Measure a bundle and peers under a limit in bytes on all of a process's memory.

    Raises `ModelError` for a bundle that cannot be paged, `InputError` for no bundle.
    """
    bundle = find_bundle(model)
    amounts = _budgets(bundle)
    shape, how = shape_of(bundle), find_limit()
    found = []
    if how is not None:
        weights = checkpoint_path(checkpoint) if checkpoint else None
        with WAYS[how](limit) as prefix, Materials(bundle, weights) as materials:
            run = _Run(bundle, materials, prefix, rounds)
            progress(bundle.name, 0, 1 + len(peers))
            found.append(run.ours(amounts))
            for done, peer in enumerate(peers, 1):
                progress(peer.title, done, 1 + len(peers))
                found.append(run.theirs(peer))
    precision = bundle.manifest["quantisation"]["precision"]
    return LimitBench(bundle.name, bundle.sha256, precision, limit, how, shape, tuple(found))


def _budgets(bundle: Bundle) -> list[int]:
    """What to try, in bytes, the most first."""
    _, least, amounts = expert_budgets(bundle, BUDGETS)
    return sorted({least, *amounts}, reverse=True)


class _Run:
    def __init__(self, bundle: Bundle, materials: Materials, prefix: Prefix, rounds: int) -> None:
        self._bundle, self._materials = bundle, materials
        self._prefix, self._rounds = prefix, rounds
        self._shape = shape_of(bundle)

    def ours(self, budgets: Sequence[int]) -> Limited:
        told = Limited(self._bundle.name, f"{self._bundle.name}, experts paged")
        failed: dict[int, str] = {}
        for budget in budgets:
            measurement = Measurement(self._bundle, self._shape, form=f"{budget}B")
            forget(self._bundle.folder)
            try:
                found = self._measure(measurement)
                return replace(told, budget=budget, failed=failed, **found)
            except ResourceError as error:
                failed[budget] = error.what
        return replace(told, failed=failed, why=failed[budgets[-1]])

    def theirs(self, peer: Peer) -> Limited:
        told = Limited(peer.name, peer.title, peer.differences)
        if peer.missing:
            return replace(told, why=f"Not installed: {peer.install}")
        try:
            with TemporaryDirectory() as folder:
                model = self._materials.model(peer, Path(folder))
                forget(model)
                measurement = Measurement(self._bundle, self._shape, peer.kind, model, peer.form)
                return replace(told, **self._measure(measurement))
        except ResourceError as error:
            return replace(told, why=error.what)

    def _measure(self, measurement: Measurement) -> dict[str, Any]:
        ration = Ration(ALLOWANCE)
        with Worker(TIMEOUT, self._prefix) as worker:
            measurement.open(worker)
            before = worker.ask("storage")
            for _ in range(self._rounds):
                ration.take("question", partial(measurement.turn, worker))
            after = worker.ask("storage")
        measured = measurement.result()
        return {"measured": measured, **_each(before, after, measured.seconds["question"].count)}


def _each(
    before: Mapping[str, int | None], after: Mapping[str, int | None], questions: int
) -> dict[str, float | None]:
    """What was counted, by question."""
    pairs = {name: (first, after[name]) for name, first in before.items()}
    return {
        name: None if first is None or last is None else (last - first) / questions
        for name, (first, last) in pairs.items()
    }
