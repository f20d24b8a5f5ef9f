"""Migration scales: the formulas, and the expected noise against a simulation in float64."""

import numpy as np
import pytest

from medmoe_edge._types import Floats
from medmoe_edge.calibration.methods import (
    LARGEST,
    STRENGTHS,
    expected_noise,
    migration_scale,
    search_migration,
)
from medmoe_edge.calibration.quantisers import Format, round_to_nearest

WIDTH = 96


def weights(seed: int = 0) -> list[Floats]:
    """Two matrices that share their inputs."""
    random = np.random.default_rng(seed)
    return [random.normal(0, 0.1, (rows, WIDTH)).astype(np.float32) for rows in (40, 24)]


def inputs(outliers: float, tokens: int = 4000) -> Floats:
    """`[T, K]`, uniform within bounds that differ by channel; three of them `outliers` times."""
    random = np.random.default_rng(1)
    size = random.lognormal(0, 0.3, WIDTH)
    size[[5, 50, 77]] *= outliers
    shift = random.uniform(-0.5, 1.0, WIDTH)
    return ((random.uniform(-1, 1, (tokens, WIDTH)) + shift) * size).astype(np.float32)


def statistics(x: Floats) -> tuple[Floats, Floats, Floats]:
    return x.min(0), x.max(0), np.square(x).mean(0)


def simulated_noise(x: Floats, matrices: list[Floats], scale: Floats) -> float:
    """The mean over tokens of the squared output error that W8A8 really makes."""
    exact, scaled = x.astype(np.float64), x.astype(np.float64) / scale
    low, high = min(scaled.min(), 0.0), max(scaled.max(), 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(scaled / step) + zero, 0, 255) - zero) * step
    total = 0.0
    for weight in matrices:
        stored = round_to_nearest(weight * scale, Format(8)).dequantise().astype(np.float64)
        total += float(((rounded @ stored.T - exact @ weight.T) ** 2).sum(1).mean())
    return total


def test_migration_scale_is_the_formula_up_to_a_factor() -> None:
    random = np.random.default_rng(0)
    act, weight = (random.lognormal(0, 1, 50).astype(np.float32) for _ in range(2))
    for strength in (0.0, 0.3, 1.0):
        scale = migration_scale(act, weight, strength)
        ratio = scale / (act**strength / weight ** (1 - strength))
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        assert np.log(scale).mean() == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(np.ptp(act / migration_scale(act, weight, 1.0)), 0, atol=1e-5)
    np.testing.assert_allclose(np.ptp(weight * migration_scale(act, weight, 0.0)), 0, atol=1e-5)


def test_channels_without_signal_are_left_alone() -> None:
    act = np.array([0, 1, 100, 1, 3e38, 1e-45], np.float32)
    weight = np.array([1, 0, 1, 1, 1e-45, 3e38], np.float32)
    for strength in (0.0, 0.5, 1.0):
        scale = migration_scale(act, weight, strength)
        np.testing.assert_array_equal(scale[:2], 1)
        assert scale.dtype == np.float32
        assert (scale >= np.float32(1 / LARGEST)).all()
        assert (scale <= np.float32(LARGEST)).all()
        assert scale[2] >= scale[3]
    nothing = np.zeros(4, np.float32)
    np.testing.assert_array_equal(migration_scale(nothing, nothing, 0.5), 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_magnitudes_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        migration_scale(np.array([1, bad], np.float32), np.ones(2, np.float32), 0.5)


@pytest.mark.parametrize("outliers", [1.0, 30.0])
@pytest.mark.parametrize("strength", [None, 0.0, 0.5, 1.0])
def test_expected_noise_is_what_a_simulation_finds(outliers: float, strength: float | None) -> None:
    x = inputs(outliers, tokens=500)
    low, high, mean_square = statistics(x)
    scale = np.ones(WIDTH, np.float32)
    expected, simulated = 0.0, 0.0
    for seed in range(8):  # weights are rounded once: only many of them have an expectation
        matrices = weights(seed)
        if strength is not None:
            peaks = np.abs(np.concatenate(matrices)).max(0)
            scale = migration_scale(np.maximum(high, -low), peaks, strength)
        expected += expected_noise(low, high, mean_square, matrices, scale)
        simulated += simulated_noise(x, matrices, scale)
    assert simulated == pytest.approx(expected, rel=0.06)


def test_the_range_of_activations_includes_zero() -> None:
    one, weight = np.ones(1, np.float32), np.zeros((1, 1), np.float32) + 1
    noise = expected_noise(one * 9, one * 10, 0 * one, [weight], one)
    assert noise == pytest.approx((10 / 255) ** 2 / 12)
    noise = expected_noise(one * -10, one * -9, 0 * one, [weight], one)
    assert noise == pytest.approx((10 / 255) ** 2 / 12)


def test_the_search_finds_the_strength_of_least_simulated_noise() -> None:
    x, matrices = inputs(outliers=30), weights()
    strength, scale = search_migration(*statistics(x), matrices)
    plain = simulated_noise(x, matrices, np.ones(WIDTH, np.float32))
    peaks = np.abs(np.concatenate(matrices)).max(0)
    tried = [migration_scale(np.abs(x).max(0), peaks, each) for each in STRENGTHS]
    least = min(simulated_noise(x, matrices, each) for each in tried)
    found = simulated_noise(x, matrices, scale)
    assert strength is not None
    np.testing.assert_array_equal(scale, tried[STRENGTHS.index(strength)])
    assert found <= 1.1 * least
    assert found < 0.1 * plain


def test_nothing_is_folded_where_folding_only_harms() -> None:
    low, high = np.array([-0.2, -0.2], np.float32), np.array([1.4, 0.0], np.float32)
    mean_square = np.array([0.21, 0.003], np.float32)
    weight = np.array([[1.2, 0.1], [0.3, 0.3]], np.float32)
    strength, scale = search_migration(low, high, mean_square, [weight])
    assert strength is None
    np.testing.assert_array_equal(scale, 1)
    least = expected_noise(low, high, mean_square, [weight], scale)
    for each in STRENGTHS:
        folded = migration_scale(np.maximum(high, -low), weight.max(0), each)
        assert expected_noise(low, high, mean_square, [weight], folded) >= least
