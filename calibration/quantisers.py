"""Quantised weights: their formats, and how weights are rounded to them.

Matrices are `[N, K]` here, output channels first, as checkpoints store them; a group is `group`
neighbours along K that share one scale.

Rounding weights to a format: to nearest over each group's full range, or with searched scales.

Where a format bounds the sum of neighbours (`Format.pair_bound`), every choice of integers keeps
it: a pair beyond it gives way where that costs least, and scales are searched with that error
counted. Rounding over the full range takes scales so large that no pair has to give way.

Forms of deltas: how what an expert adds to the meta expert is stored, in few bits or a low rank.
And what shares a scale of a vision transformer's activations in 8 bits.

Inside, the members of a group come first, `[size, M]` for M groups: the arithmetic then runs along
the groups, and one scale per group broadcasts for nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.config import VisionScales
from medmoe_edge.errors import CheckpointError, ConfigError, InputError

PAIR_BOUND = 128  # the largest with 255 * PAIR_BOUND < 2^15
SCALE_BITS = {True: 16, False: 32}  # grouped scales are kept in fp16, those of channels in fp32


@dataclass(frozen=True)
class Format:
    """`bits` per weight; one scale per `group` weights of a row, or per row (None)."""

    bits: int
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or (self.group is not None and self.group < 1):
            raise ConfigError(
                f"{self.bits} bits in groups of {self.group} is no format.", "Use 2 to 8 bits."
            )

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer; symmetric int8 leaves -128 out, so that it can negate."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (-half + (self.bits == 8), half - 1)

    @property
    def pair_bound(self) -> int | None:
        """Largest magnitude of the sum of integers 2i and 2i + 1 of a row; None: any is allowed.

        8-bit rows with one scale each run as W8A8 `DynamicQuantizeMatMul`. On processors without
        VNNI (AVX2, AVX-512) its kernel multiplies unsigned 8-bit activations by signed 8-bit
        weights with `vpmaddubsw`, which adds the products of two neighbours along K in 16 bits
        *with saturation*. The largest activation is 255, so the sum is exact for any activations
        if and only if 255 * |w_2i + w_2i+1| < 2^15, that is <= 128; integers of opposite signs
        cannot exceed it. Elsewhere (VNNI, AMX, NEON, SSE) sums are wider, and nothing is lost.
        """
        return PAIR_BOUND if self.bits == 8 and self.group is None and self.symmetric else None

    def groups(self, width: int) -> int:
        """Scales per row of `width` weights; raises `ConfigError` where groups do not fit."""
        if self.group is None:
            return 1
        if width % self.group:
            raise ConfigError(
                f"Rows of {width} weights do not divide into groups of {self.group}.",
                "Choose a group size that divides every matrix, such as 32.",
            )
        return width // self.group

    def bits_per_weight(self, width: int) -> float:
        """Stored bits per weight in rows of `width`, scales and zero points included."""
        per_group = SCALE_BITS[self.group is not None] + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.groups(width) / width


@dataclass(frozen=True)
class Quantised:
    """`(integers - zero) * scale` stands for the weight.

    `integers` `[N, K]` are int8 (symmetric) or uint8, `scale` `[N, G]` finite and positive or
    negative, never 0, exact in fp16 where the format has groups; `zero` `[N, G]` uint8, None where
    symmetric.
    """

    format: Format
    integers: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scale: Floats
    zero: npt.NDArray[np.uint8] | None = None

    def dequantise(self) -> Floats:
        """The weight it stands for, `[N, K]`."""
        rows, width = self.integers.shape
        grouped = self.integers.reshape(rows, self.scale.shape[1], -1).astype(np.float32)
        if self.zero is not None:
            grouped -= self.zero[..., None]
        return (grouped * self.scale[..., None]).reshape(rows, width)


Grid = tuple[Floats, Floats]  # scale and zero point of M groups, `[M]` each
RATIOS = np.linspace(0.5, 1.15, 14, dtype=np.float32)  # of the range that keeps the largest weight

# Of the range that also keeps every pair: near it a few pairs give way, so that the ratio matters.
PAIR_RATIOS = np.linspace(0.7, 1.05, 29, dtype=np.float32)
REFITS = 2
FLOOR = 0.01  # of the mean importance, for inputs that calibration hardly saw; as GPTQ damps
CHUNK = 2**17  # weights at once: few enough that the scratch stays in the cache


def round_to_nearest(weight: Floats, format: Format) -> Quantised:
    """Round `weight` `[N, K]` on the grid that just covers each group (or row): nothing is clipped.

    Where the format bounds pairs, the grid covers their sums too: its steps are then up to twice as
    large (typically 1.3 times), and still every weight is rounded to the nearest of them. A group
    of zeros gets scale 1. Scales are rounded as they are stored (fp16 for groups) before the
    integers are chosen. Raises `CheckpointError` for weights that are not finite or exceed
    fp16 scales, `ConfigError` where groups do not fit.
    """
    members = _members(None, weight, format)
    return _by_chunks(weight, format, members, lambda grouped, _: _full_range(grouped, format))


def full_range_scales(weight: Floats, format: Format) -> Floats:
    """The scales `[N]` that `round_to_nearest` takes for the rows of `[N, K]`, without groups."""
    return _full_range(np.ascontiguousarray(weight.T), format)[0]


def round_searched(weight: Floats, format: Format, importance: Floats | None = None) -> Quantised:
    """Round `weight` `[N, K]` on the grid that minimises sum_k importance_k (w_k - ŵ_k)^2.

    Per group: a search over clipping ratios (and the sign of the scale, or the zero point), as AWQ
    clips (arXiv 2306.00978) and HQQ needs no data, then least-squares refits of the scale, each
    kept only where better; where the format bounds pairs, with what giving way costs. Never worse
    than `round_to_nearest`, and raises the same errors. `importance` `[K]` is E[x_k^2] of the
    inputs; None counts all alike. An input that calibration never saw active still counts `FLOOR`:
    it may be active tomorrow.
    """

    def choose(grouped: Floats, importance: Floats) -> Grid:
        with np.errstate(over="ignore"):  # infinite errors of weights beyond 1e19: never better
            return _search(grouped, importance, format)

    return _by_chunks(weight, format, _members(importance, weight, format), choose)


def output_error(weight: Floats, quantised: Quantised, moments: Floats) -> float:
    """The `relative_error` of a quantised weight."""
    return relative_error(weight, quantised.dequantise(), moments)


def relative_error(weight: Floats, stand_in: Floats, moments: Floats) -> float:
    """Relative output error sqrt(E|(W - Ŵ) x|^2 / E|W x|^2) of Ŵ `[N, K]` in the place of W.

    `moments` is E[x x^T] `[K, K]`, or its diagonal E[x_k^2] `[K]`, which takes inputs as
    uncorrelated. 0 where both vanish, infinite where only the output does.
    """

    def power(matrix: Floats) -> float:
        weighted = matrix @ moments if moments.ndim == 2 else matrix * moments
        return max(float(np.vdot(weighted.astype(np.float64), matrix)), 0.0)

    noise, signal = power(weight - stand_in), power(weight)
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


def _members(importance: Floats | None, weight: Floats, format: Format) -> Floats:
    """`shares` by the groups of a row, `[size, G]`."""
    width = weight.shape[1]
    return shares(importance, width).reshape(format.groups(width), -1).T


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


def _by_chunks(
    weight: Floats, format: Format, members: Floats, choose: Callable[[Floats, Floats], Grid]
) -> Quantised:
    """Quantise some rows at a time on the grids that `choose` gives their groups `[size, M]`.

    `choose` is given the groups and what each member counts. Several threads share the rows: numpy
    lets go of Python's lock while it computes.
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
        importance = np.tile(members, grouped.shape[1] // groups)
        scale, zero = choose(grouped, importance)
        stored = _steps(grouped, importance, scale, zero, format) + zero
        integers[part] = stored.astype(integers.dtype).T.reshape(-1, width)
        scales[part], zeros[part] = scale.reshape(-1, groups), zero.reshape(-1, groups)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(quantise, range(0, rows, step)))  # the list raises what a thread raised
    return Quantised(format, integers, scales, None if format.symmetric else zeros)


