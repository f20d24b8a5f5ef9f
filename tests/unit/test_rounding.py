"""Rounding against the definition in float64, and searched scales against plain ones."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medmoe_edge._types import Floats
from medmoe_edge.calibration.quantisers import (
    FLOOR,
    Format,
    Quantised,
    output_error,
    round_searched,
    round_to_nearest,
)
from medmoe_edge.errors import CheckpointError, ConfigError

Doubles = npt.NDArray[np.float64]
FORMATS = [
    Format(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((3, 4, 8), (None, 4), (True, False))
]
WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from((4, 8, 12))),
    elements=st.floats(-1e5, 1e5, width=32) | st.floats(-(2**-10), 2**-10, width=32),
)


def random_weight(seed: int = 0, shape: tuple[int, int] = (48, 128)) -> Floats:
    return (np.random.default_rng(seed).standard_t(5, shape) / 50).astype(np.float32)


def per_group(array: npt.NDArray[np.generic], quantised: Quantised) -> Doubles:
    """`[N, G, size]` in float64."""
    return array.astype(np.float64).reshape(*quantised.scale.shape, -1)


def check_storage(weight: Floats, quantised: Quantised) -> None:
    """What `Quantised` promises."""
    low, high = quantised.format.levels
    assert quantised.integers.shape == weight.shape
    assert quantised.integers.dtype == (np.int8 if quantised.format.symmetric else np.uint8)
    assert low <= quantised.integers.min()
    assert quantised.integers.max() <= high
    kind = np.float32 if quantised.format.group is None else np.float16
    scale = quantised.scale
    assert scale.shape == (len(weight), quantised.format.groups(weight.shape[1]))
    assert scale.dtype == np.float32
    assert (np.abs(scale) >= np.finfo(kind).tiny).all()
    np.testing.assert_array_equal(scale.astype(kind).astype(np.float32), scale)
    assert (quantised.zero is None) == quantised.format.symmetric
    if quantised.zero is not None:
        assert quantised.zero.shape == scale.shape
        assert quantised.zero.max() <= high


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(max_examples=40)
@given(weight=WEIGHTS)
def test_nearest_is_within_half_a_step(format: Format, weight: Floats) -> None:
    quantised = round_to_nearest(weight, format)
    check_storage(weight, quantised)
    assert (quantised.scale > 0).all()
    step = quantised.scale.astype(np.float64)[..., None]
    integers = per_group(quantised.integers, quantised)
    if quantised.zero is not None:
        integers -= quantised.zero[..., None]
    exact = per_group(weight, quantised)
    # half a step, and what rounding the scale itself to fp16 or fp32 cuts off the range
    loss = 2.0**-11 if format.group else 2.0**-22
    margin = np.abs(exact).max(-1, keepdims=True) * 2 * loss
    # rounding an asymmetric grid's zero moves the range by up to half a step
    reach = 0.5001 if format.symmetric else 1.0001
    assert (np.abs(integers * step - exact) <= step * reach + margin).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_no_level_is_wasted(format: Format) -> None:
    weight = random_weight() * 50
    quantised = round_to_nearest(weight, format)
    integers = per_group(quantised.integers, quantised)
    if format.pair_bound is not None:  # the largest weight or the largest pair is at its end
        pairs = np.abs(integers[..., ::2] + integers[..., 1::2]).max(-1)
        whole = np.abs(integers).max(-1) == format.levels[1]
        assert (whole | (pairs >= format.pair_bound - 1)).all()
    elif quantised.zero is None:
        assert (np.abs(integers).max(-1) == format.levels[1]).all()
    else:
        zero = quantised.zero.astype(np.float64)  # the range always includes 0
        used = np.maximum(integers.max(-1), zero) - np.minimum(integers.min(-1), zero)
        assert (used >= format.levels[1] - 1).all()


@settings(max_examples=40)
@given(WEIGHTS)
def test_symmetric_formats_can_negate(weight: Floats) -> None:
    for format in FORMATS:
        if format.symmetric:
            quantised, negated = round_to_nearest(weight, format), round_to_nearest(-weight, format)
            np.testing.assert_array_equal(negated.integers, -quantised.integers)
            np.testing.assert_array_equal(negated.scale, quantised.scale)


def test_rows_and_groups_do_not_share_a_scale() -> None:
    weight = np.array([[1, -0.5, 0, 0], [1000, 250, 2, -2], [0, 0, 0, 0]], np.float32)
    rows = round_to_nearest(weight, Format(8))
    # 1000 and 250 are a pair, which may sum to 128 steps; 1 and -0.5 have opposite signs
    np.testing.assert_array_equal(rows.integers, [[127, -64, 0, 0], [102, 26, 0, 0], [0] * 4])
    np.testing.assert_allclose(rows.scale, [[1 / 127], [1250 / 128], [1.0]], rtol=1e-6)
    pairs = round_to_nearest(weight, Format(4, 2))
    expected = np.array([[1 / 7, 1], [1000 / 7, 2 / 7], [1, 1]], np.float16)
    np.testing.assert_array_equal(pairs.scale, expected)
    np.testing.assert_array_equal(pairs.integers, [[7, -4, 0, 0], [7, 2, 7, -7], [0] * 4])


def test_an_asymmetric_grid_uses_all_levels_for_a_one_sided_group() -> None:
    weight = np.array([[0.0, 0.5, 1.0, 1.5], [-0.5, 0.0, 0.5, 1.0]], np.float32)
    quantised = round_to_nearest(weight, Format(2, 4, symmetric=False))
    np.testing.assert_array_equal(quantised.integers, [[0, 1, 2, 3], [0, 1, 2, 3]])
    assert quantised.zero is not None
    np.testing.assert_array_equal(quantised.zero, [[0], [1]])
    np.testing.assert_array_equal(quantised.dequantise(), weight)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("peak", [1e-45, 1e-40, 1.2e-38, 1e-7, 1e5, 3.4e38])
def test_extreme_weights_neither_overflow_nor_divide_by_zero(peak: float, format: Format) -> None:
    if not format.symmetric:
        peak = min(peak, 1e38)  # its rounded zero point may move the range beyond fp32
    weight = np.array([[peak, -peak, 0.0, peak / 3]], np.float32)
    if format.group and peak >= 1e38:
        with pytest.raises(CheckpointError, match="fp16"):
            round_to_nearest(weight, format)
        return
    for quantise in (round_to_nearest, round_searched):
        with np.errstate(all="raise", under="ignore"):
            quantised = quantise(weight, format)
        check_storage(weight, quantised)
        error = np.abs(quantised.dequantise().astype(np.float64) - weight)
        assert error.max() <= abs(float(quantised.scale[0, 0])) * 1.1


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_searched_scales_beat_plain_ones_in_every_group(format: Format) -> None:
    weight = random_weight()
    importance = np.random.default_rng(1).lognormal(0, 2, 128).astype(np.float32)
    floored = importance.astype(np.float64) + FLOOR * importance.mean()

    def errors(quantised: Quantised, weights: Doubles) -> Doubles:
        check_storage(weight, quantised)
        squared = (quantised.dequantise().astype(np.float64) - weight) ** 2
        return np.asarray(per_group(squared * weights, quantised).sum(-1))

    plain = round_to_nearest(weight, format)
    if format.symmetric and format.bits == 8:  # whose integers can negate
        assert (round_searched(weight, format).scale > 0).all()
    for given_importance, weights in ((None, np.ones(128)), (importance, floored)):
        least, before = (
            errors(quantised, weights)
            for quantised in (round_searched(weight, format, given_importance), plain)
        )
        assert (least <= before * (1 + 1e-5)).all()
        assert least.sum() < before.sum() * 0.99


def test_the_search_comes_near_the_best_grid() -> None:
    weight = random_weight(shape=(40, 32))
    squares = []
    for numerator in np.linspace(0.4, 1.2, 400, dtype=np.float32):
        extreme = np.take_along_axis(weight, np.abs(weight).argmax(1)[:, None], 1)
        for scale in (extreme / -8 * numerator, extreme / 8 * numerator):
            grid = np.clip(np.rint(weight / scale), -8, 7) * scale
            squares.append(((grid - weight) ** 2).sum(1))
    found = round_searched(weight, Format(4, 32)).dequantise()
    assert ((found - weight) ** 2).sum() <= np.min(squares, axis=0).sum() * 1.03


def test_the_largest_weight_goes_to_the_longer_side_whatever_its_sign() -> None:
    weight = np.array([[-0.5, 0.4375, 0.1875, 0.0625], [0.5, -0.4375, -0.1875, 0.0625]], np.float32)
    quantised = round_searched(weight, Format(4, 4))
    np.testing.assert_array_equal(quantised.dequantise(), weight)
    np.testing.assert_array_equal(quantised.integers, [[-8, 7, 3, 1], [-8, 7, 3, -1]])
    np.testing.assert_array_equal(quantised.scale, [[1 / 16], [-1 / 16]])


def test_important_inputs_are_kept_and_idle_ones_not_forgotten() -> None:
    weight = random_weight(shape=(16, 32))
    importance = np.zeros(32, np.float32)
    importance[3] = 1e-20  # its size does not matter, only its share
    before = np.abs(round_searched(weight, Format(3, 32)).dequantise() - weight)
    after = np.abs(round_searched(weight, Format(3, 32), importance).dequantise() - weight)
    assert after[:, 3].mean() < before[:, 3].mean() * 0.2
    assert after.mean() < before.mean() * 2  # not clipped to fit one input
    none = round_searched(weight, Format(3, 32), np.zeros(32, np.float32))
    np.testing.assert_array_equal(none.integers, round_searched(weight, Format(3, 32)).integers)


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = random_weight(), np.square(random_weight(1)[0])
    whole = [round_searched(weight, format, importance) for format in FORMATS]
    monkeypatch.setattr("medmoe_edge.calibration.quantisers.CHUNK", 1)
    for format, expected in zip(FORMATS, whole, strict=True):
        parts = round_searched(weight, format, importance)
        np.testing.assert_array_equal(parts.integers, expected.integers)
        np.testing.assert_array_equal(parts.scale, expected.scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantise", [round_to_nearest, round_searched])
def test_weights_that_are_not_finite_are_refused(
    quantise: Callable[[Floats, Format], Quantised], bad: float
) -> None:
    weight = random_weight(shape=(3, 8))
    weight[1, 2] = bad
    with pytest.raises(CheckpointError, match=r"3x8 matrix .* NaN or infinite"):
        quantise(weight, Format(4, 4))


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        round_to_nearest(np.ones((2, 6), np.float32), Format(4, 4))


@pytest.mark.parametrize("importance", [[1, np.nan], [1, np.inf], [1, -1], [1, 1, 1]])
def test_importance_must_be_one_share_per_input(importance: list[float]) -> None:
    with pytest.raises(ValueError, match="2 finite values"):
        round_searched(np.ones((2, 2), np.float32), Format(8), np.array(importance, np.float32))


def test_output_error_is_that_of_sampled_inputs() -> None:
    random = np.random.default_rng(2)
    weight, inputs = random_weight(), random.standard_normal((5000, 128)).astype(np.float32)
    inputs[:, 1:] += inputs[:, :1]
    quantised = round_to_nearest(weight, Format(4, 32))
    noise = inputs.astype(np.float64) @ (quantised.dequantise() - weight).T
    expected = np.sqrt((noise**2).sum() / ((inputs.astype(np.float64) @ weight.T) ** 2).sum())
    moments = inputs.T @ inputs / np.float32(len(inputs))
    assert output_error(weight, quantised, moments) == pytest.approx(expected, rel=1e-4)
    diagonal = np.diag(moments)
    alone = output_error(weight, quantised, diagonal)
    assert alone == pytest.approx(output_error(weight, quantised, np.diag(diagonal)), rel=1e-5)
    assert alone != pytest.approx(expected, rel=1e-2)


def test_output_error_of_weights_without_output() -> None:
    zeros, format = np.zeros((2, 4), np.float32), Format(8)
    assert output_error(zeros, round_to_nearest(zeros, format), np.ones(4, np.float32)) == 0
    other = round_to_nearest(zeros + 1, format)
    assert output_error(zeros, other, np.ones(4, np.float32)) == float("inf")
