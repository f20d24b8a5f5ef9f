"""Calibrated confidence on answers whose chance of being right is known: they are made up."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from medmoe_edge._types import Doubles, no_progress
from medmoe_edge.bundle.bundle import Bundle, write_confidence, write_verification
from medmoe_edge.config import Confidence, Curve, answer_kind
from medmoe_edge.data.datasets import Example
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import ConfigError, DataError, InputError, ResourceError
from medmoe_edge.evaluation.confidence import (
    FLAGGED,
    choose_threshold,
    fit_confidence,
    fit_curve,
    fit_refusal,
    fit_refusals,
    refusal_threshold,
)
from medmoe_edge.evaluation.evaluate import Prediction
from medmoe_edge.evaluation.metrics import Share
from medmoe_edge.families import AnswerScores, family_of
from medmoe_edge.image.pixels import Image
from medmoe_edge.pipeline import EvaluateOptions
from medmoe_edge.render.verification import show_seen

Made = tuple[list[Example], list[Prediction]]


def made(probability: Doubles, chance: Doubles, *, per_image: int = 10, seed: int = 0) -> Made:
    """Answers that are right with `chance`, every other one of yes or no."""
    right = np.random.default_rng(seed).random(len(chance)) < chance
    examples, predictions = [], []
    for number, (said, hit) in enumerate(zip(probability, right, strict=True)):
        text = "Yes" if number % 2 else "left lung"
        image = Path(f"{number // per_image}.png")
        about = f"q{number}", image, "?", text if hit else "other", "OPEN", None, None, None
        examples.append(Example(*about, source="made"))  # type: ignore[arg-type]
        predictions.append(
            Prediction(f"q{number}", "?", text, bool(hit), 0, 0, "", "OPEN", float(said))
        )
    return examples, predictions


def fitted(answers: Made, wanted: float | None = None) -> Confidence:
    return fit_confidence(*answers, data="made", data_sha256="0", selective_accuracy=wanted)


def spread(count: int) -> Doubles:
    return np.random.default_rng(1).permutation(np.linspace(0.02, 0.98, count))


# --- curves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "off"), [(200, 0.06), (4000, 0.03)])
def test_what_is_calibrated_stays_as_it_is(count: int, off: float) -> None:
    """Both methods, within what chance does to so many answers."""
    probability = spread(count)
    right = np.random.default_rng(2).random(count) < probability
    curve = fit_curve(probability, right)
    assert curve.method == ("isotonic" if count > 500 else "logistic")
    places = np.linspace(0.1, 0.9, 17)
    gaps = [curve.chance(float(place)) - place for place in places]
    assert np.abs(gaps).mean() < off


@pytest.mark.parametrize("count", [200, 4000])
def test_what_is_overconfident_is_put_right(count: int) -> None:
    """The model says p where p squared is right."""
    probability = spread(count)
    right = np.random.default_rng(3).random(count) < probability**2
    curve = fit_curve(probability, right)
    for place in (0.2, 0.5, 0.8):
        assert curve.chance(place) == pytest.approx(place**2, abs=0.12)


answered = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(answered, st.sampled_from([1, 500]), st.floats(0, 1), st.floats(0, 1))
def test_every_curve_is_monotone_and_within_bounds(
    some: list[tuple[float, bool]], times: int, low: float, high: float
) -> None:
    """Of few answers, and of the same many times over, which is another method."""
    probability, right = zip(*(some * times), strict=True)
    curve = fit_curve(probability[:2000], right[:2000])
    low, high = sorted((low, high))
    assert 0 < curve.chance(low) <= curve.chance(high) < 1
    told = Curve.from_json(curve.to_json())
    assert told == curve


def test_a_curve_is_lines_between_its_points() -> None:
    curve = Curve("isotonic", 10, ((0.2, 0.1), (0.4, 0.5), (0.8, 0.9)))
    for place, chance in ((0, 0.1), (0.2, 0.1), (0.3, 0.3), (0.4, 0.5), (0.6, 0.7), (1, 0.9)):
        assert curve.chance(place) == pytest.approx(chance)


@pytest.mark.parametrize(
    "points",
    [(), ((0.2, 0.5), (0.2, 0.6)), ((0.2, 0.5), (0.4, 0.4)), ((0.2, 1.5),), ((-0.1, 0.5),)],
)
def test_curves_that_are_none_are_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ConfigError, match="does not rise"):
        Curve("isotonic", 10, points)


def test_answers_of_yes_and_no_are_closed() -> None:
    assert {answer_kind(text) for text in ("Yes", "no.", " NO ")} == {"closed"}
    assert {answer_kind(text) for text in ("", "Left", "no mass", "yes, both")} == {"open"}


# --- the whole fit ------------------------------------------------------------------------------


def test_the_fit_says_what_it_gained() -> None:
    """Raw probabilities that are far off; the answers that are right stand before the others."""
    probability = spread(3000)
    found = fitted(made(probability, np.sqrt(probability)))
    assert found.before.ece > 0.1 > 0.04 > found.after.ece
    assert found.before.n == found.after.n == 3000
    assert found.before.accuracy == found.after.accuracy
    assert found.images == 300
    assert found.after.half > found.after.accuracy + 0.1
    assert found.unsure.answers == pytest.approx(FLAGGED, abs=0.04)
    assert found.unsure.errors > 1.5 * found.unsure.answers
    assert found.unsure.accuracy == pytest.approx(found.selective_accuracy, abs=0.03)
    assert Confidence.from_json(found.to_json()) == found


def test_each_kind_has_a_curve_of_its_own() -> None:
    """Answers of yes and no are right half as often as they say, all others always as often."""
    probability = spread(2000)
    found = fitted(made(probability, np.where(np.arange(2000) % 2, probability / 2, probability)))
    assert found.chance("Yes", 0.8) == pytest.approx(0.4, abs=0.08)
    assert found.chance("left lung", 0.8) == pytest.approx(0.8, abs=0.08)
    assert (found.closed.questions, found.open.questions) == (1000, 1000)


def test_too_few_of_a_kind_share_the_curve_of_all() -> None:
    probability = spread(80)
    found = fitted(made(probability, probability))
    assert found.closed == found.open
    assert found.closed.questions == 80


def test_no_answer_judges_a_fit_that_saw_its_image() -> None:
    """All answers about an image are right, or all wrong, and equally probable: a fit that saw
    some of them knows the others. Where each is said to be about another image, that pays.
    """
    images = np.random.default_rng(2).random(60) < 0.5
    probability, right = np.repeat(np.linspace(0.3, 0.7, 60), 10), np.repeat(images, 10)
    apart = fitted(made(probability, right.astype(float)))
    leaked = fitted(made(probability, right.astype(float), per_image=1))
    assert leaked.after.ece + 0.1 < apart.after.ece
    assert leaked.after.half > apart.after.half + 0.1


def test_the_accuracy_that_was_asked_for() -> None:
    probability = spread(2000)
    answers = made(probability, probability)
    found = fitted(answers, 0.8)
    assert found.selective_accuracy == 0.8
    assert found.unsure.accuracy == pytest.approx(0.8, abs=0.03)
    assert found.threshold == pytest.approx(0.6, abs=0.08)  # the mean of 0.6 to 1 is 0.8
    with pytest.raises(InputError, match="No tenth of the answers is right in 100%"):
        fitted(answers, 1.0)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(DataError, match="20 answers about 2 images are too few"):
        fitted(made(spread(20), spread(20)))
    with pytest.raises(DataError, match="too few"):
        fitted(made(spread(100), spread(100), per_image=50))
    with pytest.raises(DataError, match="All 100 answers are right"):
        fitted(made(spread(100), np.ones(100)))
    with pytest.raises(DataError, match="0 answers about 0 images"):
        fitted(([], []))


# --- thresholds ---------------------------------------------------------------------------------


def test_the_threshold_keeps_as_many_as_it_can() -> None:
    confidence, right = [0.9, 0.8, 0.7, 0.6, 0.5], [1, 1, 1, 0, 0]
    assert choose_threshold(confidence, right, 1.0) == (0.7, 1.0)
    assert choose_threshold(confidence, right, 0.75) == (0.6, 0.75)
    assert choose_threshold(confidence, right, 0.1) == (0.5, 0.1)
    assert choose_threshold(confidence, [0, 0, 0, 0, 0], 0.5) is None
    assert choose_threshold(confidence, right) == (0.6, 0.75)  # one of five is less than 22%
    assert choose_threshold([0.5] * 5, right) == (0.5, 0.6)  # alike: all or none


@settings(deadline=None)
@given(answered, st.lists(st.floats(0, 1, width=32), max_size=20))
def test_a_refusal_flags_at_most_two_in_a_hundred(
    some: list[tuple[float, bool]], refused: list[float]
) -> None:
    usual = [value for value, _ in some] * 10
    threshold = refusal_threshold(usual, refused)
    assert 0 <= threshold <= 1
    flagged = sum(value >= threshold for value in usual)
    assert flagged <= 0.02 * len(usual) or threshold == 1


def test_a_refusal_is_put_between_what_can_be_told_apart() -> None:
    scans, cats = [0.001] * 98 + [0.3, 0.9], [0.2, 0.8, 0.99]
    threshold = refusal_threshold(scans, cats)
    assert 0.001 < threshold <= 0.2  # two scans in a hundred may be flagged
    assert threshold == pytest.approx(0.0156, abs=0.001)  # the middle, in log-odds
    assert refusal_threshold([0.4] * 50, [0.1]) > 0.4  # it cannot be told: no scan is flagged
    assert refusal_threshold(scans, []) == 0.5
    assert refusal_threshold([0.7] * 100, []) > 0.7


def cases(name: str, values: Iterable[float], *, per_image: int = 1) -> list[tuple[str, float]]:
    """About so many images of their own."""
    return [(f"{name}{number // per_image}", value) for number, value in enumerate(values)]


def test_a_refusal_that_can_be_told_is_kept() -> None:
    fit = fit_refusal(cases("scan", [0.001] * 100), cases("cat", np.linspace(0.3, 0.9, 20)))
    assert 0.01 <= fit.threshold <= 0.3
    assert (fit.usual, fit.refused, fit.problems) == (Share.of(0, 100), Share.of(20, 20), ())
    far = fit_refusal(cases("scan", [1e-6] * 100), cases("cat", [0.02] * 20))
    assert (far.threshold, far.problems) == (0.01, ())  # the middle would be lower


def test_noise_is_no_threshold() -> None:
    """Both groups alike: far down, where the least is below the floor, and where all are high."""
    draw = np.random.default_rng(0)
    for least, most in ((1e-6, 1e-5), (0.05, 0.4)):
        usual, refused = draw.uniform(least, most, 300), draw.uniform(least, most, 60)
        fit = fit_refusal(cases("scan", usual), cases("cat", refused))
        assert (fit.threshold, fit.problems) == (0.5, ("not separated",))
        assert (fit.usual, fit.refused) == (Share.of(0, 300), Share.of(0, 60))


def test_a_refusal_that_must_flag_more_says_so() -> None:
    fit = fit_refusal(cases("scan", [1.0] * 10), [])
    assert (fit.threshold, fit.usual) == (1.0, Share.of(10, 10))
    assert fit.problems == ("flags too many",)
    three = fit_refusal(cases("scan", [1.0] * 3 + [0.1] * 97), [])
    assert (three.usual.count, three.problems) == (3, ("flags too many",))
    two = fit_refusal(cases("scan", [1.0] * 2 + [0.1] * 98), [])
    assert two.problems == ()


def test_no_refusal_is_judged_by_a_fit_that_saw_its_image() -> None:
    """Of 20 images one is far above the rest, in all its 10 questions: a fit that saw some of them
    puts its threshold above, and one that saw none cannot.
    """
    values = [0.9] * 10 + [0.1] * 190
    together = fit_refusal(cases("scan", values, per_image=10), [])
    apart = fit_refusal(cases("scan", values), [])
    assert (together.usual.count, apart.usual.count) == (10, 0)
    assert together.threshold > 0.9
    assert together.problems == ("flags too many",)  # as others are likely to come


def test_a_patient_in_both_groups_is_in_one_part() -> None:
    """A fit that saw his three scans puts its threshold above them, and misses his picture."""
    usual = [("he", 0.9)] * 3 + cases("scan", [0.1] * 100)
    cats = cases("cat", [0.95] * 19)
    assert fit_refusal(usual, [("he", 0.7), *cats]).refused == Share.of(20, 20)
    apart = [fit_refusal(usual, [(f"other {n}", 0.7), *cats]).refused for n in range(5)]
    assert (
        Share.of(19, 20) in apart
    )  # of another patient it is missed, where these are in two parts


def test_scans_that_cannot_answer_a_question_are_no_reason_to_answer_it() -> None:
    """Brains asked for effusion raise no border of `not_answerable`; that of no scan they do."""
    codes = ("not_a_scan", "not_answerable")
    usual = [(f"film {n}", dict.fromkeys(codes, 0.01)) for n in range(100)]
    brains = [(f"brain {n}", dict.fromkeys(codes, 0.97)) for n in range(100)]
    fits = fit_refusals(codes, usual, brains, [])
    assert fits["not_answerable"].threshold == 0.5
    assert fits["not_answerable"].usual == Share.of(0, 100)
    assert fits["not_a_scan"].threshold > 0.97


def test_a_threshold_needs_two_images() -> None:
    with pytest.raises(DataError, match="about 1 images are too few"):
        fit_refusal([("one", 0.1)] * 20, [])


# --- in a bundle, and in its answers ------------------------------------------------------------

SHAPE = (30, 40, 3)
QUESTIONS = [f"Question {number}?" for number in range(12)]


@pytest.fixture
def own_bundle(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny bundle of one's own, which may be written to."""
    return Path(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))


