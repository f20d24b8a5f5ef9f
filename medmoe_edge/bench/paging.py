"""Experts paged at several budgets, beside all of them in memory.

At each budget three processes are asked the same in turns: one with all experts resident, one that
pages and fetches ahead, one that pages when it must. Modalities go round, two questions each: the
first is a switch, the second the same again. The kernel's page cache holds the bundle all along,
unless pages are dropped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from medmoe_edge.bench.asking import Asking
from medmoe_edge.bench.measurement import Progress, find_bundle, no_progress
from medmoe_edge.bench.process import Worker
from medmoe_edge.bench.timing import Ration, Spread
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.runtimes.ort.paged import OrtExpertStore
from medmoe_edge.runtimes.paging.pager import least_budget
from medmoe_edge.runtimes.paging.prediction import budget_bytes

BUDGETS = ("100%", "75%", "50%", "25%")
ALLOWANCE = 120.0  # seconds in which a budget's rounds begin again
COUNTED = ("hits", "late", "misses", "loads", "bytes_read", "stall")
WAYS: Mapping[str, bool] = {"resident": True, "prefetch": True, "on_demand": False}


@dataclass(frozen=True)
class Cost:
    """Questions of one kind: seconds of a whole one, and the means of what paging reports."""

    seconds: Spread
    paging: Mapping[str, float]

    @classmethod
    def of(cls, answers: Sequence[Mapping[str, Any]]) -> "Cost":
        """Of one answer at least."""
        reports = [answer["paging"] for answer in answers if answer["paging"]]
        means = {
            name: fmean(report[name] for report in reports) for name in COUNTED if len(reports)
        }
        return cls(Spread.of(answer["seconds"] for answer in answers), means)


@dataclass(frozen=True)
class Held:
    """One process: its seconds and bytes (see `Measured`), and its questions' costs.

    `load` until it had answered once; `same` are questions after one about the same modality,
    `switch` those after another's.
    """

    load: float
    loading: int | None
    peak: int | None
    resident: int | None
    same: Cost
    switch: Cost


@dataclass(frozen=True)
class AtBudget:
    """All three at one budget of `bytes`; `changed` of all answers are not the resident ones."""

    budget: str
    bytes: int
    held: Mapping[str, Held]
    answers: int
    changed: int

    @property
    def same_ratio(self) -> float:
        """A question of the same modality, over a resident one."""
        return _seconds(self.held["prefetch"].same) / _seconds(self.held["resident"].same)

    @property
    def switch_ratio(self) -> float:
        """The first question after a switch, over a resident one."""
        return _seconds(self.held["prefetch"].switch) / _seconds(self.held["resident"].switch)

    @property
    def prefetch_gain(self) -> float:
        """How many times as fast the first question after a switch is with prefetch."""
        held = self.held
        return _seconds(held["on_demand"].switch) / _seconds(held["prefetch"].switch)

    @property
    def saved(self) -> int | None:
        """Bytes by which the peak lies below the resident one; None off Linux."""
        resident, paged = self.held["resident"].peak, self.held["prefetch"].peak
        return None if resident is None or paged is None else resident - paged

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; seconds and bytes."""
        return asdict(self) | {
            "same_ratio": self.same_ratio,
            "switch_ratio": self.switch_ratio,
            "prefetch_gain": self.prefetch_gain,
            "saved": self.saved,
        }


