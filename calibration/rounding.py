"""Rounding weights to a format: to nearest over each group's full range, or with searched scales.

Inside, the members of a group come first, `[size, M]` for M groups: the arithmetic then runs along
the groups, and one scale per group broadcasts for nothing.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from medmoe_edge.calibration.formats import Floats, Format, Quantised
from medmoe_edge.errors import CheckpointError

Grid = tuple[Floats, Floats]  # scale and zero point of M groups, `[M]` each
RATIOS = np.linspace(0.5, 1.15, 14, dtype=np.float32)  # of the range that keeps the largest weight
REFITS = 2
FLOOR = 0.01  # of the mean importance, for inputs that calibration hardly saw; as GPTQ damps
CHUNK = 2**17  # weights at once: few enough that the scratch stays in the cache


def round_to_nearest(weight: Floats, format: Format) -> Quantised:
    """Round `weight` `[N, K]` on the grid that just covers each group (or row): nothing is clipped.

    A group of zeros gets scale 1. Scales are rounded as they are stored (fp16 for groups) before
    the integers are chosen. Raises `CheckpointError` for weights that are not finite or exceed
    fp16 scales, `ConfigError` where groups do not fit.
    """
    return _by_chunks(weight, format, lambda grouped: _full_range(grouped, format))


def round_searched(weight: Floats, format: Format, importance: Floats | None = None) -> Quantised:
    """Round `weight` `[N, K]` on the grid that minimises sum_k importance_k (w_k - ŵ_k)^2.

    Per group: a search over clipping ratios (and the sign of the scale, or the zero point), as AWQ
    clips (arXiv 2306.00978) and HQQ needs no data, then least-squares refits of the scale, each
    kept only where better. Never worse than `round_to_nearest`, and raises the same errors.
    `importance` `[K]` is E[x_k^2] of the inputs; None counts all alike. An input that calibration
    never saw active still counts `FLOOR`: it may be active tomorrow.
    """
    width, groups = weight.shape[1], format.groups(weight.shape[1])
    members = shares(importance, width).reshape(groups, -1).T  # [size, G]

    def choose(grouped: Floats) -> Grid:
        with np.errstate(over="ignore"):  # infinite errors of weights beyond 1e19: never better
            return _search(grouped, np.tile(members, grouped.shape[1] // groups), format)

    return _by_chunks(weight, format, choose)


def output_error(weight: Floats, quantised: Quantised, moments: Floats) -> float:
    """Relative output error sqrt(E|(W - Ŵ) x|^2 / E|W x|^2).

    `moments` is E[x x^T] `[K, K]`, or its diagonal E[x_k^2] `[K]`, which takes inputs as
    uncorrelated. 0 where both vanish, infinite where only the output does.
    """

    def power(matrix: Floats) -> float:
        weighted = matrix @ moments if moments.ndim == 2 else matrix * moments
        return max(float(np.vdot(weighted.astype(np.float64), matrix)), 0.0)

    noise, signal = power(weight - quantised.dequantise()), power(weight)
    if signal == 0:
        return float("inf") if noise else 0.0
    return float(np.sqrt(noise / signal))


def shares(importance: Floats | None, width: int) -> Floats:
    """What each of `width` inputs counts, in parts of the mean, plus `FLOOR`; `[K]`, None: alike.

    Raises `ValueError` for an importance that is not finite or negative.
    """
    if importance is None:
        return np.ones(width, np.float32)
    if importance.shape != (width,) or not ((importance >= 0) & np.isfinite(importance)).all():
        raise ValueError(f"importance must hold {width} finite values, none negative")
    mean = importance.mean(dtype=np.float64) or 1.0
    return (importance / mean + FLOOR).astype(np.float32)


def _require_finite(weight: Floats, format: Format) -> None:
    """Raise `CheckpointError` if `weight` is not finite, or too large for the format's scales."""
    shape = "x".join(map(str, weight.shape))
    peak = float(np.maximum(weight.max(), -weight.min()))
    if not np.isfinite(peak):
        raise CheckpointError(
            f"A {shape} matrix holds weights that are NaN or infinite.",
            "The checkpoint is damaged: fetch or train it again.",
        )
    span = peak if format.symmetric else 2 * peak
    if span / format.levels[1] > float(_storage(format).max):
        raise CheckpointError(
            f"A {shape} matrix holds a weight of {peak:g}, beyond what fp16 scales can express.",
            "Quantise it to 8 bits per row, or check the checkpoint.",
        )