def _steps(
    grouped: Floats, importance: Floats, scale: Floats, zero: Floats, format: Format
) -> Floats:
    """The nearest whole steps from zero that the format can store, `[size, M]`."""
    low, high = format.levels
    steps = np.divide(grouped, scale)
    np.rint(steps, out=steps)
    np.clip(steps, low - zero, high - zero, out=steps)
    if format.pair_bound is not None:
        _bound_pairs(steps, grouped, importance, scale, format.pair_bound)
    return steps


def _bound_pairs(
    steps: Floats, grouped: Floats, importance: Floats, scale: Floats, bound: int
) -> None:
    """Make pairs of neighbours whose sum is beyond the bound give way, in place.

    Each becomes the pair of integers within the bound whose weighted squared error is least. It
    lies on the bound, where that error is a parabola: its minimum, rounded.
    """
    pair, column = np.nonzero(np.abs(steps[:-1:2] + steps[1::2]) > bound)
    if not len(pair):
        return
    first, second = 2 * pair, 2 * pair + 1
    sign = np.sign(steps[first, column])  # both are of one sign
    high = np.float32(bound - 1)
    unit = sign * scale[column]
    # beyond some times the range, how far makes no difference
    x, y = (np.minimum(grouped[row, column] / unit, 8 * high) for row in (first, second))
    share = importance[second, column] / (importance[first, column] + importance[second, column])
    kept = np.clip(np.rint(x - (x + y - bound) * share), 1, high)
    steps[first, column] = sign * kept
    steps[second, column] = sign * (bound - kept)


