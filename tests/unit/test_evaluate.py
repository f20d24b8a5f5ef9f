import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from medmoe_edge.data.datasets import AnswerType, Example, LabelledImage
from medmoe_edge.errors import DataError, ResourceError
from medmoe_edge.evaluation.evaluate import Prediction, evaluate, evaluate_labels, save_predictions


@dataclass
class FakeAnswer:
    text: str
    modality: str | None


class FakeEngine:
    """Answers from a table of questions and sees modalities from a table of images."""

    expert_names = ("mri", "ct", "pathology", "xray")

    def __init__(self, answers: dict[str, str], modalities: dict[str, str | None]) -> None:
        self.answers = answers
        self.modalities = modalities
        self.asked: list[tuple[str, list[str]]] = []

    def ask_all(self, image: Path, questions: Sequence[str]) -> list[FakeAnswer]:
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
    assert set(figures) == {"overall", "open", "closed", "by_source", "by_modality", "router"}
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


def test_no_label_with_an_expert() -> None:
    result = evaluate_labels(FakeEngine({}, MODALITIES), [label("d", "ultrasound")])
    assert (result.images, result.accuracy) == (0, None)


def test_predictions_are_saved_whole(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    save_predictions([Prediction("1", "q", "löwer\nlobe", True, 0.5)], file)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {"id": "1", "question": "q", "prediction": "löwer\nlobe", "correct": True, "score": 0.5}
    ]
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ResourceError, match="cannot be written"):
        save_predictions([], file / "inside.jsonl")
