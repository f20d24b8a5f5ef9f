"""Measurements that are repeated in turns, and what is told of them: medians and quartiles."""

import time
from collections.abc import Callable, Iterable, Mapping
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
    """What a turn of `SLOT` seconds yields, after a rest: one run at least."""
    time.sleep(REST)
    end = time.perf_counter() + SLOT
    results = [run()]
    while time.perf_counter() < end:
        results.append(run())
    return results


class Allowance:
    """Seconds for each of several measurements: taken once, and again while they suffice."""

    def __init__(self, allowed: float) -> None:
        self._allowed = allowed
        self._spent: dict[str, list[float]] = {}

    def take(self, name: str, run: Callable[[], object]) -> None:
        """Run it, unless its runs so far say that another would take more than is left."""
        spent = self._spent.setdefault(name, [])
        if not spent or sum(spent) * (1 + 1 / len(spent)) <= self._allowed:
            spent.append(seconds(run))
