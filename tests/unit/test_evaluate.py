import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmoe_edge.data.datasets import AnswerType, Example, LabelledImage, read_examples
from medmoe_edge.errors import DataError, ResourceError
from medmoe_edge.evaluation.evaluate import (
    Prediction,
    evaluate,
    evaluate_blind,
    evaluate_labels,
    sample_examples,
    save_predictions,
    score_predictions,
)
from medmoe_edge.image.pixels import Image


@dataclass
class FakeAnswer:
    text: str
    modality: str | None
    confidence: float | None = 0.75
    complete: bool = True
    unsure: bool = False
    refusals: dict[str, float] = field(default_factory=dict)


class FakeEngine:
    """Answers from a table of questions and sees modalities from a table of images."""

    expert_names = ("mri", "ct", "pathology", "xray")

    def __init__(self, answers: dict[str, str], modalities: dict[str, str | None]) -> None:
        self.answers = answers
        self.modalities = modalities
        self.asked: list[tuple[str, list[str]]] = []

    def ask_all(
        self, image: Path | Image, questions: Sequence[str], *, max_new_tokens: int
    ) -> list[FakeAnswer]:
        assert max_new_tokens == 32
        if isinstance(image, Image):  # the black picture
            assert int(image.pixels.max()) == 0
            self.asked.append(("black", list(questions)))
            return [FakeAnswer("No", None) for _ in questions]
        self.asked.append((image.name, list(questions)))
        return [FakeAnswer(self.answers[q], self.modalities[image.name]) for q in questions]

    def modality(self, image: Path) -> str | None:
        return self.modalities[image.name]


def example(
    number: int,
    image: str,
    answer: str,
    kind: AnswerType = "OPEN",
    *,
    modality: str | None = "ct",
    source: str = "slake",
) -> Example:
    return Example(
        id=f"id{number}",
        image=Path(image),
        question=f"q{number}",
        answer=answer,
        answer_type=kind,
        modality=modality,
        body=None,
        content=None,
        source=source,
    )


EXAMPLES = [
    example(1, "a", "left lung"),
    example(2, "b", "no", "CLOSED", modality="mri"),
    example(3, "a", "Yes", "CLOSED"),
    example(4, "c", "chest", modality=None, source="vqa_rad"),
    example(5, "d", "eye", modality="fundus", source="vqa_rad"),
]
ANSWERS = {"q1": "left", "q2": "no, normal", "q3": "yes", "q4": "Chest.", "q5": "liver"}
MODALITIES = {"a": "ct", "b": "xray", "c": "xray", "d": None}


def test_figures() -> None:
    engine = FakeEngine(ANSWERS, MODALITIES)
    steps: list[tuple[int, int]] = []
    result = evaluate(engine, EXAMPLES, progress=lambda done, total: steps.append((done, total)))

    assert engine.asked == [("a", ["q1", "q3"]), ("b", ["q2"]), ("c", ["q4"]), ("d", ["q5"])]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [one.id for one in result.predictions] == ["id1", "id2", "id3", "id4", "id5"]
    assert [one.correct for one in result.predictions] == [False, False, True, True, False]
    assert [one.score for one in result.predictions] == [0.5, 1.0, 1.0, 1.0, 0.0]

    assert result.overall.n == 5
    assert result.overall.exact_match == pytest.approx(2 / 5)
    assert result.overall.accuracy == pytest.approx(3.5 / 5)
    low, high = result.overall.accuracy_interval
    assert 0 <= low < result.overall.accuracy < high <= 1
    assert result.open is not None
    assert result.open.n == 3
    assert result.open.accuracy == pytest.approx(0.5)
    assert result.closed is not None
    assert (result.closed.n, result.closed.accuracy, result.closed.exact_match) == (2, 1.0, 0.5)

    slake, rad = result.by_source["slake"], result.by_source["vqa_rad"]
    assert (slake.overall.n, rad.overall.n) == (3, 2)
    assert slake.closed is not None
    assert slake.closed.n == 2
    assert rad.closed is None
    assert {name: score.n for name, score in result.by_modality.items()} == {
        "ct": 2,
        "fundus": 1,
        "mri": 1,
        "unknown": 1,
    }
    assert (result.router.images, result.router.accuracy) == (2, 0.5)
    assert result.router.confusion == {
        "ct": {"ct": 1},
        "fundus": {"unknown": 1},
        "mri": {"xray": 1},
    }