@pytest.fixture
def own_answers(own_bundle: Path, tmp_path: Path) -> Path:
    """Questions about six images, of which the tiny model answers every other one right."""
    engine, lines = load(own_bundle), []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)
        Picture.fromarray(pixels).save(tmp_path / f"{number}.png")
        answers = engine.ask_all(tmp_path / f"{number}.png", QUESTIONS, max_new_tokens=2)
        for place, answer in enumerate(answers):
            right = answer.text if (place + number) % 2 and answer.text else "something else"
            about = {"image": f"{number}.png", "question": answer.question, "answer": right}
            lines.append(json.dumps(about))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    return file


@functools.cache
def of_line(low: float = 0.1, high: float = 0.6, threshold: float = 0.5) -> Confidence:
    """A confidence that lies between two chances, whatever is said."""
    line = Curve("logistic", 100, ((0.0, low), (1.0, high)))
    fit = fitted(made(spread(100), spread(100)))
    return dataclasses.replace(fit, closed=line, open=line, threshold=threshold)


def with_curve(folder: Path, threshold: float) -> Bundle:
    """A bundle that says of any answer between 30% and 90%."""
    return write_confidence(Bundle.open(folder), of_line(0.3, 0.9, threshold), {})


def test_answers_have_the_chance_that_the_bundle_knows(own_bundle: Path) -> None:
    image = Image.from_array(np.zeros(SHAPE, np.uint8))
    raw = load(own_bundle).ask(image, "Is there effusion?", max_new_tokens=3)
    assert (raw.confidence_kind, raw.unsure) == ("raw", False)

    bundle = with_curve(own_bundle, threshold=0.3)
    sure = load(own_bundle).ask(image, "Is there effusion?", max_new_tokens=3)
    assert sure.confidence == pytest.approx(0.3 + 0.6 * raw.confidence)
    assert (sure.confidence_kind, sure.unsure, sure.text) == ("calibrated", False, raw.text)
    assert sure.model["sha256"] == bundle.sha256 != raw.model["sha256"]

    with_curve(own_bundle, threshold=0.95)
    engine = load(own_bundle)
    unsure = engine.ask(image, "Is there effusion?", max_new_tokens=3)
    assert unsure.unsure
    assert "unsure" in [notice.code for notice in unsure.warnings]
    assert unsure.text == raw.text


