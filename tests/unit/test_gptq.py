"""GPTQ against the published update in float64, one column at a time."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from medmoe_edge._types import Floats
from medmoe_edge.calibration.methods import quantise_gptq
from medmoe_edge.calibration.quantisers import (
    Format,
    output_error,
    round_searched,
    round_to_nearest,
)
from medmoe_edge.errors import CheckpointError

Doubles = npt.NDArray[np.float64]
FORMATS = [
    Format(bits, group, symmetric)
    for (bits, group), symmetric in itertools.product(((3, 8), (4, 32), (8, None)), (True, False))
]


def problem(
    rows: int = 24, width: int = 160, tokens: int = 2000, seed: int = 0
) -> tuple[Floats, Floats]:
    """A weight, and the mean x x^T of inputs that are correlated and differ in size."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((width // 4, width))
    inputs = random.standard_normal((tokens, width // 4)) @ mixing
    inputs += 3 * random.standard_normal((tokens, width))
    inputs *= random.lognormal(0, 0.7, width)
    weight = random.standard_t(5, (rows, width)).astype(np.float32) / np.float32(50)
    return weight, (inputs.T @ inputs / tokens).astype(np.float32)


def damped(hessian: Floats, damping: float) -> Floats:
    mean = np.diagonal(hessian).mean(dtype=np.float64)
    return np.asarray(hessian + damping * mean * np.eye(len(hessian)), np.float32)


def as_published(weight: Floats, hessian: Floats, format: Format, damping: float) -> Doubles:
    """The dequantised result of optimal brain quantisation in a fixed order of the columns.

    After each column the inverse Hessian of those that remain is taken anew, so that neither the
    Cholesky factor nor the blocks of the paper are relied upon.
    """
    width = weight.shape[1]
    matrix = hessian.astype(np.float64)
    matrix += damping * np.diagonal(matrix).mean() * np.eye(width)
    order = list(np.argsort(-np.diagonal(hessian), kind="stable"))
    inverses = [np.linalg.inv(matrix[np.ix_(order[j:], order[j:])]) for j in range(width)]
    importance = np.diagonal(hessian).copy()
    if format.pair_bound is not None:  # of an error that later columns cancel as far as they can
        importance[order] = [1 / inverse[0, 0] for inverse in inverses]
    grid = round_searched(weight, format, importance)
    size = width // grid.scale.shape[1]
    scale = np.repeat(grid.scale.astype(np.float64), size, 1)
    zero = (
        np.zeros_like(scale)
        if grid.zero is None
        else np.repeat(grid.zero.astype(np.float64), size, 1)
    )
    left, result = weight.astype(np.float64), np.zeros(weight.shape)
    stored: dict[int, Doubles] = {}
    for position, (j, inverse) in enumerate(zip(order, inverses, strict=True)):
        remaining = order[position:]
        integers = np.clip(np.rint(left[:, j] / scale[:, j]) + zero[:, j], *format.levels)
        if format.pair_bound is not None and (neighbour := stored.get(j ^ 1)) is not None:
            integers = np.clip(
                integers, -format.pair_bound - neighbour, format.pair_bound - neighbour
            )
        stored[j] = integers
        result[:, j] = (integers - zero[:, j]) * scale[:, j]
        error = (left[:, j] - result[:, j]) / inverse[0, 0]
        left[:, remaining] -= np.outer(error, inverse[0])
    return result


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_is_gptq_as_published(format: Format, damping: float) -> None:
    weight, hessian = problem()  # 160 columns: more than a block
    quantised = quantise_gptq(weight, hessian, format, damping=damping)
    expected = as_published(weight, hessian, format, damping)
    # fp32 decides a few ties otherwise, after which a row goes its own, equally good way
    differing = (np.abs(quantised.dequantise() - expected) > 1e-6).any(1)
    assert differing.sum() <= (8 if format.bits == 8 else 2)
    noise = (expected - weight).astype(np.float32)
    signal = np.vdot(weight @ hessian, weight)
    reference = np.sqrt(np.vdot(noise @ hessian, noise) / signal)
    assert output_error(weight, quantised, hessian) == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_beats_searching_which_beats_rounding(format: Format) -> None:
    weight, hessian = problem(seed=1)
    gptq, searched, nearest = (
        output_error(weight, quantised, hessian)
        for quantised in (
            quantise_gptq(weight, hessian, format),
            round_searched(weight, format, np.diagonal(hessian)),
            round_to_nearest(weight, format),
        )
    )
    assert gptq < 0.65 * searched
    assert searched < nearest


def test_what_is_stored_is_on_the_searched_grid() -> None:
    weight, hessian = problem(rows=5, width=64)
    for format in (Format(4, 32), Format(4, 32, symmetric=False), Format(8, 64)):
        grid = round_searched(weight, format, np.diagonal(hessian))
        quantised = quantise_gptq(weight, hessian, format)
        np.testing.assert_array_equal(quantised.scale, grid.scale)
        assert quantised.integers.dtype == grid.integers.dtype
        assert quantised.integers.flags.c_contiguous
        if grid.zero is not None:
            assert quantised.zero is not None
            np.testing.assert_array_equal(quantised.zero, grid.zero)
        assert quantised.integers.min() >= format.levels[0]
        assert quantised.integers.max() <= format.levels[1]


def test_the_size_of_the_hessian_does_not_matter() -> None:
    weight, hessian = problem(rows=5, width=64)
    mean, total = (
        quantise_gptq(weight, hessian * np.float32(factor), Format(4, 32)) for factor in (1, 2**20)
    )
    np.testing.assert_array_equal(mean.integers, total.integers)


def test_uncorrelated_inputs_leave_nothing_to_cancel() -> None:
    weight, hessian = problem(rows=8, width=64)
    diagonal = np.diagonal(hessian)
    quantised = quantise_gptq(weight, np.diag(diagonal), Format(4, 32))
    expected = round_searched(weight, Format(4, 32), diagonal)
    np.testing.assert_array_equal(quantised.integers, expected.integers)


def test_columns_that_calibration_never_reached_keep_their_weights() -> None:
    weight, hessian = problem(rows=8, width=64)
    dead = [3, 40, 41, 63]
    hessian[dead] = 0
    hessian[:, dead] = 0
    for format in (Format(4, 32), Format(8)):
        quantised = quantise_gptq(weight, hessian, format)
        step = np.repeat(np.abs(quantised.scale), 64 // quantised.scale.shape[1], 1)
        error = np.abs(quantised.dequantise() - weight)[:, dead]
        inside = np.abs(weight[:, dead]) < step[:, dead] * format.levels[1]
        assert inside.mean() > 0.9
        assert (error <= step[:, dead] * 0.5001)[inside].all()
    nothing = quantise_gptq(weight, np.zeros_like(hessian), Format(4, 32))
    np.testing.assert_array_equal(nothing.integers, round_searched(weight, Format(4, 32)).integers)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_few_tokens_do_no_harm(format: Format, tokens: int) -> None:
    """By a well damped Hessian, which also asks about inputs that the few tokens do not span."""
    weight, hessian = problem(tokens=tokens)
    judge = damped(hessian, 0.1)
    gptq = output_error(weight, quantise_gptq(weight, hessian, format), judge)
    assert gptq <= output_error(weight, round_to_nearest(weight, format), judge)


@pytest.mark.parametrize("damping", [0.0, 1e-30, 0.01])
def test_damping_grows_until_a_singular_hessian_can_be_used(damping: float) -> None:
    weight, hessian = problem(rows=8, width=64, tokens=3)
    quantised = quantise_gptq(weight, hessian, Format(4, 32), damping=damping)
    nearest = round_to_nearest(weight, Format(4, 32))
    assert output_error(weight, quantised, hessian) < 0.6 * output_error(weight, nearest, hessian)


def test_when_all_is_damping_there_is_nothing_to_cancel() -> None:
    weight, hessian = problem(rows=8, width=64)
    quantised = quantise_gptq(weight, hessian, Format(4, 32), damping=1e6)
    expected = round_searched(weight, Format(4, 32), np.diagonal(hessian))
    np.testing.assert_array_equal(quantised.integers, expected.integers)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight, hessian = problem(rows=2, width=32)
    broken = hessian.copy()
    broken[3, 4] = bad
    with pytest.raises(ValueError, match="finite"):
        quantise_gptq(weight, broken, Format(4, 32))
    weight[1, 1] = bad
    with pytest.raises(CheckpointError, match=r"2x32 matrix .* NaN or infinite"):
        quantise_gptq(weight, hessian, Format(4, 32))


def test_what_is_no_matrix_of_second_moments_is_refused() -> None:
    weight, hessian = problem(rows=2, width=32)
    with pytest.raises(ValueError, match="32, 32"):
        quantise_gptq(weight, hessian[:16, :16], Format(4, 32))
    with pytest.raises(ValueError, match="negative"):
        quantise_gptq(weight, -hessian, Format(4, 32))
    indefinite = np.ones((32, 32), np.float32) * -10
    np.fill_diagonal(indefinite, 1)
    with pytest.raises(ValueError, match="no matrix of second moments"):
        quantise_gptq(weight, indefinite, Format(4, 32))


def test_the_order_of_the_inputs_does_not_matter() -> None:
    """Where no two of them are a pair."""
    weight, hessian = problem(rows=4, width=96)
    shuffle = np.random.default_rng(3).permutation(96)
    plain = quantise_gptq(weight, hessian, Format(8, 96)).dequantise()
    moved = quantise_gptq(
        np.ascontiguousarray(weight[:, shuffle]), hessian[np.ix_(shuffle, shuffle)], Format(8, 96)
    ).dequantise()
    assert (np.abs(moved - plain[:, shuffle]) < 1e-6).mean() > 0.95
