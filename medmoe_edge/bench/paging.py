"""Experts paged within a budget: what it costs, and whether it holds for many questions.

At each budget three processes take turns: with all experts in memory, paging ahead, paging when it
must. Of each modality two questions are asked in a row: the first is a switch, the second the same
again. The page cache holds the bundle all along, unless pages are dropped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from medmoe_edge._types import Progress, no_progress, there
from medmoe_edge.bench import worker
from medmoe_edge.bench.backends import find_bundle
from medmoe_edge.bench.measurement import Allowance, Spread
from medmoe_edge.bench.routing import VARIANTS, Asking
from medmoe_edge.bench.worker import Worker
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.errors import Told
from medmoe_edge.runtimes.ort.paged import OrtExpertStore
from medmoe_edge.runtimes.paging.pager import least_budget
from medmoe_edge.runtimes.paging.prediction import budget_bytes

BUDGETS = ("100%", "75%", "50%", "25%")
ALLOWANCE = 120.0  # seconds in which a budget's rounds are repeated
COUNTED = ("hits", "late", "misses", "loads", "bytes_read", "stall")
WAYS: Mapping[str, bool] = {"resident": True, "prefetch": True, "on_demand": False}
SOAK_BUDGET = "50%"
SETTLED = 200  # questions, after which memory must not grow
EVERY = 100  # questions between two looks at it


@dataclass(frozen=True)
class Cost:
    """Questions of one kind: seconds of a whole one, and the means of what paging reports."""

    seconds: Spread
    paging: Mapping[str, float]

    @classmethod
    def of(cls, answers: Sequence[Mapping[str, Any]]) -> "Cost":
        """Of one answer at least."""
        reports = [answer["paging"] for answer in answers if answer["paging"]]
        means = {name: fmean(told[name] for told in reports) for name in COUNTED if reports}
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
class AtBudget(Told):
    """All three at one budget of `bytes`; `changed` of all answers are not the resident ones."""

    TOLD = ("same_ratio", "switch_ratio", "prefetch_gain", "saved")

    budget: str
    bytes: int
    held: Mapping[str, Held]
    answers: int
    changed: int

    @property
    def same_ratio(self) -> float:
        """A question of the same modality, over a resident one."""
        return self._median("prefetch", "same") / self._median("resident", "same")

    @property
    def switch_ratio(self) -> float:
        """The first question after a switch, over a resident one."""
        return self._median("prefetch", "switch") / self._median("resident", "switch")

    @property
    def prefetch_gain(self) -> float:
        """How many times as fast the first question after a switch is with prefetch."""
        return self._median("on_demand", "switch") / self._median("prefetch", "switch")

    @property
    def saved(self) -> int | None:
        """Bytes by which the peak lies below the resident one; None off Linux."""
        resident, paged = self.held["resident"].peak, self.held["prefetch"].peak
        return None if resident is None or paged is None else resident - paged

    def _median(self, way: str, kind: str) -> float:
        return float(getattr(self.held[way], kind).seconds.median)


@dataclass(frozen=True)
class PagingBench(Told):
    """A bundle's paging: `expert_bytes` of all routed experts in memory, and what was asked.

    `share` of a question's tokens went to the expert that got most, the mean over questions.
    """

    TOLD = ("differences",)

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
        how = "tokens carry a direction that every router reads as one expert of the modality's"
        follow = f"{self.asking.follow:.0%} of tokens follow it"
        return (f"routing is synthetic: {how}; {follow}", "images are noise", cached)


def bench_paging(
    model: str = "nano",
    *,
    budgets: Sequence[str] = BUDGETS,
    asking: Asking | None = None,
    rounds: int = 5,
    progress: Progress = no_progress,
) -> PagingBench:
    """Measure what paging a bundle's experts costs.

    Args:
        model: A bundle.
        budgets: Bytes, or percent of all experts; each is raised to the least that works.
        asking: What is asked; noise by default.
        rounds: Turns at each budget, or fewer if they take long.
        progress: Told of each budget.

    Raises:
        ModelError: The bundle cannot be paged.
        InputError: A budget cannot be read.
        DataError: The questions are of fewer than two modalities.
    """
    bundle, asking = find_bundle(model), asking or Asking()
    experts = expert_budgets(bundle, budgets)
    modalities = asking.modalities(bundle)
    found, shares = [], []
    for done, (budget, amount) in enumerate(zip(budgets, experts.amounts, strict=True)):
        progress(f"experts at {budget}", done, len(budgets))
        run = _Run(bundle, amount, asking, modalities)
        found.append(run.measure(budget, rounds))
        shares += [answer["share"] for answer in run.answers["resident"]]
    return PagingBench(
        model=bundle.name,
        sha256=bundle.sha256,
        precision=bundle.manifest["quantisation"]["precision"],
        expert_bytes=experts.total,
        asking=asking,
        modalities=modalities,
        share=fmean(shares),
        budgets=tuple(found),
    )


class ExpertBudgets(NamedTuple):
    """Bytes: of all routed experts, the least with which the bundle answers, and some budgets."""

    total: int
    least: int
    amounts: tuple[int, ...]


def expert_budgets(bundle: Bundle, budgets: Iterable[str]) -> ExpertBudgets:
    """Budgets as they are written, in bytes for this bundle, each raised to the least possible."""
    store, moe = OrtExpertStore(bundle), there(bundle.config.moe)
    total, least = sum(store.sizes.values()), least_budget(store, moe.top_k)
    amounts = tuple(max(budget_bytes(budget, total), least) for budget in budgets)
    return ExpertBudgets(total, least, amounts)


class _Run:
    """One budget."""

    def __init__(self, bundle: Bundle, amount: int, asking: Asking, modalities: int) -> None:
        self.amount, self._modalities = amount, modalities
        self._opening = _opening(bundle, asking)
        self.answers: dict[str, list[Mapping[str, Any]]] = {way: [] for way in WAYS}

    def measure(self, budget: str, rounds: int) -> AtBudget:
        """Ask in turns: once about each modality to warm up, then so many rounds of two each."""
        opened = {}
        with worker.Worker() as resident, worker.Worker() as prefetch, worker.Worker() as on_demand:
            workers = dict(zip(WAYS, (resident, prefetch, on_demand), strict=True))
            for way, own in workers.items():
                amount = None if way == "resident" else self.amount
                opened[way] = own.ask(
                    "open_session", budget=amount, prefetch=WAYS[way], **self._opening
                )
                for modality in range(self._modalities):
                    own.ask("ask_about", modality=modality, number=0)
            allowance = Allowance(ALLOWANCE)
            for number in range(rounds):
                allowance.take("round", partial(self._round, workers, 2 * number))
            memory = {way: own.ask("memory") for way, own in workers.items()}
        held = {
            way: Held(
                opened[way]["load"],
                opened[way]["peak"],
                memory[way]["peak"],
                memory[way]["resident"],
                same=Cost.of(answers[1::2]),
                switch=Cost.of(answers[::2]),
            )
            for way, answers in self.answers.items()
        }
        wanted = [_told(answer) for answer in self.answers["resident"]]
        paged = [_told(answer) for way in list(WAYS)[1:] for answer in self.answers[way]]
        same = [one == other for one, other in zip(2 * wanted, paged, strict=True)]
        return AtBudget(budget, self.amount, held, len(same), same.count(False))

    def _round(self, workers: Mapping[str, Worker], first: int) -> None:
        for modality in range(self._modalities):
            for number in (first, first + 1):
                for way, own in workers.items():
                    answer = own.ask("ask_about", modality=modality, number=number)
                    self.answers[way].append(answer)


@dataclass(frozen=True)
class Soak(Told):
    """Many questions in one process, modalities in turn: does memory grow, does an answer change?

    Attributes:
        questions: How many were asked, of which `distinct` are different ones.
        changed: Answers that were not the first one to their question, to the last bit.
        memory: Bytes resident after so many questions.
    """

    model: str
    sha256: str
    precision: str
    asking: Asking
    budget: str
    bytes: int
    questions: int
    distinct: int
    changed: int
    seconds: Spread
    memory: Mapping[int, int | None]

    @property
    def growth(self) -> float | None:
        """Bytes per 1,000 questions once settled, as a line through them rises.

        None with fewer than three looks, or where memory cannot be seen.
        """
        seen = [(n, count) for n, count in self.memory.items() if n >= SETTLED and count]
        if len(seen) < 3:
            return None
        asked, counts = np.array(seen, np.float64).T
        return 1000 * float(np.polyfit(asked - asked[0], counts, 1)[0])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; seconds and bytes."""
        looks = [{"questions": n, "resident": count} for n, count in self.memory.items()]
        return super().to_json() | {"memory": looks, "growth_per_1000": self.growth}


