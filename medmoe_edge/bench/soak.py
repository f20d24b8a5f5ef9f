"""Many questions, modalities in turn, inside a memory budget: does memory grow, does an answer
change?"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medmoe_edge.bench.asking import VARIANTS, Asking
from medmoe_edge.bench.measurement import Progress, find_bundle, no_progress
from medmoe_edge.bench.paging import expert_budgets
from medmoe_edge.bench.process import Worker
from medmoe_edge.bench.timing import Spread

BUDGET = "50%"
SETTLED = 200  # questions, after which memory must not grow
EVERY = 100  # questions between two looks at it


@dataclass(frozen=True)
class Soak:
    """`memory` resident after so many questions; `distinct` questions, the same again and again.

    `changed` answers were not the first one to their question, to the last bit.
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
        return asdict(self) | {"memory": looks, "growth_per_1000": self.growth}


def soak(
    model: str = "nano",
    questions: int = 2000,
    *,
    budget: str = BUDGET,
    asking: Asking | None = None,
    progress: Progress = no_progress,
) -> Soak:
    """Ask so many questions of a bundle in one process, with `budget` raised to the least possible.

    Raises as `bench_paging` does.
    """
    bundle, asking = find_bundle(model), asking or Asking()
    (amount,) = expert_budgets(bundle, [budget]).amounts
    modalities = asking.modalities(bundle)
    opening = {"path": str(bundle.folder.resolve()), "asking": asdict(asking)}
    first: dict[tuple[int, int], tuple[str, float]] = {}
    changed, times, memory = 0, [], {}
    with Worker() as worker:
        worker.ask("open_asker", budget=amount, prefetch=True, **opening)
        for asked in range(questions):
            progress("asking", asked, questions)
            modality, number = asked % modalities, asked // modalities % VARIANTS
            told = worker.ask("ask_about", modality=modality, number=number)
            answer = told["answer"], told["confidence"]
            changed += first.setdefault((modality, number), answer) != answer
            times.append(told["seconds"])
            if (asked + 1) % EVERY == 0 or asked + 1 == questions:
                memory[asked + 1] = worker.ask("memory")["resident"]
    return Soak(
        bundle.name,
        bundle.sha256,
        bundle.manifest["quantisation"]["precision"],
        asking,
        budget,
        amount,
        questions,
        len(first),
        changed,
        Spread.of(times),
        memory,
    )
