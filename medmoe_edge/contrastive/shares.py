"""Shares of right answers, and how far they may be believed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]
NORMAL = 1.959964  # standard deviations around the mean that hold 95%


@dataclass(frozen=True)
class Share:
    """`right` of `count`: `share`, 0 to 1, and its 95% interval (Wilson, 1927)."""

    count: int
    right: int
    share: float
    interval: Interval


@dataclass(frozen=True)
class Mean:
    """A mean of shares, 0 to 1, and its 95% interval."""

    share: float
    interval: Interval


def share_of(right: npt.ArrayLike) -> Share:
    """The share of what is True among one or more."""
    values = np.asarray(right, np.bool_)
    count, hits = len(values), int(values.sum())
    share, narrow = hits / count, NORMAL**2 / count
    centre = (share + narrow / 2) / (1 + narrow)
    half = math.sqrt(narrow * (share * (1 - share) + narrow / 4)) / (1 + narrow)
    # the ends hold the share and lie in 0 to 1, which rounding may miss
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Share(count, hits, share, (low, high))


def mean_of(shares: Sequence[Share | Mean]) -> Mean:
    """The mean in which each weighs the same: of a task's classes the balanced accuracy.

    Its interval is recovered from theirs (MOVER; Zou and Donner, Statistics in Medicine 27, 2008),
    taking them to be independent.
    """
    count = len(shares)
    mean = sum(each.share for each in shares) / count
    below = math.hypot(*(each.share - each.interval[0] for each in shares)) / count
    above = math.hypot(*(each.interval[1] - each.share for each in shares)) / count
    return Mean(mean, (mean - below, mean + above))
