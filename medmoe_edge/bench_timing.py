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
