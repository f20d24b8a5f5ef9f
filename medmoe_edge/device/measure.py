"""This machine's speeds, from toy decoders: a few seconds of microbenchmarks.

The toys are written by our exporter and run by our runtime, with random weights, so that they pay
what a real decoder pays. Each coefficient of `Speed` is what the differences between them leave:

    step, dense, byte     one token: 1 layer, 3 layers, and a decoder too large for the caches
    moe                   one token: layers with experts
    operation, attention, value     128 and 512 rows of narrow layers, 128 of wide ones
    expert                128 rows of layers with experts, whose tokens choose all of them

A time is the shortest of many, taken in turns: what the machine does undisturbed.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from medmoe_edge.config import ModelConfig
from medmoe_edge.device.costs import Precision, bits_per_weight, step_work
from medmoe_edge.device.estimate import Speed, step_seconds
from medmoe_edge.device.toys import resized, toy_runtime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

NARROW, WIDE = 320, 1024  # narrow: in caches, yet wide enough for all threads
ROWS, MORE_ROWS = 128, 512
STREAMED = 96 * 2**20  # bytes: several times the caches of a PC
SECONDS = 1.5  # per precision
SLOT = 0.05  # seconds at least before the next takes its turn
REST = 0.03  # seconds before a turn: the threads of the last session spin a while, in its way


def measure_speeds(
    config: ModelConfig, precisions: Iterable[Precision], seconds: float = SECONDS
) -> dict[Precision, Speed]:
    """The speeds of this CPU at each precision, for decoders of the kind of `config`.

    Takes about `seconds` for each.
    """
    speeds: dict[Precision, Speed] = {}
    for precision in precisions:
        kernels = kernels_of(precision)
        if kernels not in speeds:
            with Bench(config, kernels) as bench:
                bench.run(seconds)
            speeds[kernels] = bench.speed()
        speeds[precision] = speeds[kernels]
    return speeds


def kernels_of(precision: Precision) -> Precision:
    """The precision whose kernels run another's weights: those of int4 serve a mixed model."""
    return "int4" if precision == "mixed" else precision


class Bench:
    """The toys of one precision, and the shortest time that each took; a context."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        self.precision: Precision = precision
        self._stack = ExitStack()
        one, three = (resized(config, NARROW, layers, experts=False) for layers in (1, 3))
        moe = resized(config, NARROW, 3, experts=True)
        two = resized(config, WIDE, 2, experts=False)
        layers = max(int(2 * STREAMED / _work(two, 1, precision).bytes), 2)
        many = resized(config, WIDE, layers, experts=False)
        self.tokens = [(one, 1), (three, 1), (many, 1)]
        self.prefills = [(three, ROWS), (three, MORE_ROWS), (two, ROWS)]
        self.experts = [(moe, 1), (moe, ROWS)] if config.moe else []
        self.times: dict[tuple[ModelConfig, int], float] = {}

    def __enter__(self) -> Self:
        asked = [*self.tokens, *self.prefills, *self.experts]
        toys = {toy: self._open(toy) for toy in {toy for toy, _ in asked}}
        self._probes = {(toy, rows): _probe(toys[toy], rows) for toy, rows in asked}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, seconds: float) -> None:
        """Let every probe have its turn, again and again, at least once."""
        end = time.perf_counter() + seconds
        while True:
            for key, probe in self._probes.items():
                self.times[key] = min(self.times.get(key, float("inf")), shortest(probe, SLOT))
            if time.perf_counter() > end:
                return

    def speed(self) -> Speed:
        """The coefficients that explain the times."""
        rows = [
            (1.0, toy.decoder.layers, _work(toy, count, self.precision).bytes)
            for toy, count in self.tokens
        ]
        step, dense, byte = solve(rows, [self.times[key] for key in self.tokens])
        rest = [self.times[key] - step - key[0].decoder.layers * dense for key in self.prefills]
        works = [_work(*key, self.precision) for key in self.prefills]
        costs = [(work.operations, work.attention, work.values) for work in works]
        operation, attention, value = solve(costs, rest)
        speed = Speed(byte, operation, attention, value, step, dense)
        for toy, count in self.experts:
            known = step_seconds(toy, self.precision, speed, count, 0)
            more = max(self.times[toy, count] - known, 0.0) / toy.decoder.layers
            moe = toy.moe
            assert moe is not None
            if count == 1:
                speed = replace(speed, moe=more)
            elif moe.num_experts > moe.top_k:
                speed = replace(speed, expert=more / (moe.num_experts - moe.top_k))
        return speed

    def _open(self, toy: ModelConfig) -> OrtRuntime:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        return toy_runtime(toy, self.precision, Path(folder))


def shortest(probe: Callable[[], None], slot: float) -> float:
    """Seconds of the shortest of several runs, one at least, after a rest."""
    time.sleep(REST)
    start, best = time.perf_counter(), float("inf")
    while True:
        before = time.perf_counter()
        probe()
        now = time.perf_counter()
        best = min(best, now - before)
        if now - start > slot:
            return best


def solve(rows: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[float, ...]:
    """The non-negative coefficients with the least relative error; few, so all choices are tried.

    `rows` `[n, k]` hold what each of `times` `[n]` is made of.
    """
    scaled = np.asarray(rows, np.float64) / np.asarray(times, np.float64)[:, None]
    units = np.maximum(np.abs(scaled).max(0), np.finfo(np.float64).tiny)
    count = scaled.shape[1]
    best, error = np.zeros(count), float(len(times))
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            columns = list(chosen)
            part = scaled[:, columns] / units[columns]
            found, *_ = np.linalg.lstsq(part, np.ones(len(times)))
            left = float(((part @ found - 1) ** 2).sum())
            if (found >= 0).all() and left < error:
                best, error = np.zeros(count), left
                best[columns] = found
    return tuple(best / units)


class _Sum(NamedTuple):
    bytes: float
    operations: float
    attention: float
    values: float


def _work(config: ModelConfig, rows: int, precision: Precision) -> _Sum:
    """A step's work over all parts."""
    work = step_work(config, rows, 0)
    read = (n * bits_per_weight(kind, precision) / 8 for kind, n in work.weights.items())
    return _Sum(sum(read), sum(work.operations.values()), work.attention, work.values)


def _probe(runtime: OrtRuntime, rows: int) -> Callable[[], None]:
    cache = runtime.new_cache(rows)

    def run() -> None:
        cache.length = 0
        runtime.step(runtime.embed([0] * rows), cache)

    return run
