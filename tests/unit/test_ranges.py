"""Histograms against all the values at once."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medmoe_edge.calibration.formats import Floats
from medmoe_edge.calibration.ranges import BINS, Histogram
from medmoe_edge.errors import CheckpointError, DataError

VALUES = arrays.arrays(
    np.float32,
    st.integers(0, 30),
    elements=st.floats(-10, 10, width=32)
    | st.floats(allow_nan=False, allow_infinity=False, width=32),
)


def histogram(*parts: Floats) -> Histogram:
    result = Histogram()
    for part in parts:
        result.update(part)
    return result


def heavy_tailed(seed: int, count: int = 20_000) -> Floats:
    return np.random.default_rng(seed).standard_t(2, count).astype(np.float32)


def equal(one: Histogram, other: Histogram) -> bool:
    return (one.minimum, one.maximum, one.counts.tolist()) == (
        *(other.minimum, other.maximum, other.counts.tolist()),
    )


@settings(max_examples=60)
@given(st.lists(VALUES, max_size=4))
def test_the_order_and_division_of_updates_leave_no_trace(parts: list[Floats]) -> None:
    everything = np.concatenate([*parts, np.empty(0, np.float32)])
    whole = histogram(everything)
    assert equal(histogram(*parts[::-1]), whole)
    merged = Histogram()
    for part in parts:
        other = histogram(part)
        before = other.counts.copy()
        merged.merge(other)
        np.testing.assert_array_equal(other.counts, before)
    assert equal(merged, whole)
    assert whole.count == everything.size
    if everything.size:
        assert (whole.minimum, whole.maximum) == (everything.min(), everything.max())


@given(VALUES.filter(len))
def test_counts_are_those_of_numpy(values: Floats) -> None:
    result = histogram(values)
    limit = result.width * BINS / 2
    edges = result.width * (np.arange(BINS + 1) - BINS // 2)
    assert float(np.abs(values).max()) < limit or not values.any()
    assert not values.any() or limit <= 2 * float(np.abs(values).max())
    # each bin holds its lower edge and not its upper one
    bins = np.searchsorted(edges, values.astype(np.float64), side="right") - 1
    np.testing.assert_array_equal(result.counts, np.bincount(bins, minlength=BINS))


@settings(max_examples=40)
@given(VALUES, st.floats(50, 100))
def test_ranges_are_ordered_and_hold_zero(values: Floats, percent: float) -> None:
    result = histogram(values)
    low, high = result.min_max()
    assert low == min([0.0, *values.tolist()])
    assert high == max([0.0, *values.tolist()])
    for inner_low, inner_high in (result.percentile(percent), result.mse_optimal()):
        assert low <= inner_low <= 0 <= inner_high <= high


@settings(max_examples=60)
@given(VALUES.filter(len), st.sampled_from((90.0, 99.0, 99.99)))
def test_percentiles_are_those_of_numpy_within_a_bin(values: Floats, percent: float) -> None:
    result = histogram(values)
    exact = values.astype(np.float64)

    def bounds(tail: float) -> tuple[float, float]:
        """Between which two values the quantile lies, by rank; then a bin more on either side."""
        rank = tail / 100 * len(exact)
        ordered = np.sort(exact)
        near = ordered[int(np.clip(np.ceil(rank) - 1, 0, len(exact) - 1))]
        next_one = ordered[int(np.clip(np.floor(rank + 1e-9), 0, len(exact) - 1))]
        return min(near, next_one) - result.width, max(near, next_one) + result.width

    for found, tail, side in zip(
        result.percentile(percent), (100 - percent, percent), (min, max), strict=True
    ):
        below, above = bounds(tail)
        assert side(below, 0.0) <= found <= side(above, 0.0)


def test_percentile_of_many_values() -> None:
    values = heavy_tailed(0)
    result = histogram(*np.split(values, 10))
    low, high = result.percentile(99)
    assert low == pytest.approx(np.quantile(values, 0.01), abs=result.width)
    assert high == pytest.approx(np.quantile(values, 0.99), abs=result.width)
    assert result.percentile(100) == result.min_max()


def true_error(values: Floats, low: float, high: float, bits: int) -> float:
    """Mean squared error of the values on an asymmetric grid with an integer zero point."""
    exact, top = values.astype(np.float64), 2**bits - 1
    step = (high - low) / top
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(exact / step) + zero, 0, top) - zero) * step
    return float(((rounded - exact) ** 2).mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "one-sided", "mostly zero", "skewed"])
@pytest.mark.parametrize("seed", range(3))
def test_mse_optimal_beats_the_full_range_on_heavy_tails(seed: int, kind: str, bits: int) -> None:
    values = heavy_tailed(seed)
    if kind == "one-sided":
        values = np.abs(values)
    elif kind == "mostly zero":
        values = np.where(np.arange(len(values)) % 50, np.float32(0), np.abs(values))
    elif kind == "skewed":
        values = np.where(values < 0, values / np.float32(20), values)
    result = histogram(values)
    best = true_error(values, *result.mse_optimal(bits), bits)
    assert best <= true_error(values, *result.min_max(), bits)
    if bits == 4:
        low, high = result.min_max()
        parts = np.linspace(0.02, 1, 30)
        least = min(true_error(values, low * a, high * b, bits) for a in parts for b in parts[::3])
        assert best <= 1.15 * least


def test_light_tails_are_not_cut() -> None:
    values = np.random.default_rng(0).uniform(-1, 3, 20_000).astype(np.float32)
    result = histogram(values)
    np.testing.assert_allclose(result.mse_optimal(8), result.min_max())


@given(VALUES)
def test_arrays_restore_it(values: Floats) -> None:
    before = histogram(values)
    after = Histogram.from_arrays(before.to_arrays())
    assert equal(before, after)
    after.update(np.ones(1, np.float32))
    assert before.count == values.size


def test_damaged_arrays_are_refused() -> None:
    good = histogram(heavy_tailed(0, 10)).to_arrays()
    damaged: list[dict[str, npt.NDArray[np.generic]]] = [
        {},
        {"counts": good["counts"]},
        {**good, "counts": good["counts"][:-1]},
        {**good, "counts": good["counts"].astype(np.float64)},
        {**good, "counts": -good["counts"].astype(np.int64)},
        {**good, "counts": np.zeros(BINS, np.int64)},
        {**good, "extremes": np.array(["a", "b"])},
        {**good, "extremes": np.array([2.0, 1.0])},
        {**good, "extremes": np.array([0.0, np.nan])},
        {**good, "extremes": np.array([-np.inf, np.inf])},
    ]
    for arrays_ in damaged:
        with pytest.raises(DataError, match="histogram of activations"):
            Histogram.from_arrays(arrays_)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused_and_not_counted(bad: float) -> None:
    result = histogram(np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        result.update(np.array([1, bad, -1], np.float32))
    assert equal(result, histogram(np.ones(3, np.float32)))
