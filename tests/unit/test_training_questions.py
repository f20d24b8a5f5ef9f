"""Questions made of facts: as often yes as no, polarity kept, refusals where they belong."""

import random
import re
from collections import Counter
from collections.abc import Set
from pathlib import Path

import pytest

from medmoe_edge.config import Refusal, RefusalCode
from medmoe_edge.data.datasets import NO_SCAN, Finding, LabelledImage
from medmoe_edge.evaluation.findings import question_key
from medmoe_edge.training.questions import (
    KINDS,
    NORMAL,
    Asking,
    Facts,
    facts_of_findings,
    facts_of_labels,
    paraphrases,
    phrase_book,
    reworded,
)

CODES: tuple[RefusalCode, ...] = ("not_a_scan", "not_answerable", "language")
REFUSING = [Refusal(code, f"<|{code}|>") for code in CODES]
REFUSALS = {each.code: each.token for each in REFUSING}


def film(
    index: int, *present: str, absent: tuple[str, ...] = (), implied: tuple[str, ...] = ()
) -> Facts:
    sets = (frozenset(present), frozenset(absent), frozenset(implied))
    return Facts(Path(f"{index}.png"), "xray", "chest", "films", *sets, view="pa")


FILMS = [
    *(film(i, "pleural effusion", absent=("pneumothorax",)) for i in range(30)),
    *(film(i, NORMAL, absent=("pleural effusion", "pneumothorax")) for i in range(30, 130)),
    *(film(i, "pneumothorax", implied=("pleural effusion",)) for i in range(130, 140)),
]


def asked(name: str, known: list[Facts], seed: int = 0) -> list[tuple[int, str, str]]:
    """The yes/no questions about a finding, with the place of the image."""
    book = phrase_book()
    names = sorted(book["findings"][name]["names"], key=len, reverse=True)
    turns = Asking(known, ()).epoch(random.Random(seed), 1.0, 0.0)
    return [
        (index, question, answer)
        for index, own in enumerate(turns)
        for question, answer in own
        if answer in ("Yes", "No") and any(each.lower() in question.lower() for each in names)
    ]


def negated(question: str, name: str) -> bool:
    """Whether a question's yes means that the finding is absent, by the phrase book's lists."""
    book = phrase_book()

    names = "|".join(map(re.escape, book["findings"][name]["names"]))

    def fits(kind: str) -> bool:
        patterns = (re.escape(wording).replace(r"\{n\}", f"(?:{names})") for wording in book[kind])
        return any(
            re.fullmatch(re.sub(r"\\\{[mab]\\\}", ".+", each), question, re.IGNORECASE)
            for each in patterns
        )

    assert fits("present") != fits("absent"), question
    return fits("absent")


def test_yes_is_as_frequent_as_no_for_each_finding() -> None:
    for name in ("pleural effusion", "pneumothorax"):
        shown = Counter(name in FILMS[index].present for index, *_ in asked(name, FILMS))
        assert shown[True] == shown[False] >= 20, name


def test_the_answer_is_the_fact_whatever_the_wording() -> None:
    told = asked("pleural effusion", FILMS)
    kinds = set()
    for index, question, answer in told:
        present = "pleural effusion" in FILMS[index].present
        backwards = negated(question, "pleural effusion")
        kinds.add((present, backwards))
        assert answer == ("Yes" if present != backwards else "No"), question
    assert len(kinds) == 4


def test_what_is_only_not_labelled_is_asked_less() -> None:
    shown = (FILMS[index] for index, *_ in asked("pleural effusion", FILMS))
    without = [each for each in shown if "pleural effusion" not in each.present]
    implied = sum("pleural effusion" in each.implied for each in without)
    assert 0 < implied < len(without) / 2


def test_refusals_answer_what_no_picture_can() -> None:
    photo = Facts(Path("cat.png"), NO_SCAN, "", "photos")
    turns = Asking([*FILMS, photo], REFUSING).epoch(random.Random(1), 1.0, 1.0)
    assert {answer for _, answer in turns[-1]} == {REFUSALS["not_a_scan"]}
    of_films = Counter(answer for own in turns[:-1] for _, answer in own)
    assert of_films[REFUSALS["not_answerable"]] > 20
    assert of_films[REFUSALS["language"]] > 20
    assert REFUSALS["not_a_scan"] not in of_films
    without = Asking([*FILMS, photo], ()).epoch(random.Random(1), 1.0, 1.0)
    assert not without[-1]
    assert not {a for own in without for _, a in own} & set(REFUSALS.values())


