"""How well an engine answers: the papers' metrics over a list of questions.

Questions are grouped by image, so that the engine's cached image prefix is reused, and joined
with their answers by id.

The same figures are made of answers that lie in a file (`eval --predictions --references`), one
JSON object a line: in the form of the official Med-MoE code, with `question_id` and `text`, or our
own (`eval --predictions OUT`), with `id` and `prediction`. References are a question file of either
form (`data.datasets`). The official scorer pairs the two by their order and never looks at an id;
here ids have to match.
"""

import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from medmoe_edge._types import Counting, no_counting
from medmoe_edge.atomic import atomic_file, writing
from medmoe_edge.config import Reliability, Unsure
from medmoe_edge.data.datasets import (
    AnswerType,
    Example,
    LabelledImage,
    Record,
    by_image,
    json_lines,
    owner_of,
    read_examples,
    read_text,
)
from medmoe_edge.errors import DataError, InputError, plain
from medmoe_edge.evaluation.metrics import (
    bootstrap_interval,
    closed_correct,
    exact_match,
    official_closed_correct,
    official_recall,
    reliability,
    selective,
    token_recall,
)
from medmoe_edge.image.pixels import Image, black_picture

Choose = Callable[[Sequence[Example]], Sequence[Example]]
"""Picks the questions that are scored."""

UNKNOWN = "unknown"
logger = logging.getLogger(__name__)
MAX_NEW_TOKENS = 32
MOST_NEW_TOKENS = 2048  # what the official evaluation allows an answer
BLIND_AT_ONCE = 32  # questions


class Answer(Protocol):
    """What the evaluation reads of an answer; `confidence` is None where nobody knows it."""

    @property
    def text(self) -> str: ...
    @property
    def modality(self) -> str | None: ...
    @property
    def confidence(self) -> float | None: ...
    @property
    def complete(self) -> bool: ...
    @property
    def unsure(self) -> bool: ...
    @property
    def refusals(self) -> Mapping[str, float]: ...


class Engine(Protocol):
    """What the evaluation asks of an engine; `expert_names` may be empty."""

    @property
    def expert_names(self) -> Sequence[str]: ...
    def ask_all(
        self, image: Path | Image, questions: Sequence[str], /, *, max_new_tokens: int
    ) -> Sequence[Answer]: ...
    def modality(self, image: Path, /) -> str | None: ...


@dataclass(frozen=True)
class Prediction:
    """One scored answer.

    Attributes:
        id: Of its question.
        question: As it was asked.
        prediction: What was answered.
        correct: Whether it matches the reference exactly, after normalisation.
        score: Its part of the accuracy, 0..1.
        official_score: The same as the official scorer computes it.
        reference: What should have been answered.
        answer_type: "OPEN" or "CLOSED".
        confidence: The model's own, 0..1; None where it is not known.
        modality: The image's label; None where it has none.
        modality_found: What the router read; None where it is not known.
        complete: False of an answer that was cut off.
        unsure: Whether the answer was marked as a guess.
        refusals: How likely the model found it to have no answer, by the code of each reason.
    """

    id: str
    question: str
    prediction: str
    correct: bool
    score: float
    official_score: float
    reference: str
    answer_type: AnswerType
    confidence: float | None = None
    modality: str | None = None
    modality_found: str | None = None
    complete: bool = True
    unsure: bool = False
    refusals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """Figures (0..1) over `n` questions, with 95% intervals from resampling patients or images.

    `accuracy` is the papers' mixture: the reference found in the prediction (closed questions),
    token recall (open ones).
    """

    n: int
    exact_match: float
    exact_match_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """The figures of some questions, and of the open and closed ones (None: there are none).

    `open_recall` is ours, a repeated word counts only where the reference repeats it;
    `official_open_recall` and `official_closed_accuracy` are what the official scorer would print,
    and what the papers report. All are 0..1.
    """

    overall: Score
    open: Score | None
    closed: Score | None
    open_recall: float | None
    official_open_recall: float | None
    official_closed_accuracy: float | None


