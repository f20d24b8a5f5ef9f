"""How well an engine answers: the papers' metrics over a list of questions.

Questions are grouped by image, so that the engine's cached image prefix is reused, and joined
with their answers by id.
"""

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from medmoe_edge.data.datasets import Example, LabelledImage
from medmoe_edge.errors import DataError, ResourceError
from medmoe_edge.evaluation.metrics import (
    bootstrap_interval,
    closed_correct,
    exact_match,
    token_recall,
)

Progress = Callable[[int, int], None]
"""Called with the images done and the images in all."""

UNKNOWN = "unknown"


class Answer(Protocol):
    """What the evaluation reads of an answer."""

    @property
    def text(self) -> str: ...
    @property
    def modality(self) -> str | None: ...


class Engine(Protocol):
    """What the evaluation asks of an engine; `expert_names` may be empty."""

    @property
    def expert_names(self) -> Sequence[str]: ...
    def ask_all(self, image: Path, questions: Sequence[str], /) -> Sequence[Answer]: ...
    def modality(self, image: Path, /) -> str | None: ...


@dataclass(frozen=True)
class Prediction:
    """One scored answer: `correct` is its exact match, `score` (0..1) its part of the accuracy."""

    id: str
    question: str
    prediction: str
    correct: bool
    score: float


@dataclass(frozen=True)
class Score:
    """Figures (0..1) over `n` questions, with 95% intervals from resampling their images.

    `accuracy` is the papers' mixture: the reference found in the prediction (closed questions),
    token recall (open ones).
    """

    n: int
    exact_match: float
    exact_match_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]


@dataclass(frozen=True)
class SourceScore:
    """One source's figures, and those of its open and closed questions (None: it has none)."""

    overall: Score
    open: Score | None
    closed: Score | None


@dataclass(frozen=True)
class ModalityAccuracy:
    """The modality found, per image: `confusion[true][found]` counts every labelled image.

    `accuracy` is over the `images` whose true modality has an expert (None: there are none).
    """

    images: int
    accuracy: float | None
    confusion: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Evaluation:
    """All figures of one evaluation, and the predictions in the order of the examples."""

    overall: Score
    open: Score | None
    closed: Score | None
    by_source: Mapping[str, SourceScore]
    by_modality: Mapping[str, Score]
    router: ModalityAccuracy
    predictions: tuple[Prediction, ...]

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; the predictions are saved apart."""
        figures = asdict(replace(self, predictions=()))
        del figures["predictions"]
        return figures


def evaluate(
    engine: Engine, examples: Sequence[Example], *, progress: Progress | None = None
) -> Evaluation:
    """Ask every question and score the answers.

    Raises `DataError` for no examples or an id used twice; the engine's errors pass through.
    """
    if not examples:
        raise DataError("There are no questions to evaluate.", "Give at least one.")
    if len({example.id for example in examples}) < len(examples):
        raise DataError("Two questions share an id.", "Give every question an id of its own.")
    answers = _ask(engine, examples, progress)
    scored = [_scored(example, answers[example.id].text) for example in examples]
    pairs = list(zip(examples, scored, strict=True))
    # One modality per image: that of its first answer, which the reversal lets win.
    found = {example.image: answers[example.id].modality for example in reversed(examples)}
    labels = {example.image: example.modality for example in examples if example.modality}
    return Evaluation(
        overall=_score(pairs),
        open=_score_if_any(_of_type(pairs, "OPEN")),
        closed=_score_if_any(_of_type(pairs, "CLOSED")),
        by_source={
            source: SourceScore(
                overall=_score(group),
                open=_score_if_any(_of_type(group, "OPEN")),
                closed=_score_if_any(_of_type(group, "CLOSED")),
            )
            for source, group in _grouped(pairs, lambda example: example.source)
        },
        by_modality={
            modality: _score(group)
            for modality, group in _grouped(pairs, lambda example: example.modality or UNKNOWN)
        },
        router=_modality_accuracy(
            ((label, found[image]) for image, label in labels.items()), engine.expert_names
        ),
        predictions=tuple(scored),
    )


def evaluate_labels(
    engine: Engine, images: Sequence[LabelledImage], *, progress: Progress | None = None
) -> ModalityAccuracy:
    """Compare the modality that the engine finds with the label of every image."""
    if not images:
        raise DataError("There are no labelled images to evaluate.", "Give at least one.")
    pairs = []
    for done, image in enumerate(images, start=1):
        pairs.append((image.modality, engine.modality(image.image)))
        if progress:
            progress(done, len(images))
    return _modality_accuracy(pairs, engine.expert_names)


def save_predictions(predictions: Iterable[Prediction], file: Path) -> None:
    """Write one JSON object a line; an existing file is replaced only when all is written."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            for prediction in predictions:
                stream.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
        part.replace(file)
    except OSError as error:
        raise ResourceError(
            f"{file} cannot be written ({error.strerror}).", "Check its folder and the free space."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


_Pairs = list[tuple[Example, Prediction]]


def _ask(
    engine: Engine, examples: Sequence[Example], progress: Progress | None
) -> dict[str, Answer]:
    by_image: dict[Path, list[Example]] = defaultdict(list)
    for example in examples:
        by_image[example.image].append(example)
    answers: dict[str, Answer] = {}
    for done, (image, group) in enumerate(by_image.items(), start=1):
        replies = engine.ask_all(image, [example.question for example in group])
        answers |= {example.id: reply for example, reply in zip(group, replies, strict=True)}
        if progress:
            progress(done, len(by_image))
    return answers


def _scored(example: Example, text: str) -> Prediction:
    correct = exact_match(text, example.answer)
    if example.answer_type == "CLOSED":
        score = float(closed_correct(text, example.answer))
    else:
        score = token_recall(text, example.answer)
    return Prediction(example.id, example.question, text, correct, score)


def _score(pairs: _Pairs) -> Score:
    images = [str(example.image) for example, _ in pairs]
    exact = [float(prediction.correct) for _, prediction in pairs]
    accuracy = [prediction.score for _, prediction in pairs]
    return Score(
        n=len(pairs),
        exact_match=sum(exact) / len(exact),
        exact_match_interval=bootstrap_interval(exact, images),
        accuracy=sum(accuracy) / len(accuracy),
        accuracy_interval=bootstrap_interval(accuracy, images),
    )


def _score_if_any(pairs: _Pairs) -> Score | None:
    return _score(pairs) if pairs else None


def _of_type(pairs: _Pairs, answer_type: str) -> _Pairs:
    return [pair for pair in pairs if pair[0].answer_type == answer_type]


def _grouped(pairs: _Pairs, key: Callable[[Example], str]) -> list[tuple[str, _Pairs]]:
    groups: dict[str, _Pairs] = defaultdict(list)
    for pair in pairs:
        groups[key(pair[0])].append(pair)
    return sorted(groups.items())


def _modality_accuracy(
    pairs: Iterable[tuple[str, str | None]], known: Sequence[str]
) -> ModalityAccuracy:
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    for true, found in pairs:
        confusion[true][found or UNKNOWN] += 1
    images = sum(confusion[name].total() for name in known if name in confusion)
    right = sum(confusion[name][name] for name in known if name in confusion)
    return ModalityAccuracy(
        images=images,
        accuracy=right / images if images else None,
        confusion={true: dict(sorted(row.items())) for true, row in sorted(confusion.items())},
    )
