"""One engine at work on a batch: here, or in each process of a cluster."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from medmoe_edge.bedside.batch.inputs import Item
from medmoe_edge.bedside.batch.journal import Row
from medmoe_edge.embedded import EMBEDDED
from medmoe_edge.engine.answer import Answer
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.engine.loading import Device, RuntimeName
from medmoe_edge.errors import InputError, MedMoEError

Numbered = tuple[int, Item]


class Identity(NamedTuple):
    """Which model answers: `verification` is a bundle's proof, or "reference"."""

    name: str
    sha256: str
    verification: str


class Answering(Protocol):
    """What answers the questions of a batch, in whatever order."""

    def begin(self, questions: Iterable[str]) -> Identity:
        """Load the model; raises `InputError` for a question that it cannot be asked."""
        ...

    def answers(self, pending: Sequence[Numbered]) -> Iterator[tuple[int, list[Row]]]:
        """The results of each image, under its number."""
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to load the engine and how to ask it; the same in every process."""

    model: str = "nano"
    runtime: RuntimeName = "auto"
    device: Device = "auto"
    memory_budget: str | None = None
    max_new_tokens: int = 32

    def load(self) -> Engine:
        """The engine; the errors of `engine.load`."""
        return load(
            self.model, runtime=self.runtime, device=self.device, memory_budget=self.memory_budget
        )

    def elsewhere(self) -> "Recipe":
        """The same for a process that works in another folder."""
        if self.model in EMBEDDED or not Path(self.model).is_dir():
            return self
        return dataclasses.replace(self, model=os.path.abspath(self.model))


class Here:
    """Answers in this process."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def begin(self, questions: Iterable[str]) -> Identity:
        """Load the model; see `Answering`."""
        self._engine = self._recipe.load()
        return check(self._engine, questions, self._recipe.max_new_tokens)

    def answers(self, pending: Sequence[Numbered]) -> Iterator[tuple[int, list[Row]]]:
        """The results of each image, in order."""
        for number, item in pending:
            rows = answer(self._engine, item.path, item.questions, self._recipe.max_new_tokens)
            yield number, rows


def check(engine: Engine, questions: Iterable[str], max_new_tokens: int) -> Identity:
    """Which model it is; raises `InputError` for a question that would be too long of any image."""
    limit = engine.config.decoder.max_positions
    for question in questions:
        needed = engine.prompt_tokens(question) + max_new_tokens
        if needed > limit:
            raise InputError(
                f"A question of {len(question):,} characters needs {needed:,} positions with its "
                f"image and answer; the model has {limit:,}.",
                "Ask a shorter question or allow fewer new tokens.",
            )
    return Identity(engine.name, engine.sha256, engine.verification)


def answer(engine: Engine, path: str, questions: Sequence[str], max_new_tokens: int) -> list[Row]:
    """A row for each question; what is wrong with the image is told in all of them."""
    try:
        answers = engine.ask_all(path, questions, max_new_tokens=max_new_tokens)
    except MedMoEError as error:
        return [_row(engine, question, error=str(error)) for question in questions]
    return [_row(engine, each.question, each) for each in answers]


def _row(
    engine: Engine, question: str, found: Answer | None = None, error: str | None = None
) -> Row:
    return {
        "question": question,
        "answer": found and found.text,
        "confidence": found and found.confidence,
        "modality": found and found.modality,
        "experts": found and found.experts,
        "complete": found and found.complete,
        "warnings": found and [dataclasses.asdict(notice) for notice in found.warnings],
        "model": engine.name,
        "model_sha256": engine.sha256,
        "seconds": found and found.timings.total,
        "error": error,
    }