def soak(
    model: str = "nano",
    questions: int = 2000,
    *,
    budget: str = SOAK_BUDGET,
    asking: Asking | None = None,
    progress: Progress = no_progress,
) -> Soak:
    """Ask so many questions of a bundle in one process, its experts paged.

    Args:
        model: A bundle.
        questions: How many.
        budget: Bytes, or percent of all experts; raised to the least that works.
        asking: What is asked; noise by default.
        progress: Told of each question.

    Raises:
        MedMoEError: As `bench_paging` does.
    """
    bundle, asking = find_bundle(model), asking or Asking()
    (amount,) = expert_budgets(bundle, [budget]).amounts
    modalities = asking.modalities(bundle)
    first: dict[tuple[int, int], tuple[str, float]] = {}
    changed, times, memory = 0, [], {}
    with worker.Worker() as own:
        own.ask("open_session", budget=amount, prefetch=True, **_opening(bundle, asking))
        for asked in range(questions):
            progress("asking", asked, questions)
            modality, number = asked % modalities, asked // modalities % VARIANTS
            told = own.ask("ask_about", modality=modality, number=number)
            changed += first.setdefault((modality, number), _told(told)) != _told(told)
            times.append(told["seconds"])
            if (asked + 1) % EVERY == 0 or asked + 1 == questions:
                memory[asked + 1] = own.ask("memory")["resident"]
    return Soak(
        model=bundle.name,
        sha256=bundle.sha256,
        precision=bundle.manifest["quantisation"]["precision"],
        asking=asking,
        budget=budget,
        bytes=amount,
        questions=questions,
        distinct=len(first),
        changed=changed,
        seconds=Spread.of(times),
        memory=memory,
    )


def _opening(bundle: Bundle, asking: Asking) -> dict[str, Any]:
    """What a worker is told of what it is to open."""
    return {"path": str(bundle.folder.resolve()), "asking": asdict(asking)}


def _told(answer: Mapping[str, Any]) -> tuple[str, float]:
    """What must not depend on paging, to the last bit."""
    return answer["answer"], answer["confidence"]
