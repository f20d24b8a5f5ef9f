"""Bits within a budget: never over it, and spent as a search through all choices would."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.calibration.methods import CHOICES, INT4, Candidate, allocate
from medmoe_edge.calibration.quantisers import Format
from medmoe_edge.errors import InputError

Chosen = dict[str, Format]


def candidate(name: str, *losses: float, rows: int = 8, width: int = 128) -> Candidate[Format]:
    return Candidate(name, rows * width, width, dict(zip(CHOICES, losses, strict=True)))


def spent(candidates: Sequence[Candidate[Format]], chosen: Chosen) -> float:
    return sum(item.bits(chosen[item.name]) for item in candidates)


def loss(candidates: Sequence[Candidate[Format]], chosen: Chosen) -> float:
    return math.fsum(item.losses[chosen[item.name]] for item in candidates)


def weights(candidates: Sequence[Candidate[Format]]) -> int:
    return sum(item.weights for item in candidates)


def least_loss(candidates: Sequence[Candidate[Format]], total: float) -> float:
    """By trying everything."""
    names = [item.name for item in candidates]
    every = itertools.product(*(item.losses for item in candidates))
    tried = (dict(zip(names, forms, strict=True)) for forms in every)
    return min(loss(candidates, chosen) for chosen in tried if spent(candidates, chosen) <= total)


@st.composite
def matrices(draw: st.DrawFn) -> list[Candidate[Format]]:
    """One to four matrices whose losses follow no order, some with fewer formats."""
    made = []
    for index in range(draw(st.integers(1, 4))):
        width = draw(st.sampled_from([128, 256]))
        forms = draw(st.lists(st.sampled_from(CHOICES), min_size=1, unique=True))
        losses = {form: draw(st.integers(0, 1000)) / 8 for form in forms}
        made.append(Candidate(str(index), draw(st.integers(1, 40)) * width, width, losses))
    return made


def cheapest(candidates: Sequence[Candidate[Format]]) -> float:
    return sum(min(map(item.bits, item.losses)) for item in candidates)


@given(matrices(), st.lists(st.floats(2.5, 9), min_size=2, max_size=2))
def test_more_bits_never_cost_more_loss_and_no_budget_is_exceeded(
    candidates: list[Candidate[Format]], budgets: list[float]
) -> None:
    losses, total = [], weights(candidates)
    for budget in sorted(budgets):
        if cheapest(candidates) > budget * total:
            with pytest.raises(InputError, match="too few"):
                allocate(candidates, budget)
            continue
        chosen = allocate(candidates, budget)
        assert list(chosen) == [item.name for item in candidates]
        assert spent(candidates, chosen) <= budget * total
        losses.append(loss(candidates, chosen))
    assert losses == sorted(losses, reverse=True)


@given(matrices(), st.floats(2.5, 9))
def test_what_is_spent_could_not_be_spent_better(
    candidates: list[Candidate[Format]], budget: float
) -> None:
    if cheapest(candidates) > budget * weights(candidates):
        return
    chosen = allocate(candidates, budget)
    total = budget * weights(candidates)
    # What greed may leave on the table is the one upgrade that no longer fitted.
    best = least_loss(candidates, total)
    steps = [
        item.losses[a] - item.losses[b]
        for item in candidates
        for a, b in itertools.pairwise(item.hull())
    ]
    assert best <= loss(candidates, chosen) + 1e-9
    assert loss(candidates, chosen) <= best + max(steps, default=0) + 1e-9


@given(matrices(), st.floats(0, 100))
def test_at_a_price_per_bit_it_is_the_optimum(
    candidates: list[Candidate[Format]], price: float
) -> None:
    """All upgrades that are worth the price, and no other: the optimum of the Lagrangian."""
    wanted: Chosen = {}
    for item in candidates:
        paid = {form: item.losses[form] + price / 1e4 * item.bits(form) for form in item.hull()}
        wanted[item.name] = min(paid, key=paid.__getitem__)
    exactly = spent(candidates, wanted) / weights(candidates)
    chosen = allocate(candidates, exactly + 1e-9)
    assert loss(candidates, chosen) == pytest.approx(loss(candidates, wanted), abs=1e-9)
    total = spent(candidates, wanted)
    assert loss(candidates, wanted) == pytest.approx(least_loss(candidates, total), abs=1e-9)


@given(matrices())
def test_the_hull_is_convex_and_below_every_format(candidates: list[Candidate[Format]]) -> None:
    for item in candidates:
        hull = item.hull()
        bits, losses = [item.bits(f) for f in hull], [item.losses[f] for f in hull]
        assert bits == sorted(set(bits))
        assert item.bits(hull[0]) == min(map(item.bits, item.losses))
        assert losses[-1] == min(item.losses.values())
        gains = [item.gain(a, b) for a, b in itertools.pairwise(hull)]
        assert all(a > b > 0 for a, b in itertools.pairwise([*gains, 0.0]) if b)
        for form, own in item.losses.items():
            assert own >= np.interp(item.bits(form), bits, losses) - 1e-9


def test_of_two_formats_of_equal_size_the_better_is_taken() -> None:
    twins = {Format(2, 32): 9.0, Format(4, 64): 5.0, Format(4): 1.0}  # both 4.25 bits
    item = Candidate("a", 1024, 128, twins)
    assert item.bits(Format(4, 64)) == item.bits(Format(4))
    assert item.hull() == [Format(2, 32), Format(4)]


def test_bits_go_where_they_buy_most() -> None:
    calm, sensitive = candidate("calm", 4, 3, 2, 1), candidate("sensitive", 400, 300, 200, 100)
    chosen = allocate([calm, sensitive], 4.0)
    assert chosen["calm"].bits_per_weight(128) < chosen["sensitive"].bits_per_weight(128)
    assert allocate([calm, sensitive], 8.125) == dict.fromkeys(("calm", "sensitive"), CHOICES[-1])


def test_a_matrix_with_one_format_keeps_it() -> None:
    data_free = Candidate("data-free", 1024, 128, {INT4: 0.0})
    chosen = allocate([data_free, candidate("other", 4, 3, 2, 1)], 3.6)
    assert chosen["data-free"] == INT4


@pytest.mark.parametrize("budget", [2.49, 0.0, -1.0, float("nan")])
def test_a_budget_below_the_cheapest_is_refused(budget: float) -> None:
    items = [candidate("a", 4, 3, 2, 1), candidate("b", 4, 3, 2, 1)]
    with pytest.raises(InputError, match=r"too few\. The least is 2\.5\.$"):
        allocate(items, budget)


def test_the_least_that_is_named_is_enough() -> None:
    items = [candidate("a", 4, 3, 2, 1, rows=7), Candidate("b", 512, 128, {INT4: 0.0})]
    with pytest.raises(InputError, match="too few") as caught:
        allocate(items, 2.5)
    assert set(allocate(items, float(caught.value.remedy.split()[-1][:-1]))) == {"a", "b"}
