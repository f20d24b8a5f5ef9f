"""Mixed precision: bits go where they buy most, within a budget.

Every matrix has a few formats to choose from, each with its bits and the loss it is expected to
cause. Starting from the cheapest, the upgrade with the largest fall in loss per bit comes next,
until the budget is spent. On each matrix's lower convex hull this is the optimum of the Lagrangian,
short of the last upgrade (Shoham & Gersho, IEEE Trans. ASSP 36(9), 1988).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medmoe_edge.calibration.quantisers import Format
from medmoe_edge.errors import InputError

INT4 = Format(4, 32)
CHOICES = (Format(2, 32), Format(4, 128), INT4, Format(8, 128))


@dataclass(frozen=True)
class Candidate:
    """A matrix of `weights` weights in rows of `width`, and the loss that each format causes."""

    name: str
    weights: int
    width: int
    losses: Mapping[Format, float]

    def bits(self, form: Format) -> float:
        """Bits it takes in a format, scales included."""
        return self.weights * form.bits_per_weight(self.width)

    def hull(self) -> list[Format]:
        """The formats on the lower convex hull of loss over bits, cheapest first."""
        kept: list[Format] = []
        for form in sorted(self.losses, key=lambda form: (self.bits(form), self.losses[form])):
            if kept and self.losses[form] >= self.losses[kept[-1]]:
                continue
            while len(kept) > 1 and self.gain(*kept[-2:]) <= self.gain(kept[-1], form):
                kept.pop()  # it lies on or above the line from the one before it to this
            kept.append(form)
        return kept

    def gain(self, cheap: Format, dear: Format) -> float:
        """Fall in loss per bit of an upgrade."""
        return (self.losses[cheap] - self.losses[dear]) / (self.bits(dear) - self.bits(cheap))


def allocate(candidates: Sequence[Candidate], budget_bits: float) -> dict[str, Format]:
    """A format for every matrix, at most `budget_bits` per weight on average.

    Raises `InputError` for a budget below the cheapest formats.
    """
    hulls = {candidate.name: candidate.hull() for candidate in candidates}
    chosen = {candidate.name: hulls[candidate.name][0] for candidate in candidates}
    spent = sum(candidate.bits(chosen[candidate.name]) for candidate in candidates)
    weights = sum(candidate.weights for candidate in candidates)
    total = budget_bits * weights
    if not spent <= total:  # also for a budget that is no number
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