@dataclass(frozen=True)
class ModalityAccuracy:
    """The modality found, per image: `confusion[true][found]` counts every labelled image.

    `accuracy` is over the `images` whose true modality has an expert (None: there are none).
    """

    images: int
    accuracy: float | None
    confusion: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Evaluation(Scores):
    """All figures of one evaluation, and the predictions in the order of the examples.

    `cut_off` counts the answers that are not whole; `unsure` is what marking answers as guesses
    gave.
    """

    by_source: Mapping[str, Scores]
    by_modality: Mapping[str, Score]
    router: ModalityAccuracy
    reliability: Reliability | None
    unsure: Unsure
    cut_off: int
    predictions: tuple[Prediction, ...]

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; the predictions are saved apart."""
        return {name: plain(part) for name, part in vars(self).items() if name != "predictions"}


def evaluate(
    engine: Engine,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Counting = no_counting,
) -> Evaluation:
    """Ask every question and score the answers.

    Args:
        engine: What answers.
        examples: At least one question; every id once.
        max_new_tokens: The longest answer, 1 to 2,048; what is cut off there is counted.
        progress: Called with the images done and the images in all.

    Raises:
        DataError: There are no examples, or an id is used twice.
        InputError: `max_new_tokens` is out of range.
        MedMoEError: What the engine raises passes through.
    """
    check_examples(examples)
    if not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}.", f"Allow from 1 to {MOST_NEW_TOKENS:,}."
        )
    answers = _ask(engine, examples, max_new_tokens, progress)
    return score_answers(examples, answers, engine.expert_names)


def evaluate_blind(
    engine: Engine,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Counting = no_counting,
) -> Scores:
    """Score the same questions asked about a black picture: what is right without looking.

    Equal questions are asked once. `progress` is called with the questions done and all of them;
    the errors are those of `evaluate`.
    """
    check_examples(examples)
    black = black_picture()
    questions = list(dict.fromkeys(example.question for example in examples))
    said: dict[str, Answer] = {}
    for start in range(0, len(questions), BLIND_AT_ONCE):
        some = questions[start : start + BLIND_AT_ONCE]
        replies = engine.ask_all(black, some, max_new_tokens=max_new_tokens)
        said |= dict(zip(some, replies, strict=True))
        progress(len(said), len(questions))
    answers = {example.id: said[example.question] for example in examples}
    return _scores([(example, _scored(example, answers[example.id])) for example in examples])


def score_answers(
    examples: Sequence[Example], answers: Mapping[str, Answer], expert_names: Sequence[str] = ()
) -> Evaluation:
    """Score answers, each under the id of its question."""
    if unknown := sum(not example.answer for example in examples):
        logger.warning("%d questions have no answer to be met: they count as wrong.", unknown)
    scored = [_scored(example, answers[example.id]) for example in examples]
    pairs = list(zip(examples, scored, strict=True))
    # One modality per image: that of its first answer, which the reversal lets win.
    found = {example.image: answers[example.id].modality for example in reversed(examples)}
    labels = {example.image: example.modality for example in examples if example.modality}
    return Evaluation(
        **vars(_scores(pairs)),
        by_source={
            source: _scores(group) for source, group in _grouped(pairs, lambda one: one.source)
        },
        by_modality={
            modality: _score(group)
            for modality, group in _grouped(pairs, lambda one: one.modality or UNKNOWN)
        },
        router=_modality_accuracy(
            ((label, found[image]) for image, label in labels.items()), expert_names
        ),
        reliability=_reliability(scored),
        unsure=selective([one.unsure for one in scored], [one.correct for one in scored]),
        cut_off=sum(not prediction.complete for prediction in scored),
        predictions=tuple(scored),
    )


def sample_examples(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """At most `limit` of the questions, drawn by `seed`, in their order; all without a limit.

    Raises `InputError` for a limit of none.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit}.", "Ask one question at least.")
    if limit is None or limit >= len(examples):
        return list(examples)
    kept = random.Random(seed).sample(range(len(examples)), limit)
    return [examples[index] for index in sorted(kept)]


