"""The range of an activation, from a histogram that grows with what it sees."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import CheckpointError, DataError

Counts = npt.NDArray[np.int64]
Range = tuple[float, float]
BINS = 2048
SMALLEST = -200  # exponent: all fp32 values lie well above 2^-200
SHRINKING = np.linspace(
    1.0, 0.05, 39
).tolist()  # fractions of the full range that are tried on either side


def _empty() -> Counts:
    return np.zeros(BINS, np.int64)


@dataclass
class Histogram:
    """Counts of one tensor's values in `BINS` equal bins between -limit and limit.

    The limit is the smallest power of two above all magnitudes so far, so the bins of a smaller
    limit nest in those of a larger one: the counts are exact, whatever the order of the updates.
    """

    counts: Counts = field(default_factory=_empty)
    minimum: float = np.inf
    maximum: float = -np.inf

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Of a bin."""
        return float(2.0**self._exponent) * 2 / BINS

    @property
    def _exponent(self) -> int:
        peak = max(-self.minimum, self.maximum)
        return int(np.frexp(peak)[1]) if peak > 0 else SMALLEST

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """Count `values`, of any shape; raises `CheckpointError` if they are not all finite."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            raise CheckpointError(
                "An activation became NaN or infinite during calibration.",
                "Check the checkpoint, or calibrate it in fp32.",
            )
        self._widen(low, high)
        bins = np.floor(values.ravel().astype(np.float64) / self.width).astype(np.int64)
        self.counts += np.bincount(bins + BINS // 2, minlength=BINS)

    def merge(self, other: "Histogram") -> None:
        """Count all that `other` has seen, too."""
        widened = Histogram(other.counts.copy(), other.minimum, other.maximum)
        widened._widen(self.minimum, self.maximum)
        self._widen(other.minimum, other.maximum)
        self.counts += widened.counts

    def _widen(self, low: float, high: float) -> None:
        before = self._exponent
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        # After as many steps as halve all bins into the two beside 0, nothing moves any more.
        for _ in range(min(self._exponent - before, BINS.bit_length())):
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(pairs, BINS // 4)

    def min_max(self) -> Range:
        """The full range, with 0 in it, as all these ranges: a grid has to hold 0 exactly."""
        return min(self.minimum, 0.0), max(self.maximum, 0.0)

    def percentile(self, percent: float) -> Range:
        """The range that leaves out `100 - percent` per cent of the values on either side."""
        low, high = self.min_max()
        if not self.count:
            return low, high
        edges = self.width * (np.arange(BINS + 1) - BINS // 2)
        below = np.concatenate(([0], np.cumsum(self.counts))) / self.count
        tails = np.interp([1 - percent / 100, percent / 100], below, edges)
        return min(max(low, float(tails[0])), 0.0), max(min(high, float(tails[1])), 0.0)

    def mse_optimal(self, bits: int = 8) -> Range:
        """The range whose `bits`-bit asymmetric grid has the least mean squared error.

        Values outside lose their distance from the range; those inside d^2 / 12, where d is the
        step, but those within half a step of 0 only themselves.
        """
        full_low, full_high = self.min_max()
        centres = self.width * (np.arange(BINS) - BINS // 2 + 0.5)
        centres[BINS // 2 - 1 : BINS // 2 + 1] = 0  # where exact zeros lie
        seen = self.counts > 0
        values, counts = centres[seen], self.counts[seen].astype(np.float64)

        def error(low: float, high: float) -> float:
            step = (high - low) / (2**bits - 1)
            outside = values - np.clip(values, low, high)
            inside = np.where(np.abs(values) < step / 2, values**2, step**2 / 12)
            return float(counts @ np.where(outside == 0, inside, outside**2))

        # One side after the other: each only meets the other through the step.
        low, high = full_low, full_high
        for _ in range(2):
            low = min((full_low * part for part in SHRINKING), key=lambda end: error(end, high))
            high = min((full_high * part for part in SHRINKING), key=lambda end: error(low, end))
        return low, high

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What `from_arrays` restores it from: counts int64 `[BINS]`, extremes float64 `[2]`."""
        return {"counts": self.counts, "extremes": np.array([self.minimum, self.maximum])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> "Histogram":
        """Raises `DataError` for arrays that are no histogram."""
        counts, extremes = arrays.get("counts"), arrays.get("extremes")
        if counts is None or extremes is None:
            raise _damaged("lacks its counts or extremes")
        if counts.dtype != np.int64 or counts.shape != (BINS,):
            raise _damaged(f"does not have {BINS} bins")
        if extremes.dtype != np.float64 or extremes.shape != (2,):
            raise _damaged("does not have two extremes")
        result = cls(counts.astype(np.int64), *map(float, extremes.astype(np.float64)))
        if (result.counts < 0).any():
            raise _damaged("has negative counts")
        empty = result.minimum == np.inf and result.maximum == -np.inf
        ordered = -np.inf < result.minimum <= result.maximum < np.inf
        if not (empty if result.count == 0 else ordered):
            raise _damaged("has impossible extremes")
        return result


def _damaged(why: str) -> DataError:
    return DataError(
        f"A histogram of activations {why}.", "The statistics are damaged: calibrate again."
    )