def test_every_wording_is_whole() -> None:
    turns = Asking(FILMS, REFUSING).epoch(random.Random(2), 1.0, 1.0)
    for question, _ in (turn for own in turns for turn in own):
        assert "{" not in question
        assert question.strip() == question
        assert question


def test_an_epoch_repeats_with_its_seed() -> None:
    first = Asking(FILMS, REFUSING).epoch(random.Random(5), 0.5, 0.3)
    assert first == Asking(FILMS, REFUSING).epoch(random.Random(5), 0.5, 0.3)
    assert first != Asking(FILMS, REFUSING).epoch(random.Random(6), 0.5, 0.3)


@pytest.mark.parametrize(
    ("label", "present", "absent"),
    [
        ("glioma", {"glioma", "tumor"}, {"meningioma", "pituitary tumor"}),
        ("no tumor", {NORMAL}, {"tumor", *KINDS["tumor"]}),
        ("no covid-19", {NORMAL}, {"covid-19"}),
        ("normal breast", {NORMAL}, {"lesion", *KINDS["lesion"]}),
        ("Pneumonia", {"pneumonia"}, set()),
        ("", set(), set()),
        ("normal", {NORMAL}, set()),
        ("Healthy", {NORMAL}, set()),
        ("normal chest", {NORMAL}, set()),
    ],
)
def test_what_a_label_says(label: str, present: Set[str], absent: Set[str]) -> None:
    (facts,) = facts_of_labels([LabelledImage(Path("a.png"), "mri", "head", label, "set", "train")])
    assert facts.present == present
    assert facts.absent == absent
    assert not facts.implied


def test_what_a_finding_says() -> None:
    item = Finding(
        *(Path("a.png"), "xray", "chest", "ap", ("nodule",), ("mass",), ("hernia",)),
        *("patient", "train", None, "films"),
    )
    (facts,) = facts_of_findings([item])
    assert [*facts.present, *facts.absent, *facts.implied] == ["nodule", "mass", "hernia"]
    assert facts.view == "ap"


@pytest.mark.parametrize(
    "question",
    [
        "Is there a pleural effusion?",
        "What modality is used to take this image?",
        "Where is the liver?",
    ],
)
def test_questions_are_put_in_other_words(question: str) -> None:
    wordings = {reworded(question, random.Random(seed)) for seed in range(40)}
    assert len(wordings) >= 3
    assert question not in wordings


def test_a_question_is_put_as_people_put_it_and_as_rules_do() -> None:
    question = "Is there a pleural effusion?"
    people = set(paraphrases()[question_key(question)])
    wordings = [reworded(question, random.Random(seed)) for seed in range(200)]
    shares = sum(wording in people for wording in wordings) / 200
    assert 0.55 < shares < 0.85
    assert {*wordings} - people, "no rule put it otherwise"
    assert wordings == [reworded(f" {question} ", random.Random(seed)) for seed in range(200)]


def test_all_that_people_put_is_a_question_of_its_own() -> None:
    book = paraphrases()
    assert len(book) > 2000
    for key, wordings in book.items():
        assert re.fullmatch("[0-9a-f]{16}", key)
        assert len({wording.lower() for wording in wordings}) == len(wordings) >= 3, key
        assert all(2 <= len(wording) <= 200 for wording in wordings), key
        assert all(wording == " ".join(wording.split()) for wording in wordings), key
        assert all(question_key(wording) != key for wording in wordings), key


def test_no_wording_changes_sides() -> None:
    """Of what names a side no wording names the other alone."""
    sides = [re.compile(rf"\b{side}\b", re.IGNORECASE) for side in ("left", "right")]
    for key, wordings in paraphrases().items():
        named = [[bool(side.search(text)) for side in sides] for text in wordings]
        only_left = sum(pair == [True, False] for pair in named)
        only_right = sum(pair == [False, True] for pair in named)
        assert not (only_left and only_right), (key, wordings)


def test_a_question_that_no_rule_knows_stays() -> None:
    assert reworded("Zyzzyva 17?", random.Random(0)) == "Zyzzyva 17?"