def check_examples(examples: Sequence[Example]) -> None:
    """Raise `DataError` for no examples, or an id used twice."""
    if not examples:
        raise DataError("There are no questions to evaluate.", "Give at least one.")
    if len({example.id for example in examples}) < len(examples):
        raise DataError("Two questions share an id.", "Give every question an id of its own.")


def evaluate_labels(
    engine: Engine, images: Sequence[LabelledImage], *, progress: Counting = no_counting
) -> ModalityAccuracy:
    """Compare the modality that the engine finds with the label of every image."""
    if not images:
        raise DataError("There are no labelled images to evaluate.", "Give at least one.")
    pairs = []
    for done, image in enumerate(images, start=1):
        pairs.append((image.modality, engine.modality(image.image)))
        progress(done, len(images))
    return _modality_accuracy(pairs, engine.expert_names)


def save_predictions(predictions: Iterable[Prediction], file: Path) -> None:
    """Write one JSON object a line; an existing file is replaced only when all is written."""
    lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions)
    with writing(file), atomic_file(file) as stream:
        stream.writelines(line.encode() for line in lines)


_Pairs = list[tuple[Example, Prediction]]


def _ask(
    engine: Engine, examples: Sequence[Example], max_new_tokens: int, progress: Counting
) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    groups = by_image(examples)
    for done, (image, group) in enumerate(groups.items(), start=1):
        questions = [example.question for example in group]
        replies = engine.ask_all(image, questions, max_new_tokens=max_new_tokens)
        answers |= {example.id: reply for example, reply in zip(group, replies, strict=True)}
        progress(done, len(groups))
    return answers


def _scored(example: Example, answer: Answer) -> Prediction:
    text, reference = answer.text, example.answer
    written = reference if example.answer_as_written is None else example.answer_as_written
    if example.answer_type == "CLOSED":
        score = float(closed_correct(text, reference))
        official = float(official_closed_correct(text, written))
    else:
        score, official = token_recall(text, reference), official_recall(text, written)
    return Prediction(
        id=example.id,
        question=example.question,
        prediction=text,
        correct=exact_match(text, reference),
        score=score,
        official_score=official,
        reference=reference,
        answer_type=example.answer_type,
        confidence=answer.confidence,
        modality=example.modality,
        modality_found=answer.modality,
        complete=answer.complete,
        unsure=answer.unsure,
        refusals=dict(answer.refusals),
    )


def _scores(pairs: _Pairs) -> Scores:
    opened, closed = _of_type(pairs, "OPEN"), _of_type(pairs, "CLOSED")
    found = _score_if_any(opened)
    return Scores(
        overall=_score(pairs),
        open=found,
        closed=_score_if_any(closed),
        open_recall=found.accuracy if found else None,
        official_open_recall=_official(opened),
        official_closed_accuracy=_official(closed),
    )


def _official(pairs: _Pairs) -> float | None:
    scores = [prediction.official_score for _, prediction in pairs]
    return sum(scores) / len(scores) if scores else None


def _reliability(predictions: Iterable[Prediction]) -> Reliability | None:
    known = [(p.confidence, float(p.correct)) for p in predictions if p.confidence is not None]
    if not known:
        return None
    return reliability(*zip(*known, strict=True))


