"""What looks for better integers: GPTQ, scales that move difficulty, and mixed precision.

GPTQ (arXiv 2210.17323) rounds each column so as to cancel the errors of those before it. The output
error of W + D on inputs of second moments H is tr(D H D^T). With H = R R^T, R upper triangular,
that is |D R|^2, and its column j holds D_j R_jj plus what columns i < j left over: sum_i<j D_i
R_ij. So column j is best rounded at W_j + sum_i<j D_i R_ij / R_jj. This is GPTQ's update exactly
(its U, the Cholesky factor of the inverse, is R^-1; see arXiv 2507.18553, where it is Babai's
nearest-plane algorithm), without the inverse.

Migration: W x = (W diag(s)) (x / s), and the division folds into the norm or matrix before. W8A8
divides outliers of x, which would stretch the one scale of all its channels (SmoothQuant, arXiv
2211.10438). Scaling 4-bit weights up where x is large (AWQ, arXiv 2306.00978) was tried and lost to
GPTQ on every model here: see `tests/stress/stress_methods.py`.

Mixed precision: every matrix has a few formats to choose from, each with its bits and the loss it
is expected to cause. Starting from the cheapest, the upgrade with the largest fall in loss per bit
comes next, until the budget is spent. On each matrix's lower convex hull this is the optimum of the
Lagrangian, short of the last upgrade (Shoham & Gersho, IEEE Trans. ASSP 36(9), 1988).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Doubles, Floats
from medmoe_edge.calibration.quantisers import Format, Quantised, full_range_scales, round_searched
from medmoe_edge.errors import InputError

BLOCK = 128  # columns between two matrix products with all columns before them
MOST_DAMPING = 1.0
INT4 = Format(4, 32)
CHOICES = (Format(2, 32), Format(4, 128), INT4, Format(8, 128))


class Form(Protocol):
    """A way to store a matrix: a format, or another of which the bits are known."""

    def bits_per_weight(self, width: int) -> float:
        """Stored bits per weight in rows of `width`, scales included."""


F = TypeVar("F", bound=Form)


@dataclass(frozen=True)
class Candidate(Generic[F]):
    """A matrix of `weights` weights in rows of `width`, and the loss that each form causes."""

    name: str
    weights: int
    width: int
    losses: Mapping[F, float]

    def bits(self, form: F) -> float:
        """Bits it takes in a form, scales included."""
        return self.weights * form.bits_per_weight(self.width)

    def hull(self) -> list[F]:
        """The forms on the lower convex hull of loss over bits, cheapest first."""
        kept: list[F] = []
        for form in sorted(self.losses, key=lambda form: (self.bits(form), self.losses[form])):
            if kept and self.losses[form] >= self.losses[kept[-1]]:
                continue
            while len(kept) > 1 and self.gain(*kept[-2:]) <= self.gain(kept[-1], form):
                kept.pop()  # it lies on or above the line from the one before it to this
            kept.append(form)
        return kept

    def gain(self, cheap: F, dear: F) -> float:
        """Fall in loss per bit of an upgrade."""
        return (self.losses[cheap] - self.losses[dear]) / (self.bits(dear) - self.bits(cheap))


def allocate(candidates: Sequence[Candidate[F]], budget_bits: float) -> dict[str, F]:
    """A form for every matrix, at most `budget_bits` per weight on average.

    Raises `InputError` for a budget below the cheapest forms.
    """
    hulls = {candidate.name: candidate.hull() for candidate in candidates}
    chosen = {candidate.name: hulls[candidate.name][0] for candidate in candidates}
    spent = sum(candidate.bits(chosen[candidate.name]) for candidate in candidates)
    weights = sum(candidate.weights for candidate in candidates)
    total = budget_bits * weights
    if not spent <= total:  # also for a budget of NaN
        lowest = math.ceil(100 * spent / weights) / 100
        raise InputError(f"{budget_bits} bits per weight are too few.", f"The least is {lowest}.")
    upgrades = [
        (candidate.gain(cheap, dear), candidate, cheap, dear)
        for candidate in candidates
        for cheap, dear in zip(hulls[candidate.name], hulls[candidate.name][1:], strict=False)
    ]
    # Along a hull gains fall, so that a matrix's upgrades come in order.
    for _, candidate, cheap, dear in sorted(upgrades, key=lambda upgrade: -upgrade[0]):
        cost = candidate.bits(dear) - candidate.bits(cheap)
        if chosen[candidate.name] == cheap and spent + cost <= total:
            chosen[candidate.name] = dear
            spent += cost
    return chosen


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


def quantise_gptq(
    weight: Floats,
    hessian: Floats,
    format: Format,
    *,
    damping: float = 0.01,
    evenly: bool = False,
) -> Quantised:
    """Quantise `weight` `[N, K]` for inputs whose x x^T sum (or average) to `hessian` `[K, K]`.

    The grids are those of `round_searched`, fixed beforehand: so the columns can be taken by
    falling diagonal ("act-order") while groups stay neighbours in the stored order. What an input
    counts in that search is the diagonal; in formats that bound pairs it is R_jj^2, by which an
    error of column j counts in the end. (There the search weighs a few errors of several steps
    against many of half a step, and the diagonal overrates the many, which GPTQ cancels in part.)
    Where a pair would exceed the bound, the column taken later stops short of it, and its error is
    passed on like any other. `damping`, in parts of the mean diagonal, is added to the diagonal,
    and ten times as much each time that it does not make the matrix positive definite. Columns that
    calibration never saw active keep their weights, rounded to nearest; GPTQ as published sets them
    to zero, which silently ruins experts that few calibration tokens reached. `evenly` searches the
    grids as if all inputs counted alike: of the deltas of nano's experts in 2 bits the output's
    error was then smaller in every matrix that was tried (0.0095 for 0.0106, 0.0152 for 0.0164),
    and no group of weights far from its size.

    Raises `CheckpointError` for weights that are not finite, `ValueError` for a Hessian that is
    not, or that is no matrix of second moments.
    """
    width = weight.shape[1]
    if hessian.shape != (width, width) or not np.isfinite(hessian).all():
        raise ValueError(f"a Hessian of finite values [{width}, {width}] is needed")
    diagonal = np.diagonal(hessian)
    if (diagonal < 0).any():
        raise ValueError("the diagonal of a Hessian cannot be negative")
    order = np.argsort(-diagonal, kind="stable")
    feedback, squares = _feedback(hessian[np.ix_(order, order)], damping)
    importance = np.array(diagonal)
    if format.pair_bound is not None:
        importance[order] = squares
    grid = round_searched(weight, format, None if evenly else importance)
    # Columns as rows from here on, so that each is contiguous.
    group = order // (width // grid.scale.shape[1])
    scale = np.ascontiguousarray(grid.scale.T)
    zero = np.zeros_like(scale) if grid.zero is None else grid.zero.T.astype(np.float32)
    stored = np.empty_like(grid.integers)
    target = weight.T[order]  # [K, N]
    errors = np.empty_like(target)  # D: weight less what was stored, where done
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        columns = target[start:stop].copy()
        columns += feedback[start:stop, :start] @ errors[:start]
        for j in range(start, stop):
            column = columns[j - start]
            column += feedback[j, start:j] @ errors[start:j]
            step, offset = scale[group[j]], zero[group[j]]
            integers = np.clip(np.rint(column / step) + offset, *_limits(order, j, stored, format))
            errors[j] = target[j] - (integers - offset) * step
            stored[:, order[j]] = integers
    return Quantised(format, stored, grid.scale, grid.zero)


def _limits(
    order: npt.NDArray[np.intp], j: int, stored: npt.NDArray[np.integer[Any]], format: Format
) -> tuple[Floats | int, Floats | int]:
    """The range of the integers of column `order[j]`, beside the neighbour already stored."""
    low, high = format.levels
    bound, neighbour = format.pair_bound, int(order[j]) ^ 1
    if bound is None or neighbour not in order[:j]:
        return low, high
    beside = stored[:, neighbour].astype(np.float32)
    return np.maximum(low, -bound - beside), np.minimum(high, bound - beside)


def _feedback(hessian: Floats, damping: float) -> tuple[Floats, Floats]:
    """`[j, i]` = R_ij / R_jj for i < j, and R_jj^2 `[j]`.

    R R^T is the damped Hessian, R upper triangular.
    """
    reversed_hessian = hessian[::-1, ::-1].astype(np.float64)
    diagonal = np.einsum("ii->i", reversed_hessian)
    mean = diagonal.mean() or 1.0
    added = 0.0
    while True:
        diagonal += damping * mean - added
        added = damping * mean
        try:
            lower = np.linalg.cholesky(reversed_hessian)
            break
        except np.linalg.LinAlgError:
            if damping >= MOST_DAMPING:
                raise ValueError("the Hessian is no matrix of second moments") from None
            damping = max(10 * damping, 1e-4)
    squares = np.diagonal(lower)[::-1] ** 2
    lower /= np.diagonal(lower)
    factor = lower[::-1, ::-1]  # the reversal of a lower factor of the reversal: R / diag(R)
    return np.ascontiguousarray(factor.T, np.float32), squares.astype(np.float32)
