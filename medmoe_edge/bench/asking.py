"""A bundle that is asked about images of several modalities, its experts paged or resident."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_edge.bench.backends import QUESTION
from medmoe_edge.bench.steering import (
    SteeredPagedRuntime,
    SteeredRuntime,
    steer,
    steered_bundle,
)
from medmoe_edge.bench.timing import seconds
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.data.datasets import Example, read_examples
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.errors import DataError
from medmoe_edge.image.loading import Image, load_image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort.paged import PagedOrtRuntime

NEW_TOKENS = 8
VARIANTS = 8  # questions of a modality


@dataclass(frozen=True)
class Asking:
    """What is asked: the questions of a file `data`, by their images' modality, or else noise.

    Noise has no modality, so tokens are steered to one expert for each: a share `follow` of them.
    With `drop_pages` no expert stays in the page cache, so that loads wait for storage.
    """

    data: str | None = None
    follow: float = 1.0
    drop_pages: bool = False

    def modalities(self, bundle: Bundle) -> int:
        """How many there are; raises `DataError` for a file that has not two."""
        if self.data is not None:
            return len(by_modality(Path(self.data)))
        assert bundle.config.moe is not None
        return bundle.config.moe.num_experts


def by_modality(file: Path) -> list[list[Example]]:
    """The first questions of each modality, in alphabetical order; images are looked for.

    Raises `DataError` for a file with fewer than two modalities.
    """
    groups: dict[str, list[Example]] = {}
    for example in read_examples(file, check_images=True):
        group = groups.setdefault(example.modality or "", [])
        if len(group) < VARIANTS and all(example.image != other.image for other in group):
            group.append(example)
    groups.pop("", None)
    if len(groups) < 2:
        raise DataError(
            f"{file} has images of fewer than two modalities.",
            "Give questions with a `modality`, of two at least.",
        )
    return [groups[name] for name in sorted(groups)]


class Asker:
    """An engine and what it is asked; `budget` in bytes, or None for all experts in memory.

    It has answered once when it is made.
    """

    def __init__(self, path: Path, budget: int | None, prefetch: bool, asking: Asking) -> None:
        self._groups: Sequence[Sequence[Example]] = (
            by_modality(Path(asking.data)) if asking.data is not None else ()
        )
        self.engine = (
            _engine(path, budget, prefetch, asking)
            if asking.data is not None
            else _steered_engine(path, budget, prefetch, asking)
        )
        self.ask(0, 0)  # sessions are opened by their first use

    def ask(self, modality: int, number: int) -> dict[str, Any]:
        """One answer, plain JSON values: `answer` and `confidence`, `seconds`, and its `paging`.

        `share` is that of the routed tokens which the expert with the most of them got.
        """
        runtime = self.engine.runtime
        if isinstance(runtime, SteeredRuntime):
            runtime.modality = modality
        image, question = self._question(modality, number)
        answers = []
        taken = seconds(
            lambda: answers.append(self.engine.ask(image, question, max_new_tokens=NEW_TOKENS))
        )
        (answer,) = answers
        return {
            "seconds": taken,
            "answer": answer.text,
            "confidence": answer.confidence,
            "share": max(answer.experts.values()),
            "paging": answer.paging,
        }

    def _question(self, modality: int, number: int) -> tuple[Image, str]:
        if self._groups:
            group = self._groups[modality]
            example = group[number % len(group)]
            return load_image(example.image), example.question
        side = self.engine.config.vision.image_size
        generator = np.random.default_rng((modality, number % VARIANTS))
        return Image.from_array(generator.integers(0, 256, (side, side), np.uint8)), QUESTION


def _engine(path: Path, budget: int | None, prefetch: bool, asking: Asking) -> Engine:
    if budget is None:
        return load(path)
    if prefetch:
        return load(path, memory_budget=budget, drop_pages=asking.drop_pages)
    bundle = Bundle.open(path)
    runtime = PagedOrtRuntime(bundle, budget, drop_pages=asking.drop_pages, prefetch=False)
    return _with(bundle, runtime)


def _steered_engine(path: Path, budget: int | None, prefetch: bool, asking: Asking) -> Engine:
    bundle = steered_bundle(Bundle.open(path), asking.follow)
    runtime = (
        SteeredRuntime(bundle)
        if budget is None
        else SteeredPagedRuntime(bundle, budget, drop_pages=asking.drop_pages, prefetch=prefetch)
    )
    steer(runtime, asking.follow)
    return _with(bundle, runtime)


def _with(bundle: Bundle, runtime: Runtime) -> Engine:
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    return Engine(runtime, tokenizer, bundle.name, bundle.sha256, bundle.proof)