def _by_chunks(weight: Floats, format: Format, choose: Callable[[Floats], Grid]) -> Quantised:
    """Quantise some rows at a time on the grids that `choose` gives their groups `[size, M]`.

    Several threads share the rows: numpy lets go of Python's lock while it computes.
    """
    _require_finite(weight, format)
    rows, width = shape = weight.shape
    groups = format.groups(width)
    integers = np.empty(shape, np.int8) if format.symmetric else np.empty(shape, np.uint8)
    scales, zeros = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.uint8)
    step = max(1, CHUNK // width, 128 // groups)

    def quantise(start: int) -> None:
        part = slice(start, start + step)
        grouped = np.ascontiguousarray(weight[part].reshape(-1, width // groups).T)
        scale, zero = choose(grouped)
        stored = _steps(grouped, scale, zero, format) + zero
        integers[part] = stored.astype(integers.dtype).T.reshape(-1, width)
        scales[part], zeros[part] = scale.reshape(-1, groups), zero.reshape(-1, groups)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(quantise, range(0, rows, step)))  # the list raises what a thread raised
    return Quantised(format, integers, scales, None if format.symmetric else zeros)


def _steps(grouped: Floats, scale: Floats, zero: Floats, format: Format) -> Floats:
    """The nearest whole steps from zero that the format can store, `[size, M]`."""
    low, high = format.levels
    steps = np.divide(grouped, scale)
    np.rint(steps, out=steps)
    return np.clip(steps, low - zero, high - zero, out=steps)


def _full_range(grouped: Floats, format: Format) -> Grid:
    high = format.levels[1]
    if format.symmetric:
        scale = _storable(np.maximum(grouped.max(0), -grouped.min(0)) / high, format)
        return scale, np.zeros_like(scale)
    top, bottom = np.maximum(grouped.max(0), 0), np.minimum(grouped.min(0), 0)
    scale = _storable(top / high - bottom / high, format)
    return scale, np.clip(np.rint(-bottom / scale), 0, high)


def _storage(format: Format) -> "np.finfo[np.float16] | np.finfo[np.float32]":
    return np.finfo(np.float32) if format.group is None else np.finfo(np.float16)


def _storable(scale: Floats, format: Format) -> Floats:
    """`scale` as it will be stored: never 0, infinite or subnormal; 0 becomes 1."""
    kind = _storage(format)
    magnitude = np.clip(np.abs(scale), np.float32(kind.tiny), np.float32(kind.max))
    kept = np.where(scale == 0, np.float32(1), np.copysign(magnitude, scale))
    return kept.astype(kind.dtype).astype(np.float32)


def _candidates(grouped: Floats, format: Format) -> Iterator[Grid]:
    low, high = format.levels
    if not format.symmetric:
        scale, zero = _full_range(grouped, format)
        for shift in (0, -1, 1):
            for ratio in RATIOS:
                yield _storable(scale * ratio, format), np.clip(zero + shift, 0, high)
        return
    top, bottom = grouped.max(0), grouped.min(0)
    if low == -high:
        ends = [np.maximum(top, -bottom) / high]
    else:  # there is one more negative step: it takes the largest weight, or its opposite
        end = np.where(top > -bottom, top, bottom) / low
        ends = [end, -end]
    for scale in ends:
        for ratio in RATIOS:
            yield _storable(scale * ratio, format), np.zeros_like(scale)


def _search(grouped: Floats, importance: Floats, format: Format) -> Grid:
    """The best grid of each group by the weighted squared error; `importance` `[size, M]`."""
    scale, zero = _full_range(grouped, format)
    least = _error(grouped, importance, scale, zero, format)

    def offer(new_scale: Floats, new_zero: Floats) -> None:
        error = _error(grouped, importance, new_scale, new_zero, format)
        better = error < least
        for kept, new in ((scale, new_scale), (zero, new_zero), (least, error)):
            np.copyto(kept, new, where=better)

    for candidate in _candidates(grouped, format):
        offer(*candidate)
    for _ in range(REFITS):
        steps = _steps(grouped, scale, zero, format)
        weighted = steps * importance
        energy = np.einsum("sm,sm->m", weighted, steps)
        fitted = np.einsum("sm,sm->m", weighted, grouped) / np.where(energy > 0, energy, 1)
        offer(_storable(fitted, format), zero)
    return scale, zero


def _error(
    grouped: Floats, importance: Floats, scale: Floats, zero: Floats, format: Format
) -> Floats:
    difference = _steps(grouped, scale, zero, format)
    difference *= scale
    difference -= grouped
    difference *= difference
    difference *= importance
    return np.asarray(difference.sum(0))
