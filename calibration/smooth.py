"""Scales that move difficulty between activations and weights: W x = (W diag(s)) (x / s).

The division folds into the norm or matrix before. W8A8 divides outliers of x, which would stretch
the one scale of all its channels (SmoothQuant, arXiv 2211.10438). Scaling 4-bit weights up where x
is large (AWQ, arXiv 2306.00978) was tried and lost to GPTQ on every model here: see
`tests/stress/stress_methods.py`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Doubles, Floats
from medmoe_edge.calibration.quantisers import Format, full_range_scales

INT8 = Format(8)
STRENGTHS = tuple(round(0.05 * step, 2) for step in range(21))
LARGEST = 1e4  # scale of a channel, against the geometric mean; its reciprocal is the smallest


def migration_scale(act_absmax: Floats, weight_absmax: Floats, strength: float) -> Floats:
    """SmoothQuant's s_k = act_k^strength / weight_k^(1 - strength) `[K]`, of geometric mean 1.

    `act_absmax` and `weight_absmax` `[K]` are the largest magnitudes of each input channel and of
    the weights that it meets. Channels never active, or met by zeros only, get 1. Raises
    `ValueError` if a magnitude is not finite.
    """
    if not np.isfinite(act_absmax + weight_absmax).all():
        raise ValueError("the magnitudes of activations and weights must be finite")
    used = (act_absmax > 0) & (weight_absmax > 0)
    logs = strength * np.log(act_absmax[used], dtype=np.float64)
    logs -= (1 - strength) * np.log(weight_absmax[used], dtype=np.float64)
    return _normalised(logs, used)


def expected_noise(
    low: Floats, high: Floats, mean_square: Floats, weights: Sequence[Floats], scale: Floats
) -> float:
    """Expected sum over all outputs of the squared error that W8A8 makes after folding `scale`.

    Rounding to steps of d adds noise of variance d^2 / 12, taken as independent. For each
    W `[N, K]` of `weights`, whose common inputs x_k lie in `low_k`..`high_k` `[K]` and have
    E[x_k^2] = `mean_square_k`:

    - x / s is rounded on one asymmetric 8-bit grid for all channels, which includes 0, with
      step = (max_k high_k / s_k - min_k low_k / s_k) / 255. Its noise passes through W diag(s):
      step^2 / 12 * sum_nk (W_nk s_k)^2.
    - Row n of W diag(s) is rounded symmetrically over its full range, with
      step_n = max_k |W_nk| s_k / 127, or more where pairs of neighbours ask for it
      (`Format.pair_bound`). Its noise multiplies the inputs:
      step_n^2 / 12 * sum_k E[x_k^2] / s_k^2, less the k of the maximum where that decides, which is
      exact then.

    The product of both noises is left out.
    """
    s = scale.astype(np.float64)
    span = max((high / s).max(), 0.0) - min((low / s).min(), 0.0)
    power = mean_square / s**2
    noise = 0.0
    for weight in weights:
        passed = np.einsum("nk,nk->k", weight, weight) @ s**2
        scaled = np.asarray(weight * scale, np.float32)
        largest = np.abs(scaled).argmax(1)
        steps = full_range_scales(scaled, INT8).astype(np.float64)
        decides = np.abs(scaled[np.arange(len(weight)), largest]) > 126.5 * steps
        noise += (span / 255) ** 2 * float(passed) + float(
            steps**2 @ (power.sum() - np.where(decides, power[largest], 0))
        )
    return noise / 12


def search_migration(
    low: Floats, high: Floats, mean_square: Floats, weights: Sequence[Floats]
) -> tuple[float | None, Floats]:
    """The migration strength of least `expected_noise` (same arguments), and its scale `[K]`.

    The strength is None, and the scale 1, where folding anything would only do harm.
    """
    act_absmax = np.maximum(high, -low)
    weight_absmax = np.max([np.abs(weight).max(0) for weight in weights], axis=0)
    best: tuple[float | None, Floats] = None, np.ones_like(act_absmax)
    least = expected_noise(low, high, mean_square, weights, best[1])
    for strength in STRENGTHS:
        scale = migration_scale(act_absmax, weight_absmax, strength)
        noise = expected_noise(low, high, mean_square, weights, scale)
        if noise < least:
            least, best = noise, (strength, scale)
    return best


def _normalised(logs: Doubles, used: npt.NDArray[np.bool_] | None = None) -> Floats:
    """Scales of geometric mean 1 from their logarithms; 1 for channels that are not `used`."""
    scale = np.ones(len(logs) if used is None else len(used), np.float32)
    if logs.size:
        bound = np.log(LARGEST)
        centred = np.clip(logs - logs.mean(), -bound, bound)
        scale[... if used is None else used] = np.exp(centred)
    return scale
