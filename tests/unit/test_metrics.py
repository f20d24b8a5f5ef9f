import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.evaluation.metrics import (
    bootstrap_interval,
    closed_correct,
    exact_match,
    normalise,
    official_closed_correct,
    official_recall,
    reliability,
    risk_coverage,
    token_recall,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Left Lung.", "left lung"),
        ("a an  the\tliver\n", "liver"),
        ("X-ray", "x ray"),
        ("right, lower", "right lower"),
        ("Yes!", "yes"),
        ("T2", "T2".lower()),
        ("two", "2"),
        ("None", "0"),
        ("10", "10"),
        ("3.5 cm.", "3.5 cm"),
        ("1,000", "1000"),
        ("dont know", "don't know"),
        ("don\u2019t know", "don't know"),
        ("re\u0301nal\u00a0\ufb01brosis", "r\u00e9nal fibrosis"),  # as some editors store it
        ("X\u2011ray\u00ad", "x ray"),
        ("couldntve", "couldn't've"),
        ("its well", "its well"),
        ("patient's", "patient's"),
        ("A", "a"),
        ("the.", "the"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def official_normalise(text: str) -> str:
    """vqaEval.py's two steps, without contractions, restated as an independent reference."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        if f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)
    numbers = {"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}
    words = (numbers.get(word, word) for word in out.lower().split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


@given(st.text(alphabet="aten o12,.-/() ?'", max_size=20).map(lambda text: f"lung {text}"))
def test_normalise_equals_the_official_function(text: str) -> None:
    # Whitespace runs are the only liberty taken: "a  ," is "a ," here.
    text = " ".join(text.split())
    assert normalise(text).replace("'", "") == official_normalise(text).replace("'", "")


@given(st.text(max_size=40))
def test_every_text_matches_itself(text: str) -> None:
    assert exact_match(text, text)
    assert exact_match(f"\t{text}\n ", text.lower())


def test_exact_match() -> None:
    assert exact_match("the Left Lung.", "left lung")
    assert exact_match("two", "2")
    assert not exact_match("left lung", "lung left")
    assert not exact_match("", "yes")
    assert not exact_match("the", "A")
    assert not exact_match("?", "+")


def test_closed_correct_is_the_official_rule() -> None:
    assert closed_correct("No, it is not.", "no")
    assert closed_correct("normal", "No")  # its known leniency
    assert not closed_correct("yes", "no")
    assert not closed_correct("anything", "")
    assert closed_correct("no", "no ")
    assert not official_closed_correct("no", "no ")
    assert official_closed_correct("anything", "")


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("the left lung", "Left Lung", 1.0),
        ("left", "left lung", 0.5),
        ("left left left", "left lung", 0.5),
        ("left", "left left", 0.5),
        ("", "left", 0.0),
        ("left", "", 0.0),
        ("2", "two", 1.0),
        ("liver, spleen", "spleen liver kidney", 2 / 3),
    ],
)
def test_token_recall(prediction: str, reference: str, recall: float) -> None:
    assert token_recall(prediction, reference) == pytest.approx(recall)


@given(st.text(max_size=30), st.text(max_size=30))
def test_token_recall_is_a_share(prediction: str, reference: str) -> None:
    assert 0.0 <= token_recall(prediction, reference) <= 1.0
    if exact_match(prediction, reference) and normalise(reference):
        assert token_recall(prediction, reference) == 1.0


def test_bootstrap_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(1).random(400) < 0.7
    low, high = bootstrap_interval(values, np.arange(400), rounds=4000)
    half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert low == pytest.approx(values.mean() - half, abs=0.006)
    assert high == pytest.approx(values.mean() + half, abs=0.006)
    assert (low, high) == bootstrap_interval(values, np.arange(400), rounds=4000)


def test_bootstrap_draws_whole_images() -> None:
    values = np.tile([0.0, 1.0], 50).repeat(10)
    low, high = bootstrap_interval(values, np.arange(100).repeat(10))
    apart_low, apart_high = bootstrap_interval(values, np.arange(1000))
    # Ten questions that always agree are worth one: the interval is sqrt(10) times wider.
    assert (high - low) / (apart_high - apart_low) == pytest.approx(np.sqrt(10), rel=0.15)
    assert bootstrap_interval([1.0, 0.0], ["same", "same"]) == (0.5, 0.5)
    one = bootstrap_interval([1.0, 0.0], ["same", "same"], shares=True)
    assert one == pytest.approx((0.0546, 0.9454), abs=1e-4), "one image tells next to nothing"
    low, high = bootstrap_interval([1 / 3] * 7, range(7), shares=True)  # means differ by rounding
    assert high - low > 0.4
    assert bootstrap_interval([0.0, 0.0], [1, 2]) == pytest.approx(
        (0, 1.96**2 / (2 + 1.96**2)), 1e-4
    )
    assert bootstrap_interval([0.0, -0.5], [1, 2]) == (-0.5, 0.0), "differences are no shares"


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("the left lung", "Left Lung", 1.0),
        ("left left left", "left lung", 3 / 4),  # the prediction's repetitions pay
        ("lung", "left left lung", 1 / 3),  # a missing word counts as often as it is wanted
        ("left", "left left", 1.0),
        ("", "left", 0.0),
        ("the", "the", 0.0),  # no word is left
        ("dont", "don't", 1.0),
        ("couldntve", "couldn't've", 0.0),  # not in the official list, other than in ours
        ("Im", "i'm", 0.0),
        ("somebody'd", "somebodyd", 1.0),
        ("a." * 32 + "b.", "b", 0.0),  # no full stop is removed after the 32nd
        ("a. " * 31 + "b.", "b", 1.0),
    ],
)
def test_official_recall(prediction: str, reference: str, recall: float) -> None:
    assert official_recall(prediction, reference) == pytest.approx(recall)


def test_reliability_by_hand() -> None:
    found = reliability([0.85, 0.85, 0.25, 1.0], [1, 0, 0, 1])
    assert found.ece == pytest.approx((2 * abs(0.85 - 0.5) + 0.25 + 0) / 4)
    assert [(one.n, one.accuracy) for one in found.bins] == [(1, 0.0), (2, 0.5), (1, 1.0)]
    assert [one.confidence for one in found.bins] == pytest.approx([0.25, 0.85, 1.0])
    assert (found.n, found.accuracy) == (4, 0.5)
    assert found.half == pytest.approx(0.75)  # the sure one, and one of two that are alike
    assert reliability([0.7] * 10, [1] * 7 + [0] * 3).ece == pytest.approx(0.0)


def test_risk_falls_where_confidence_means_something() -> None:
    curve = risk_coverage([0.9, 0.1, 0.8, 0.2], [1, 0, 1, 0], steps=4)
    assert [share for share, _ in curve] == [0.25, 0.5, 0.75, 1.0]
    assert [risk for _, risk in curve] == pytest.approx([0, 0, 1 / 3, 0.5])


@given(st.permutations(range(6)))
def test_the_order_of_equal_confidences_does_not_matter(order: list[int]) -> None:
    said, right = [0.9, 0.5, 0.5, 0.5, 0.5, 0.1], [1, 1, 1, 0, 0, 0]
    dealt = risk_coverage([said[at] for at in order], [right[at] for at in order], steps=3)
    assert [risk for _, risk in dealt] == pytest.approx([0.25, 0.375, 0.5])
