"""The int8 quantiser against the definition in float64."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medmoe_edge.calibration.int8 import quantise_per_channel

WEIGHTS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=4, max_side=6),
    elements=st.floats(-1e6, 1e6, width=32),
)


def channels(array: npt.NDArray[np.generic], axis: int) -> npt.NDArray[np.float64]:
    """`[C, values]` in float64."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)


@given(WEIGHTS, st.data())
def test_every_channel_is_as_near_as_its_scale_allows(
    weight: npt.NDArray[np.float32], data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, weight.ndim - 1))
    integers, scale = quantise_per_channel(weight, axis)
    assert (integers.dtype.name, integers.shape) == ("int8", weight.shape)
    assert (scale.dtype.name, scale.shape) == ("float32", (weight.shape[axis],))
    exact, step = channels(weight, axis), scale.astype(np.float64)[:, None]
    error = np.abs(channels(integers, axis) * step - exact)
    # half a step; the margin is for the division in fp32
    assert (error <= step * (0.5 + 1e-4)).all()
    assert integers.min() >= -127
    peak = np.abs(exact).max(1)
    normal = peak > 1e-35
    np.testing.assert_allclose(scale[normal], peak[normal] / 127, rtol=1e-6)
    # no bit is wasted: each channel's peak is the largest integer
    assert (np.abs(channels(integers, axis)).max(1)[normal] == 127).all()


@given(WEIGHTS)
def test_negation_is_symmetric(weight: npt.NDArray[np.float32]) -> None:
    integers, scale = quantise_per_channel(weight, 0)
    negated, same = quantise_per_channel(-weight, 0)
    np.testing.assert_array_equal(negated, -integers)
    np.testing.assert_array_equal(same, scale)


def test_channels_do_not_share_a_scale() -> None:
    weight = np.array([[1.0, 1000.0, 0.0], [-0.5, 250.0, 0.0]], np.float32)
    integers, scale = quantise_per_channel(weight, axis=1)
    np.testing.assert_array_equal(integers, [[127, 127, 0], [-64, 32, 0]])
    np.testing.assert_allclose(scale, [1 / 127, 1000 / 127, 1.0], rtol=1e-6)


@pytest.mark.parametrize("peak", [1e-45, 1e-40, 1.2e-38, 3.4e38])
def test_extreme_values_neither_overflow_nor_divide_by_zero(peak: float) -> None:
    weight = np.array([[peak, -peak, 0.0, peak / 3]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        integers, scale = quantise_per_channel(weight, axis=0)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    error = np.abs(integers * scale.astype(np.float64)[:, None] - weight.astype(np.float64))
    assert error.max() <= float(scale[0]) * 0.5001
    assert integers[0, 0] == -integers[0, 1]