@dataclass(frozen=True)
class PagingBench:
    """A bundle's paging: `expert_bytes` of all routed experts in memory, and what was asked.

    `share` of a question's tokens went to the expert that got most, the mean over questions.
    """

    model: str
    sha256: str
    precision: str
    expert_bytes: int
    asking: Asking
    modalities: int
    share: float
    budgets: tuple[AtBudget, ...]

    @property
    def differences(self) -> tuple[str, ...]:
        """What is not as it would be for a user."""
        cached = (
            "the page cache is made to forget experts, so that loads wait for storage"
            if self.asking.drop_pages
            else "the page cache holds the bundle, so that no load waits for storage"
        )
        if self.asking.data is not None:
            return (cached,)
        steered = "tokens carry a direction that every router reads as one expert of the modality's"
        follow = f"{self.asking.follow:.0%} of tokens follow it"
        return (f"routing is synthetic: {steered}; {follow}", "images are noise", cached)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; seconds and bytes."""
        return asdict(self) | {
            "budgets": [budget.to_json() for budget in self.budgets],
            "differences": list(self.differences),
        }


def bench_paging(
    model: str = "nano",
    *,
    budgets: Sequence[str] = BUDGETS,
    asking: Asking | None = None,
    rounds: int = 5,
    progress: Progress = no_progress,
) -> PagingBench:
    """Measure a bundle's paging at these budgets, each raised to the least that works.

    Raises `ModelError` for a bundle that cannot be paged, `InputError` for what is no budget,
    `DataError` for questions of fewer than two modalities.
    """
    bundle, asking = find_bundle(model), asking or Asking()
    experts = expert_budgets(bundle, budgets)
    modalities = asking.modalities(bundle)
    found, shares = [], []
    for done, (budget, amount) in enumerate(zip(budgets, experts.amounts, strict=True)):
        progress(f"experts at {budget}", done, len(budgets))
        run = _Run(bundle, amount, asking, modalities)
        run.measure(rounds)
        found.append(run.result(budget))
        shares += [answer["share"] for answer in run.answers["resident"]]
    return PagingBench(
        bundle.name,
        bundle.sha256,
        bundle.manifest["quantisation"]["precision"],
        experts.total,
        asking,
        modalities,
        fmean(shares),
        tuple(found),
    )


class ExpertBudgets(NamedTuple):
    """Bytes: of all routed experts, the least with which the bundle answers, and some budgets."""

    total: int
    least: int
    amounts: tuple[int, ...]


def expert_budgets(bundle: Bundle, budgets: Iterable[str]) -> ExpertBudgets:
    """Budgets as they are written, in bytes for this bundle, each raised to the least possible."""
    store, moe = OrtExpertStore(bundle), bundle.config.moe
    assert moe is not None
    total, least = sum(store.sizes.values()), least_budget(store, moe.top_k)
    amounts = tuple(max(budget_bytes(budget, total), least) for budget in budgets)
    return ExpertBudgets(total, least, amounts)


class _Run:
    """One budget."""

    def __init__(self, bundle: Bundle, amount: int, asking: Asking, modalities: int) -> None:
        self.amount, self._modalities = amount, modalities
        self._opening = {"path": str(bundle.folder.resolve()), "asking": asdict(asking)}
        self._opened: dict[str, Mapping[str, Any]] = {}
        self._memory: dict[str, Mapping[str, int | None]] = {}
        self.answers: dict[str, list[Mapping[str, Any]]] = {way: [] for way in WAYS}

    def measure(self, rounds: int) -> None:
        """Ask in turns: once about each modality to warm up, then so many rounds of two each."""
        with Worker() as resident, Worker() as prefetch, Worker() as on_demand:
            workers = dict(zip(WAYS, (resident, prefetch, on_demand), strict=True))
            for way, worker in workers.items():
                budget = None if way == "resident" else self.amount
                self._opened[way] = worker.ask(
                    "open_asker", budget=budget, prefetch=WAYS[way], **self._opening
                )
                for modality in range(self._modalities):
                    worker.ask("ask_about", modality=modality, number=0)
            ration = Ration(ALLOWANCE)
            for number in range(rounds):
                ration.take("round", partial(self._round, workers, 2 * number))
            self._memory = {way: worker.ask("memory") for way, worker in workers.items()}

    def _round(self, workers: Mapping[str, Worker], first: int) -> None:
        for modality in range(self._modalities):
            for number in (first, first + 1):
                for way, worker in workers.items():
                    answer = worker.ask("ask_about", modality=modality, number=number)
                    self.answers[way].append(answer)

    def result(self, budget: str) -> AtBudget:
        """What came of it."""
        wanted = [_told(answer) for answer in self.answers["resident"]]
        paged = [
            zip(wanted, map(_told, self.answers[way]), strict=True)
            for way in WAYS
            if way != "resident"
        ]
        same = [one == other for pairs in paged for one, other in pairs]
        held = {way: self._held(way) for way in WAYS}
        return AtBudget(budget, self.amount, held, len(same), same.count(False))

    def _held(self, way: str) -> Held:
        opened, memory, answers = self._opened[way], self._memory[way], self.answers[way]
        return Held(
            opened["load"],
            opened["peak"],
            memory["peak"],
            memory["resident"],
            Cost.of(answers[1::2]),
            Cost.of(answers[::2]),
        )


def _told(answer: Mapping[str, Any]) -> tuple[str, float]:
    """What must not depend on paging, to the last bit."""
    return answer["answer"], answer["confidence"]


def _seconds(cost: Cost) -> float:
    return cost.seconds.median
