"""GPTQ (arXiv 2210.17323): each column is rounded so as to cancel the errors of those before it.

The output error of W + D on inputs of second moments H is tr(D H D^T). With H = R R^T, R upper
triangular, that is |D R|^2, and its column j holds D_j R_jj plus what columns i < j left over:
sum_i<j D_i R_ij. So column j is best rounded at W_j + sum_i<j D_i R_ij / R_jj. This is GPTQ's
update exactly (its U, the Cholesky factor of the inverse, is R^-1; see arXiv 2507.18553, where it
is Babai's nearest-plane algorithm), without the inverse.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.calibration.quantisers import Format, Quantised, round_searched

BLOCK = 128  # columns between two matrix products with all columns before them
MOST_DAMPING = 1.0


def quantise_gptq(
    weight: Floats, hessian: Floats, format: Format, *, damping: float = 0.01
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
    to zero, which silently ruins experts that few calibration tokens reached.

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
    grid = round_searched(weight, format, importance)
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