def _score(pairs: _Pairs) -> Score:
    owners = [owner_of(example) for example, _ in pairs]
    exact = [float(prediction.correct) for _, prediction in pairs]
    accuracy = [prediction.score for _, prediction in pairs]
    return Score(
        n=len(pairs),
        exact_match=sum(exact) / len(exact),
        exact_match_interval=bootstrap_interval(exact, owners, shares=True),
        accuracy=sum(accuracy) / len(accuracy),
        accuracy_interval=bootstrap_interval(accuracy, owners, shares=True),
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


@dataclass(frozen=True)
class GivenAnswer:
    """An answer as a file holds it; what the file does not tell is None."""

    id: str
    text: str
    confidence: float | None = None
    modality: str | None = None
    complete: bool = True
    unsure: bool = False
    refusals: Mapping[str, float] = field(default_factory=dict)


def score_predictions(
    predictions: Path, references: Path, *, choose: Choose | None = None
) -> Evaluation:
    """Score the answers of a file.

    Of an official list's conversation the first turn is scored, as the official scorer does. Where
    an id occurs several times, the answers have to stand in the references' order.

    Args:
        predictions: JSONL, in the official form or ours.
        references: The questions with their answers; the images are not opened.
        choose: Picks some of the questions; their answers are scored alone.

    Returns:
        The figures, the official scorer's among them.

    Raises:
        DataError: A file is missing or malformed, or the ids of the two do not match.
    """
    examples = read_examples(references, first_turn=True)
    given = read_predictions(predictions)
    # a repeated id as the references have it, without the `-2` that reading added
    listed = [example.listed_id or example.id for example in examples]
    names = [answer.id for answer in given]
    _check_same(Counter(listed), Counter(names), predictions, references)
    if names != listed:
        given = _reordered(given, listed, predictions)
    answers = {example.id: answer for example, answer in zip(examples, given, strict=True)}
    return score_answers(choose(examples) if choose else examples, answers)


def read_predictions(file: Path) -> list[GivenAnswer]:
    """Read a file of answers; raises `DataError` naming file and line."""
    answers = [_answer(record) for record in json_lines(read_text(file), file)]
    if not answers:
        raise DataError(f"{file} holds no answers.", "Give a file with at least one.")
    return answers


def _answer(record: Record) -> GivenAnswer:
    if "question_id" in record.value:
        return GivenAnswer(record.text("question_id"), record.text("text", empty=True))
    confidence = record.value.get("confidence")
    complete, unsure = (record.value.get(*each) for each in (("complete", True), ("unsure", False)))
    if confidence is not None and (
        isinstance(confidence, bool)
        or not isinstance(confidence, int | float)
        or not 0 <= confidence <= 1
    ):
        raise DataError(
            f"{record.where}: 'confidence' is no number from 0 to 1.",
            "Correct it, or leave it out.",
        )
    if not isinstance(complete, bool) or not isinstance(unsure, bool):
        name = "unsure" if isinstance(complete, bool) else "complete"
        raise DataError(f"{record.where}: {name!r} is not true or false.", "Correct it.")
    return GivenAnswer(
        record.text("id"),
        record.text("prediction", empty=True),
        None if confidence is None else float(confidence),
        record.optional("modality_found"),
        complete,
        unsure,
    )


def _check_same(
    wanted: Counter[str], given: Counter[str], predictions: Path, references: Path
) -> None:
    missing, unknown = wanted - given, given - wanted
    if not missing and not unknown:
        return
    told = [
        f"{len(some):,} {what} (such as {next(iter(some))!r})"
        for some, what in ((missing, "are not answered"), (unknown, "are not asked"))
        if some
    ]
    raise DataError(
        f"The ids of {predictions} and {references} do not match: of {wanted.total():,} questions "
        f"and {given.total():,} answers, {', '.join(told)}.",
        "Give the references that these answers were made for, or answer the questions again.",
    )


def _reordered(
    given: Sequence[GivenAnswer], listed: Sequence[str], predictions: Path
) -> list[GivenAnswer]:
    by_id = {answer.id: answer for answer in given}
    if len(by_id) < len(given):
        raise DataError(
            f"{predictions} uses ids several times, and is not in the references' order.",
            "Bring its lines into that order: an id alone does not say which question is meant.",
        )
    return [by_id[identity] for identity in listed]
