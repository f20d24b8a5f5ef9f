"""Integers of W8A8 keep the bound on neighbours by which every processor adds them exactly."""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medmoe_edge._types import Floats
from medmoe_edge.calibration.methods import quantise_gptq
from medmoe_edge.calibration.quantisers import Format, Quantised, round_searched, round_to_nearest

INT8 = Format(8)
MOST = 2**15 // 255  # a sum of two products of activations up to 255 that 16 bits hold


def largest_pair(integers: npt.NDArray[np.generic]) -> int:
    """Of `[N, K]`: the largest magnitude of the sum of stored neighbours 2i and 2i + 1."""
    width = integers.shape[1] // 2 * 2
    pairs = integers[:, :width].astype(np.int64).reshape(len(integers), -1, 2).sum(-1)
    return int(np.abs(pairs).max(initial=0))


def by_gptq(weight: Floats, seed: int = 0) -> Quantised:
    """With inputs that are correlated, few, and for some columns none at all."""
    random = np.random.default_rng(seed)
    width = weight.shape[1]
    inputs = random.standard_normal((width // 2 + 1, width)) * random.lognormal(0, 2, width)
    inputs[:, ::5] = inputs[:, :1]
    inputs[:, 3::7] = 0
    return quantise_gptq(weight, (inputs.T @ inputs).astype(np.float32), INT8)


QUANTISERS: list[Callable[[Floats], Quantised]] = [
    partial(round_to_nearest, format=INT8),
    partial(round_searched, format=INT8),
    by_gptq,
]
ROWS = {
    "all equal": np.full((2, 8), 0.5),
    "all the largest": np.full((2, 8), 127.0) * [[1], [-1]],
    "odd": np.full((2, 7), 3.0),
    "one column": np.array([[5.0], [-5.0], [0.0]]),
    "zeros": np.zeros((2, 6)),
    "one pair and zeros": np.array([[1.0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]),
    "opposite signs": np.tile([1.0, -1], (2, 4)),
    "one outlier beside its like": np.array([[1.0, 0.999] + [0.01] * 62]),
    "ties": np.array([[64.5, 63.5, 127, 0, -64.5, -63.5, 0.5, 0.5]]),
    "tiny": np.full((1, 4), 1e-45),
    "huge": np.full((1, 4), 3e38),
}


@pytest.mark.parametrize("quantise", QUANTISERS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_adversarial_rows_keep_the_bound(
    rows: npt.NDArray[np.float64], quantise: Callable[[Floats], Quantised]
) -> None:
    weight = rows.astype(np.float32)
    quantised = quantise(weight)
    assert INT8.pair_bound == MOST
    assert largest_pair(quantised.integers) <= MOST
    assert np.isfinite(quantised.dequantise()).all()


@settings(max_examples=80, deadline=None)
@given(
    weight=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 24)),
        elements=st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-2.0, 2.0, width=32),
    ),
    seed=st.integers(0, 9),
)
def test_any_weights_keep_the_bound(weight: Floats, seed: int) -> None:
    quantisers: list[Callable[[Floats], Quantised]] = [*QUANTISERS[:2], partial(by_gptq, seed=seed)]
    for quantise in quantisers:
        quantised = quantise(weight)
        assert largest_pair(quantised.integers) <= MOST
        assert quantised.integers.min(initial=0) >= -127  # so that it can negate
    importance = np.exp(
        3 * np.random.default_rng(seed).standard_normal(weight.shape[1], np.float32)
    )
    assert largest_pair(round_searched(weight, INT8, importance).integers) <= MOST


@pytest.mark.parametrize("weighted", [False, True])
def test_pairs_give_way_where_it_costs_least(weighted: bool) -> None:
    """Every pair is the best of all pairs of integers that the bound allows, by exhaustion."""
    random = np.random.default_rng(3)
    weight = random.standard_normal((6, 2048)).astype(np.float32)
    importance = random.lognormal(0, 1, 2048).astype(np.float32) if weighted else None
    quantised = round_searched(weight, INT8, importance)
    shares = np.ones(2048) if importance is None else importance / importance.mean() + 0.01
    levels = range(-127, 128)
    allowed = np.array([p for p in itertools.product(levels, levels) if abs(sum(p)) <= MOST])
    exact = (weight / quantised.scale.astype(np.float64)).reshape(-1, 2)
    integers, counts = quantised.integers.reshape(-1, 2), np.tile(shares, 6).reshape(-1, 2)
    large = np.abs(np.rint(exact).sum(-1)) > MOST - 4
    assert (np.abs(np.rint(exact).sum(-1)) > MOST).sum() > 3  # so many gave way
    for target, found, share in zip(exact[large], integers[large], counts[large], strict=True):
        best = ((allowed - target) ** 2 @ share).min()
        assert (found - target) ** 2 @ share <= best * (1 + 1e-4)
    assert (integers[~large] == np.clip(np.rint(exact[~large]), -127, 127)).all()


def test_searched_scales_win_back_some_of_what_the_bound_costs() -> None:
    """Of Gaussian rows: 1.3 times the error of rounding without the bound, and less if searched."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    scale = np.abs(weight).max(1, keepdims=True) / 127
    unbounded = np.square(np.rint(weight / scale) * scale - weight).sum()
    nearest, searched = (
        np.square(quantise(weight).dequantise() - weight).sum() for quantise in QUANTISERS[:2]
    )
    assert 1.1 < np.sqrt(nearest / unbounded) < 1.4
    assert searched < 0.95 * nearest


def test_formats_in_groups_have_no_bound() -> None:
    """Their kernels are exact as they are, and their integers as they were."""
    assert [Format(8, 32).pair_bound, Format(4).pair_bound] == [None, None]
    assert Format(8, symmetric=False).pair_bound is None
    weight = np.full((1, 32), 2.0, np.float32)
    for quantise in (round_to_nearest, round_searched):
        assert largest_pair(quantise(weight, Format(8, 32)).integers) == 254