def test_order_of_the_examples_does_not_matter() -> None:
    engine = FakeEngine(ANSWERS, MODALITIES)
    forward, backward = evaluate(engine, EXAMPLES), evaluate(engine, EXAMPLES[::-1])
    assert forward.predictions == backward.predictions[::-1]
    assert forward.by_modality["ct"] == backward.by_modality["ct"]
    assert forward.router == backward.router


def test_json_is_plain_and_repeatable() -> None:
    engine = FakeEngine(ANSWERS, MODALITIES)
    figures = evaluate(engine, EXAMPLES).to_json()
    text = json.dumps(figures)
    assert text == json.dumps(evaluate(engine, EXAMPLES).to_json())
    papers = {"open_recall", "official_open_recall", "official_closed_accuracy"}
    assert set(figures) == {
        *("overall", "open", "closed", "by_source", "by_modality", "router"),
        *("reliability", "unsure", "cut_off", *papers),
    }
    assert figures["by_source"]["vqa_rad"]["closed"] is None
    assert json.loads(text)["by_source"]["slake"]["overall"]["n"] == 3


def test_bad_lists() -> None:
    engine = FakeEngine(ANSWERS, MODALITIES)
    with pytest.raises(DataError, match="no questions"):
        evaluate(engine, [])
    with pytest.raises(DataError, match="share an id"):
        evaluate(engine, [EXAMPLES[0], EXAMPLES[0]])
    with pytest.raises(DataError, match="no labelled images"):
        evaluate_labels(engine, [])


def label(image: str, modality: str) -> LabelledImage:
    return LabelledImage(Path(image), modality, "head", "none", "source", "val")


def test_labels() -> None:
    engine = FakeEngine({}, MODALITIES)
    steps: list[int] = []
    images = [label("a", "ct"), label("b", "ct"), label("c", "xray"), label("d", "ultrasound")]
    result = evaluate_labels(engine, images, progress=lambda done, _: steps.append(done))
    assert steps == [1, 2, 3, 4]
    assert result.images == 3
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.confusion == {
        "ct": {"ct": 1, "xray": 1},
        "ultrasound": {"unknown": 1},
        "xray": {"xray": 1},
    }