def _full_range(grouped: Floats, format: Format) -> Grid:
    high = format.levels[1]
    if format.symmetric:
        peak = np.maximum(grouped.max(0), -grouped.min(0)) / high
        scale = _storable(np.maximum(peak, _pair_range(grouped, format)), format)
        return scale, np.zeros_like(scale)
    top, bottom = np.maximum(grouped.max(0), 0), np.minimum(grouped.min(0), 0)
    scale = _storable(top / high - bottom / high, format)
    return scale, np.clip(np.rint(-bottom / scale), 0, high)


def _pair_range(grouped: Floats, format: Format) -> Floats:
    """The least scales `[M]` by which no pair of neighbours is beyond the format's bound."""
    if format.pair_bound is None or len(grouped) < 2:
        return np.zeros(grouped.shape[1], np.float32)
    half_sums = grouped[:-1:2] / 2
    half_sums += grouped[1::2] / 2  # the sums may be beyond fp32
    return np.asarray(np.abs(half_sums, out=half_sums).max(0) / np.float32(format.pair_bound / 2))


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
        ends = [np.maximum(np.maximum(top, -bottom) / high, _pair_range(grouped, format))]
    else:  # there is one more negative step: it takes the largest weight, or its opposite
        end = np.where(top > -bottom, top, bottom) / low
        ends = [end, -end]
    for scale in ends:
        for ratio in RATIOS if format.pair_bound is None else PAIR_RATIOS:
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
        steps = _steps(grouped, importance, scale, zero, format)
        weighted = steps * importance
        energy = np.einsum("sm,sm->m", weighted, steps)
        fitted = np.einsum("sm,sm->m", weighted, grouped) / np.where(energy > 0, energy, 1)
        offer(_storable(fitted, format), zero)
    return scale, zero


def _error(
    grouped: Floats, importance: Floats, scale: Floats, zero: Floats, format: Format
) -> Floats:
    difference = _steps(grouped, importance, scale, zero, format)
    difference *= scale
    difference -= grouped
    difference *= difference
    difference *= importance
    return np.asarray(difference.sum(0))


VISION_INT8 = "8-bit weights and activations in groups of 32; the rest as fp16 weights"
VISION_TOKENS = (
    "int8 weights per output channel, dynamic 8-bit activations with a scale per token (W8A8); the "
    "projector in groups of 32; the rest as fp16 weights"
)
VISION_IN_8_BITS: dict[VisionScales, str] = {"groups": VISION_INT8, "tokens": VISION_TOKENS}
DELTA_GROUP = 32  # weights of a delta in few bits that share a scale
DELTA_BITS = (2, 4, 8)
RANK_PARTS = (32, 16, 8, 4)  # of a matrix's narrower side, beyond which bits cost less
AUTO_BITS = 4.5  # of a weight: what the form of 4 bits takes with its scales
MOST_BITS = 16.0  # what a weight takes that is not quantised: no mixture of our formats is larger