@pytest.mark.parametrize("choices", [["Yes", "No"], ["no", "yes"], ["left", "right"], ["a", "yes"]])
def test_choices_have_a_chance_only_where_it_is_known(own_bundle: Path, choices: list[str]) -> None:
    """The curves say nothing of left and right; of yes and no the order of the two is nothing."""
    image = Image.from_array(np.zeros(SHAPE, np.uint8))
    raw = load(own_bundle).ask(image, "Is there effusion?", choices=choices)
    with_curve(own_bundle, threshold=0.999)
    engine = load(own_bundle)
    found = engine.ask(image, "Is there effusion?", choices=choices)
    again = engine.ask(image, "Is there effusion?", choices=choices[::-1])
    known = {each.lower() for each in choices} == {"yes", "no"}
    assert (raw.confidence_kind, raw.unsure) == ("raw", False)
    assert (found.confidence_kind, found.unsure) == (("calibrated" if known else "raw"), known)
    assert found.text == again.text == raw.text
    assert found.probabilities == again.probabilities
    assert sum((found.probabilities or {}).values()) == pytest.approx(1)
    if not known:
        assert found.probabilities == raw.probabilities
    for answer in (raw, found, again):
        assert answer.confidence == (answer.probabilities or {})[answer.text]  # nothing refused


