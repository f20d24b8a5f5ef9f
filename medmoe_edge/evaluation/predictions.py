"""Answers that lie in a file, scored against references: `eval --predictions --references`.

Two forms are read, one JSON object a line: that of the official Med-MoE code, with `question_id`
and `text`, and our own (`eval --predictions OUT`), with `id` and `prediction`. References are a
question file of either form (`data.datasets`). The official scorer pairs the two by their order and
never looks at an id; here ids have to match.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.data.datasets import Example, Record, parse_json, read_examples, read_text
from medmoe_edge.errors import DataError
from medmoe_edge.evaluation.evaluate import Evaluation, score_answers


@dataclass(frozen=True)
class GivenAnswer:
    """An answer as a file holds it; what the file does not tell is None."""

    id: str
    text: str
    confidence: float | None = None
    modality: str | None = None
    complete: bool = True


Choose = Callable[[Sequence[Example]], Sequence[Example]]
"""Picks the questions that are scored."""


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
    listed = _listed_ids(examples)
    names = [answer.id for answer in given]
    _check_same(Counter(listed), Counter(names), predictions, references)
    if names != listed:
        given = _reordered(given, listed, predictions)
    answers = {example.id: answer for example, answer in zip(examples, given, strict=True)}
    return score_answers(choose(examples) if choose else examples, answers)


def read_predictions(file: Path) -> list[GivenAnswer]:
    """Read a file of answers; raises `DataError` naming file and line."""
    answers = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            answers.append(_answer(Record(parse_json(line, where), where)))
    if not answers:
        raise DataError(f"{file} holds no answers.", "Give a file with at least one.")
    return answers


def _answer(record: Record) -> GivenAnswer:
    if "question_id" in record.value:
        return GivenAnswer(record.text("question_id"), record.text("text", empty=True))
    confidence, complete = record.value.get("confidence"), record.value.get("complete", True)
    if confidence is not None and (
        isinstance(confidence, bool)
        or not isinstance(confidence, int | float)
        or not 0 <= confidence <= 1
    ):
        raise DataError(
            f"{record.where}: 'confidence' is no number from 0 to 1.",
            "Correct it, or leave it out.",
        )
    if not isinstance(complete, bool):
        raise DataError(f"{record.where}: 'complete' is not true or false.", "Correct it.")
    return GivenAnswer(
        record.text("id"),
        record.text("prediction", empty=True),
        None if confidence is None else float(confidence),
        record.optional("modality_found"),
        complete,
    )


def _listed_ids(examples: Sequence[Example]) -> list[str]:
    """The ids as the references have them: a repeated one without the `-2` that reading added."""
    return [example.listed_id or example.id for example in examples]


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