@dataclass(frozen=True)
class DeltaForm:
    """How what experts add to the meta expert is stored.

    Attributes:
        rank: As two matrices of so many columns and rows; None: whole.
        bits: Of a weight, in groups of 32; None: those of the other matrices.
        budget: Bits of a weight, on average, within which each matrix gets a rank or bits of its
            own; None: all have these.
    """

    rank: int | None = None
    bits: int | None = None
    budget: float | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, ["deltas from the meta expert", self.stored]))

    @property
    def stored(self) -> str:
        """What each matrix takes, in words; empty where it is as others are."""
        told = [f"rank {self.rank}"] if self.rank else []
        told += [f"{self.bits} bits in groups of 32"] if self.bits else []
        told += [f"a form for each within {self.budget:g} bits a weight"] if self.budget else []
        return ", ".join(told)


def read_deltas(text: str) -> DeltaForm:
    """`delta`, `delta:rank=R`, `delta:bits=B`, `delta:auto` or `delta:auto=BITS`.

    Raises `InputError` for anything else.
    """
    kind, _, choice = text.partition(":")
    name, _, value = choice.partition("=")
    number = int(value) if value.isascii() and value.isdigit() else 0
    if text == "delta":
        return DeltaForm()
    if kind == "delta" and name == "rank" and number:
        return DeltaForm(rank=number)
    if kind == "delta" and name == "bits" and number in DELTA_BITS:
        return DeltaForm(bits=number)
    if kind == "delta" and name == "auto" and (budget := _budget(choice, value)):
        return DeltaForm(budget=budget)
    raise InputError(
        f"{text!r} is no form of experts.",
        "Use delta, delta:rank=R with R of 1 or more, delta:bits=B with B of "
        f"{', '.join(map(str, DELTA_BITS))}, or delta:auto=BITS with up to {MOST_BITS:g} bits.",
    )


def _budget(choice: str, value: str) -> float | None:
    """Bits of a weight that `auto` or `auto=BITS` allows; None where they are none."""
    if choice == "auto":
        return AUTO_BITS
    try:
        bits = float(value)
    except ValueError:
        return None
    return bits if 0 < bits <= MOST_BITS else None


@dataclass(frozen=True)
class DeltaChoice:
    """A form that the delta of one matrix of so many `channels` may get.

    `factors` is the format of the two matrices of a low rank; None: fp32.
    """

    form: DeltaForm
    channels: int
    factors: Format | None

    def bits_per_weight(self, width: int) -> float:
        """Stored bits per weight of the whole matrix in rows of `width`, scales included."""
        if self.form.bits is not None:
            return Format(self.form.bits, DELTA_GROUP).bits_per_weight(width)
        rank = self.form.rank or 0
        first, second = (
            32.0 if self.factors is None else self.factors.bits_per_weight(read)
            for read in (width, rank)
        )
        return rank * (width * first + self.channels * second) / (width * self.channels)

    def rebuilt(
        self,
        added: Floats,
        factors: tuple[Floats, Floats],
        rounded: Callable[[Floats, Format], Floats],
    ) -> Floats:
        """What it makes of rows `[n, K]` of a delta.

        `factors` `[K, R]` and `[R, n]` are those of the largest rank, the best first; `rounded`
        gives rows as they are in a format.
        """
        if self.form.bits is not None:
            return rounded(added, Format(self.form.bits, DELTA_GROUP))
        a, b = (
            np.ascontiguousarray(rows)
            for rows in (factors[0][:, : self.form.rank].T, factors[1][: self.form.rank].T)
        )
        if self.factors is not None:
            a, b = rounded(a, self.factors), rounded(b, self.factors)
        return b @ a


def delta_choices(shape: Sequence[int], factors: Format | None) -> list[DeltaChoice]:
    """The forms that fit a matrix `[channels, width]`; `factors` as of `DeltaChoice`."""
    channels, width = shape
    step = factors.group or 1 if factors else 1
    ranks = {min(shape) // part // step * step for part in RANK_PARTS} - {0}
    forms = [DeltaForm(rank=rank) for rank in sorted(ranks)]
    if width % DELTA_GROUP == 0:
        forms += [DeltaForm(bits=bits) for bits in DELTA_BITS]
    return [DeltaChoice(form, channels, factors) for form in forms]
