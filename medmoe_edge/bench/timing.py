"""Repeated measurements and what is told of them."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np

Result = TypeVar("Result")
SLOT = 0.2  # seconds at least of a turn
REST = 0.03  # seconds before a turn: the threads of the last one spin a while, in its way


@dataclass(frozen=True)
class Spread:
    """The median of `count` measurements, and their quartiles `low` and `high`."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of one measurement at least."""
        every = np.array(list(values), np.float64)
        low, median, high = np.percentile(every, (25, 50, 75)).tolist()
        return cls(median, low, high, len(every))


def turn(run: Callable[[], Result], slot: float = SLOT) -> list[Result]:
    """What a turn of `slot` seconds yields, after a rest: one run at least."""
    time.sleep(REST)
    end = time.perf_counter() + slot
    results = [run()]
    while time.perf_counter() < end:
        results.append(run())
    return results


def seconds(run: Callable[[], object]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Ration:
    """Time for several measurements: each is taken once, and again while it fits into its share.

    `allowance` is that share in seconds, the same for all.
    """

    def __init__(self, allowance: float) -> None:
        self._allowance = allowance
        self._spent: dict[str, list[float]] = {}

    def take(self, name: str, run: Callable[[], object]) -> None:
        """Run it, unless its runs so far say that another would take more than is left."""
        spent = self._spent.setdefault(name, [])
        if not spent or sum(spent) * (1 + 1 / len(spent)) <= self._allowance:
            spent.append(seconds(run))
