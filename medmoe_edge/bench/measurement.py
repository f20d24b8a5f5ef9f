"""Repeated measurements, their medians and quartiles, and readings of this process and machine."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import psutil

from medmoe_edge.bundle.machine import available_memory, peak_memory

Result = TypeVar("Result")
SLOT = 0.2  # seconds at least of a turn
REST = 0.03  # seconds before a turn: the threads of the last one spin a while, in its way
STREAMED = 256 * 2**20  # bytes: several times the caches of a workstation
LINUX = sys.platform == "linux"


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

    def __mul__(self, factor: float) -> "Spread":
        return Spread(factor * self.median, factor * self.low, factor * self.high, self.count)


@dataclass(frozen=True)
class Shape:
    """Tokens of one visual question: text before the image, image, question, answer."""

    prefix: int
    image: int
    question: int
    new: int

    @property
    def prompt(self) -> int:
        """All that is prefilled."""
        return self.prefix + self.image + self.question


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        seconds: By part. `load` until the model could answer; `vision`, `prefill` and `decode` of
            the first question, which together are `question`; `second`, from the next question
            about the same image to its first token.
        resident: Bytes in memory after a question.
        peak: The most bytes while it answered; None off Linux.
        loading: The most bytes while it loaded; None off Linux.
    """

    seconds: Mapping[str, Spread]
    resident: int | None
    peak: int | None
    loading: int | None

    def prefill_rate(self, shape: Shape) -> float:
        """Tokens per second of the prompt."""
        return shape.prompt / self.seconds["prefill"].median

    def decode_rate(self, shape: Shape) -> float:
        """Tokens per second of the answer, whose first one belongs to the prefill."""
        return (shape.new - 1) / self.seconds["decode"].median


def seconds(run: Callable[[], object]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turn(run: Callable[[], Result]) -> list[Result]:
    """The results of a turn of `SLOT` seconds, after a rest; it runs at least once."""
    time.sleep(REST)
    end = time.perf_counter() + SLOT
    results = [run()]
    while time.perf_counter() < end:
        results.append(run())
    return results


class Allowance:
    """A time limit for each of several measurements: each runs once, then while time is left."""

    def __init__(self, allowed: float) -> None:
        self._allowed = allowed
        self._spent: dict[str, list[float]] = {}

    def take(self, name: str, run: Callable[[], object]) -> None:
        """Run it, unless its runs so far say that another would take more than is left."""
        spent = self._spent.setdefault(name, [])
        if not spent or sum(spent) * (1 + 1 / len(spent)) <= self._allowed:
            spent.append(seconds(run))


def threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1


class Stream:
    """An array that no cache holds, read by all threads at once."""

    def __init__(self) -> None:
        self._parts = np.array_split(np.ones(STREAMED // 4, np.float32), threads())

    def bandwidth(self) -> float:
        """Bytes per second of reading it once, by dot products: they let other threads run."""
        with ThreadPoolExecutor(len(self._parts)) as pool:
            taken = seconds(lambda: list(pool.map(lambda part: np.dot(part, part), self._parts)))
        return sum(part.nbytes for part in self._parts) / taken


def memory() -> dict[str, int | None]:
    """Bytes of this process `resident` now, and at their `peak` since it was last reset."""
    return {"resident": psutil.Process().memory_info().rss, "peak": peak_memory()}


def storage() -> dict[str, int | None]:
    """Major page `faults` of this process so far, and bytes `read` from storage; None off Linux."""
    if not LINUX:
        return {"faults": None, "read": None}
    import resource

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    return {"faults": faults, "read": psutil.Process().io_counters().read_bytes}


def available() -> int:
    """Bytes that a new process may take without swapping, in the control groups of this one."""
    free = available_memory()
    return int(psutil.virtual_memory().available) if free is None else free
