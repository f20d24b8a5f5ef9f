"""The arithmetic of formats: levels, groups, bits per weight, and what integers stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.calibration.quantisers import Format, Quantised
from medmoe_edge.errors import ConfigError


@pytest.mark.parametrize(
    ("form", "levels"),
    [
        (Format(2), (-2, 1)),
        (Format(4), (-8, 7)),
        (Format(8), (-127, 127)),  # so that it can negate
        (Format(2, symmetric=False), (0, 3)),
        (Format(8, symmetric=False), (0, 255)),
    ],
)
def test_levels(form: Format, levels: tuple[int, int]) -> None:
    assert form.levels == levels


@pytest.mark.parametrize(("bits", "group"), [(1, None), (9, 32), (0, None), (4, 0), (4, -32)])
def test_what_is_no_format(bits: int, group: int | None) -> None:
    with pytest.raises(ConfigError, match=f"{bits} bits in groups of {group} is no format"):
        Format(bits, group)


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert Format(4, 32).bits_per_weight(64) == 4 + 16 / 32
    assert Format(4, 128).bits_per_weight(256) == 4 + 16 / 128
    assert Format(4, 32, symmetric=False).bits_per_weight(64) == 4 + (16 + 4) / 32
    assert Format(8).bits_per_weight(64) == 8 + 32 / 64


def test_groups_must_divide_the_row() -> None:
    assert (Format(4, 32).groups(96), Format(4).groups(7)) == (3, 1)
    with pytest.raises(ConfigError, match="Rows of 48 weights do not divide into groups of 32"):
        Format(4, 32).groups(48)


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 2**31)
)
def test_integers_stand_for_their_distance_from_zero_in_steps(
    rows: int, groups: int, group: int, symmetric: bool, seed: int
) -> None:
    form = Format(4, group, symmetric)
    random = np.random.default_rng(seed)
    low, high = form.levels
    drawn = random.integers(low, high + 1, (rows, groups * group))
    integers = drawn.astype(np.int8) if symmetric else drawn.astype(np.uint8)
    scale = random.normal(size=(rows, groups)).astype(np.float16).astype(np.float32)
    zero = None if symmetric else random.integers(0, 16, (rows, groups)).astype(np.uint8)
    weight = Quantised(form, integers, scale, zero).dequantise()
    for n in range(rows):
        for k in range(groups * group):
            steps = int(integers[n, k]) - (0 if zero is None else int(zero[n, k // group]))
            assert weight[n, k] == np.float32(steps) * scale[n, k // group]