def test_a_patients_images_count_as_one_for_an_interval() -> None:
    """Ten images of each patient are answered alike: no more is known than of one each."""
    engine = FakeEngine({f"q{n}": "yes" if n // 10 % 2 else "no" for n in range(200)}, {"a": "ct"})
    engine.modalities = {f"i{n}": "ct" for n in range(200)}
    asked = [example(n, f"i{n}", "yes") for n in range(200)]
    owned = [replace(each, patient=str(n // 10)) for n, each in enumerate(asked)]
    one = [replace(each, image=Path(f"i{10 * (n // 10)}")) for n, each in enumerate(asked)]
    wide, narrow, same = (evaluate(engine, each).overall for each in (owned, asked, one))
    low, high = wide.exact_match_interval
    assert high - low > 2.5 * np.subtract(*narrow.exact_match_interval[::-1])
    assert high - low == pytest.approx(np.subtract(*same.exact_match_interval[::-1]), rel=0.1)


def test_questions_without_an_answer_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    found = evaluate(
        FakeEngine({"q1": "x", "q2": "y"}, {"a": "ct"}), [example(1, "a", ""), example(2, "a", "y")]
    )
    assert found.overall.exact_match == 0.5
    assert "1 questions have no answer to be met" in caplog.text


def test_no_label_with_an_expert() -> None:
    result = evaluate_labels(FakeEngine({}, MODALITIES), [label("d", "ultrasound")])
    assert (result.images, result.accuracy) == (0, None)


def test_predictions_are_saved_whole(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    save_predictions([Prediction("1", "q", "löwer\nlobe", True, 0.5, 0.5, "x", "OPEN")], file)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {
            **{"id": "1", "question": "q", "prediction": "löwer\nlobe", "correct": True},
            **{"score": 0.5, "official_score": 0.5, "reference": "x", "answer_type": "OPEN"},
            **{"confidence": None, "modality": None, "modality_found": None, "complete": True},
            **{"unsure": False, "refusals": {}},
        }
    ]
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ResourceError, match="cannot be written"):
        save_predictions([], file / "inside.jsonl")


def test_saved_answers_have_the_same_figures_again(tmp_path: Path) -> None:
    """What was unsure and what was cut off is not lost."""
    engine = FakeEngine(ANSWERS, MODALITIES)
    said = engine.ask_all

    def doubtful(*arguments: Any, **options: Any) -> list[FakeAnswer]:
        return [
            replace(a, unsure=a.text == "left", complete=a.text != "yes")
            for a in said(*arguments, **options)
        ]

    engine.ask_all = doubtful  # type: ignore[method-assign]
    rows = [{"id": e.id, "image": str(e.image), "question": e.question} for e in EXAMPLES]
    rows = [
        row | {"answer": e.answer, "answer_type": e.answer_type, "source": e.source}
        for row, e in zip(rows, EXAMPLES, strict=True)
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = evaluate(engine, EXAMPLES)
    assert 0 < found.unsure.answers < 1
    save_predictions(found.predictions, tmp_path / "said.jsonl")
    again = score_predictions(tmp_path / "said.jsonl", tmp_path / "asked.jsonl")
    for name in ("overall", "unsure", "cut_off", "reliability", "by_source"):
        assert getattr(again, name) == getattr(found, name), name


# --- figures of the papers, and without looking -------------------------------------------------


def test_repeated_words_pay_in_the_official_figure_alone() -> None:
    """Counted by hand: 3 of the prediction's words are met, 1 of the reference's is missing."""
    engine = FakeEngine({"q1": "left left left"}, {"a": "ct"})
    found = evaluate(engine, [example(1, "a", "left lung")])
    assert (found.open_recall, found.official_open_recall) == (0.5, 0.75)
    assert found.official_closed_accuracy is None


def test_the_black_picture_is_asked_each_question_once() -> None:
    engine = FakeEngine(ANSWERS, MODALITIES)
    twice = [*EXAMPLES, replace(EXAMPLES[1], id="again", image=Path("d"))]
    found = evaluate_blind(engine, twice)
    assert engine.asked == [("black", ["q1", "q2", "q3", "q4", "q5"])]
    assert found.closed is not None
    assert found.closed.accuracy == pytest.approx(2 / 3)  # "no" was right twice, "Yes" is not met
    assert found.open is not None
    assert found.open.accuracy == 0.0


def test_reliability() -> None:
    found = evaluate(FakeEngine(ANSWERS, MODALITIES), EXAMPLES).reliability
    assert found is not None
    assert found.n == 5
    assert found.ece == pytest.approx(0.75 - 2 / 5)
    assert found.risk_coverage[-1] == pytest.approx((1.0, 3 / 5))


def test_a_sample_is_drawn_by_its_seed() -> None:
    many = [example(number, "a", "x") for number in range(100)]
    first = sample_examples(many, 10, seed=0)
    assert first == sample_examples(many, 10, seed=0) != sample_examples(many, 10, seed=1)
    assert [many.index(one) for one in first] == sorted(many.index(one) for one in first)
    assert sample_examples(many, None, 0) == sample_examples(many, 100, 0) == many


# --- answers in a file --------------------------------------------------------------------------


def official_item(identity: object, question: str, answer: str, kind: str) -> dict[str, object]:
    """In the form of the published VQA-RAD list, its misspelt key included."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {
        **{"id": identity, "image": f"synpic{identity}.jpg", "answer_type": kind},
        "conversatons": turns,
    }


OFFICIAL = [
    official_item(10, "Is there an aneurysm?", "Yes", "CLOSED"),
    official_item(12, "Where is the mass?", "in the left upper lobe", "OPEN"),
    official_item(13, "Is it axial?", "no ", "CLOSED"),  # a space, as the published file has some
    official_item(19, "Which organ?", "Liver.", "OPEN"),
]
SAID = {10: "Yes, there is one.", 12: "left, left of the left lung", 13: "no", 19: "the liver"}


def official_files(folder: Path, said: dict[int, str]) -> tuple[Path, Path]:
    answers, test = folder / "answers.jsonl", folder / "test.json"
    test.write_text(json.dumps(OFFICIAL))
    answers.write_text(
        "".join(
            json.dumps(
                {
                    **{"question_id": identity, "prompt": "?", "text": text},
                    **{"answer_id": "x", "model_id": "m", "metadata": {}},
                }
            )
            + "\n"
            for identity, text in said.items()
        )
    )
    return answers, test


def test_answers_in_the_official_form(tmp_path: Path) -> None:
    found = score_predictions(*official_files(tmp_path, SAID))
    # By hand, of question 12: "left" three times is met; in, upper and lobe are missing: 3/6.
    assert found.official_open_recall == pytest.approx((3 / 6 + 1) / 2)
    assert found.open_recall == pytest.approx((1 / 4 + 1) / 2)
    assert found.official_closed_accuracy == 0.5  # "no " is not in "no"
    assert found.closed is not None
    assert found.closed.accuracy == 1.0
    assert found.reliability is None
    in_another_order = dict(reversed(SAID.items()))
    assert score_predictions(*official_files(tmp_path, in_another_order)) == found


def test_our_own_answers_are_scored_again(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    lines = [
        {"image": one.image.name, "question": one.question, "answer": one.answer}
        | {"id": one.id, "answer_type": one.answer_type, "modality": one.modality}
        | {"source": one.source}
        for one in EXAMPLES
    ]
    questions.write_text("\n".join(map(json.dumps, lines)))
    engine = FakeEngine(ANSWERS, MODALITIES)
    asked = evaluate(engine, read_examples(questions))
    save_predictions(asked.predictions, tmp_path / "out.jsonl")
    again = score_predictions(tmp_path / "out.jsonl", questions)
    assert again.predictions == asked.predictions
    assert again.reliability == asked.reliability


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({10: "Yes"}, "of 4 questions and 1 answers, 3 are not answered (such as '12')"),
        (SAID | {77: "no"}, "1 are not asked (such as '77')"),
        ({key + 1: text for key, text in SAID.items()}, "3 are not asked"),
    ],
)
def test_answers_to_other_questions_are_refused(
    tmp_path: Path, said: dict[int, str], what: str
) -> None:
    with pytest.raises(DataError) as caught:
        score_predictions(*official_files(tmp_path, said))
    assert what in caught.value.what
    assert "references" in caught.value.remedy


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"question_id": 10}',
        '{"id": "10"}',
        '{"id": "10", "prediction": "x", "confidence": 2}',
        '{"id": "10", "prediction": "x", "confidence": NaN}',
        '{"id": "10", "prediction": "x", "complete": 1}',
        '{"id": "10", "prediction": "x", "unsure": "no"}',
        "",
    ],
)
def test_a_bad_file_of_answers(tmp_path: Path, line: str) -> None:
    answers, test = official_files(tmp_path, SAID)
    answers.write_text(line)
    with pytest.raises(DataError, match=r"answers\.jsonl"):
        score_predictions(answers, test)
