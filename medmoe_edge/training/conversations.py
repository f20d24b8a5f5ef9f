"""Training text: one image with all the questions asked about it.

Captions and instructions are built from labels, since the images carry no free text.
"""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.data.captions import NAMES
from medmoe_edge.data.datasets import Example, LabelledImage


@dataclass(frozen=True)
class Conversation:
    """An image, its modality where known, and `(question, answer)` turns.

    No turn sees another.
    """

    image: Path
    modality: str | None
    turns: tuple[tuple[str, str], ...]
    source: str


def from_examples(examples: Iterable[Example]) -> list[Conversation]:
    """Group questions by image, in order of first appearance."""
    grouped: dict[Path, list[Example]] = defaultdict(list)
    for example in examples:
        grouped[example.image].append(example)
    return [
        Conversation(
            image,
            turns[0].modality,
            tuple((turn.question, tidy_answer(turn.answer)) for turn in turns),
            turns[0].source,
        )
        for image, turns in grouped.items()
    ]


def instructions(labelled: Iterable[LabelledImage]) -> list[Conversation]:
    """Classification posed as questions, in the wording of the VQA sets."""
    return [
        Conversation(
            image.image,
            image.modality,
            (
                ("What modality is used to take this image?", _spoken(image.modality)),
                (
                    "Which part of the body does this image belong to?",
                    tidy_answer(image.body),
                ),
                ("What is the finding in this image?", tidy_answer(image.finding)),
            ),
            image.source,
        )
        for image in labelled
    ]


def captions(labelled: Iterable[LabelledImage], examples: Iterable[Example]) -> list[Conversation]:
    """Image-caption pairs: what the image is and, where a label says so, what it shows."""
    pairs = [
        (item.image, item.modality, f"{item.body}: {item.finding}", item.source)
        for item in labelled
    ]
    pairs += [
        (item.image, item.modality, item.body.lower(), item.source)
        for item in {example.image: example for example in examples}.values()
        if item.modality and item.body
    ]
    return [
        Conversation(
            image,
            modality,
            (("Describe this image.", f"{_spoken(modality)} of the {what}"),),
            source,
        )
        for image, modality, what, source in pairs
    ]


def vary_question(question: str, order: random.Random) -> str:
    """Now and then as people type: without capitals, without the question mark."""
    if order.random() < 0.3:
        question = question.lower()
    shorter = question.rstrip("? ")
    return shorter if order.random() < 0.3 and shorter else question


def tidy_answer(answer: str) -> str:
    """One spelling per answer: single spaces, no full stop, a capital first letter."""
    text = " ".join(answer.split()).rstrip(".")
    return text[:1].upper() + text[1:]


def _spoken(modality: str) -> str:
    return NAMES.get(modality, modality)