def test_of_yes_and_no_the_likelier_has_its_chance() -> None:
    line = of_line(0.3, 0.9)  # 0.3 + 0.6 p
    for yes, expected in ((0.5, 0.5), (0.6, 0.6), (0.8, 0.78), (1.0, 0.9)):
        for likely, other in (("Yes", "No"), ("no", "yes"), ("No.", "Yes.")):
            for pair in ((likely, other), (other, likely)):
                given = {text: yes if text == likely else 1 - yes for text in pair}
                found = line.among(given)
                assert list(found) == list(pair)
                assert found[likely] == pytest.approx(expected)
                assert found[other] == pytest.approx(1 - expected)
    assert of_line(0.1, 0.3).among({"Yes": 0.1, "No": 0.9}) == {"Yes": 0.5, "No": 0.5}


@pytest.mark.parametrize(
    "given",
    [{"left": 0.5, "right": 0.5}, {"right": 0.3, "left": 0.7}, {"yes": 0.5, "no": 0.3, "?": 0.2}],
)
def test_of_other_choices_the_shares_are_kept(given: dict[str, float]) -> None:
    assert of_line(0.5, 0.9).among(given) == given


def test_eval_fits_and_verification_leaves_it(
    own_bundle: Path, own_answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in own_bundle.iterdir()}
    options = EvaluateOptions(own_answers, fit_confidence=True, max_new_tokens=2)
    scores = family_of(own_bundle).evaluate(str(own_bundle), options, no_progress)
    assert isinstance(scores, AnswerScores)
    bundle = Bundle.open(own_bundle)
    assert scores.confidence == bundle.confidence is not None
    assert not scores.fitted_on_these  # its own figures are of raw probabilities, see below
    show_seen(scores)
    assert "the figures above it are of raw confidence" in capsys.readouterr().out
    assert (bundle.confidence.images, bundle.confidence.after.n) == (6, 72)
    assert bundle.confidence.data == "questions.jsonl"
    assert scores.questions is not None
    assert scores.questions.reliability == bundle.confidence.before  # of the raw probabilities
    json.dumps(scores.to_json(), allow_nan=False)
    changed = [name for name, old in before.items() if (own_bundle / name).read_bytes() != old]
    assert changed == ["manifest.json"]

    verified = write_verification(bundle, {"passed": True})
    assert verified.confidence == bundle.confidence
    later = dataclasses.replace(options, fit_confidence=False)
    same = family_of(own_bundle).evaluate(str(own_bundle), later, no_progress)
    assert isinstance(same, AnswerScores)
    assert same.fitted_on_these
    show_seen(same)
    assert "It was fitted on these very questions" in capsys.readouterr().out
    again = family_of(own_bundle).evaluate(
        str(own_bundle), dataclasses.replace(later, limit=60), no_progress
    )
    assert isinstance(again, AnswerScores)
    assert again.confidence == bundle.confidence
    assert not again.fitted_on_these  # other questions, as far as a hash can tell


def test_what_cannot_keep_confidence_is_refused_at_once(
    own_bundle: Path, own_answers: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    def refused(model: str | Path, match: str, **options: Any) -> None:
        with pytest.raises((InputError, ResourceError), match=match):
            family_of(model).evaluate(str(model), EvaluateOptions(**options), no_progress)

    fit = {"data": own_answers, "fit_confidence": True}
    refused(tiny_checkpoint(), "no bundle", **fit)
    refused("nano", "part of an installation", **fit)
    refused(own_bundle, "--fit-confidence is about questions", data=None, fit_confidence=True)
    refused(own_bundle, "--paraphrases is about questions", data=None, paraphrases=own_answers)
    refused(own_bundle, "Add --fit-confidence", data=own_answers, selective_accuracy=0.9)
