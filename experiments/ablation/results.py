"""What an ablation found, on disk and as a table."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_edge.data.datasets import parse_json
from medmoe_edge.errors import DataError, ResourceError
from medmoe_edge.evaluation.evaluate import ModalityAccuracy, Score
from medmoe_edge.evaluation.metrics import bootstrap_interval
from medmoe_edge.render.console import show, show_table
from medmoe_edge.training.recipe import Recipe

Routing = dict[str, list[list[float]]]
"""By true modality, for each layer with experts, each expert's share of the image's tokens."""


@dataclass(frozen=True)
class Size:
    """Parameters: all, those of the language part, and of these what runs for one token.

    `bytes` is what the weights take as run here, in fp32.
    """

    total: int
    language: int
    activated: int
    bytes: int


@dataclass(frozen=True)
class Latency:
    """Median seconds in PyTorch on the CPU, fp32.

    `first_token`: vision tower and prefill of image and question; `token`: each further one.
    """

    first_token: float
    token: float


@dataclass(frozen=True)
class Result:
    """What one variant learned.

    `scores` are by `all`, `closed` and each source. `router` is by `questions` and `labels`, the
    images that it was read on; empty where no expert stands for a modality by name. `correct` says
    of each question, in order, whether the answer was exact; `settings` is what made all this.
    """

    variant: str
    settings: dict[str, Any]
    size: Size
    scores: dict[str, Score]
    router: dict[str, ModalityAccuracy]
    routing: Routing
    correct: list[bool]


@dataclass(frozen=True)
class Row:
    """A line of the table; `difference` is in exact match over all questions, to the first line.

    Both answered the same questions, of which whole images are resampled together: its 95%
    interval is narrower than those of the two figures.
    """

    description: str
    result: Result
    latency: Latency
    difference: float
    difference_interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the single questions."""
        values = asdict(self)
        result = values.pop("result")
        del result["correct"]
        return {**result, **values}


@dataclass(frozen=True)
class Ablation:
    """All variants in the order asked for, and the recipe that made them."""

    recipe: Recipe
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"recipe": self.recipe.to_json(), "variants": [row.to_json() for row in self.rows]}


def difference(
    result: Result, to: Result, images: Sequence[str]
) -> tuple[float, tuple[float, float]]:
    """Exact match of `result` less that of `to`, and its paired 95% interval."""
    differences = np.subtract(result.correct, to.correct, dtype=np.float64)
    return float(differences.mean()), bootstrap_interval(differences, images)


def table(ablation: Ablation) -> tuple[list[str], list[list[str]]]:
    """Column names and rows for people; ratios are to the first row."""
    first = ablation.rows[0]
    groups = [name for name in first.result.scores if name != "all"]
    columns = ["variant", "exact match", "95% interval", "difference", "its interval", *groups]
    columns += ["modality", "activated", "total", "weights", "first token", "next token"]
    return columns, [_cells(row, first, groups) for row in ablation.rows]


def confusion_table(found: ModalityAccuracy) -> tuple[list[str], list[list[str]]]:
    """Column names and rows: a row's images of one true modality, by the modality found."""
    names = sorted({name for row in found.confusion.values() for name in row})
    rows = [
        [true, *(str(row.get(name, 0)) for name in names)] for true, row in found.confusion.items()
    ]
    return ["", *names], rows


def caption(ablation: Ablation) -> str:
    """The training recipe in one line."""
    recipe, phase = ablation.recipe, ablation.recipe.moe
    return (
        f"{recipe.preset}, seed {recipe.seed}, phase 3: {phase.epochs} epochs, "
        f"{phase.batch_images} images a batch, learning rate {phase.learning_rate:g} "
        f"(decoder's matrices {phase.learning_rate * phase.matrix_rate:g}), dropout "
        f"{phase.dropout:g}, label smoothing {phase.label_smoothing:g}, {phase.labelled_share:.0%} "
        f"of the labelled images an epoch; learning: {', '.join(phase.train)}, or what a variant "
        "has in their place."
    )


def show_ablation(ablation: Ablation) -> None:
    """One row per variant, the recipe that trained all, and the routers' confusions.

    The table is cut where its columns change their subject, so that each part fits a terminal.
    """
    columns, rows = table(ablation)
    cuts = [1, columns.index("its interval") + 1, columns.index("activated"), len(columns)]
    for start, stop in itertools.pairwise(cuts):
        part = [[row[0], *row[start:stop]] for row in rows]
        show_table("", [columns[0], *columns[start:stop]], part)
        show()
    show(caption(ablation), "dim")
    for row in ablation.rows:
        for images, found in row.result.router.items():
            columns, confusions = confusion_table(found)
            show_table(f"{row.result.variant}: modality found, {images}", columns, confusions)


def read_result(file: Path, settings: Mapping[str, Any], questions: int) -> Result:
    """A variant's `result.json`; raises `DataError` unless `settings` made it on `questions`."""
    try:
        values = read_json(file)
        result = Result(
            variant=values["variant"],
            settings=values["settings"],
            size=Size(**values["size"]),
            scores={name: _score(score) for name, score in values["scores"].items()},
            router={name: ModalityAccuracy(**found) for name, found in values["router"].items()},
            routing=values["routing"],
            correct=[bool(value) for value in values["correct"]],
        )
        if result.settings != settings or len(result.correct) != questions:
            raise ValueError("it is of something else")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} is damaged or of another recipe, checkpoint or data.",
            "Delete it to evaluate the variant again.",
        ) from error
    return result


def read_json(file: Path) -> Any:
    """What a file of ours holds; raises `DataError`."""
    try:
        return parse_json(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read.", "Delete it, or use another folder.") from error


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Replace `file` when all is written; raises `ResourceError`."""
    partial = file.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise ResourceError(
            f"{file} cannot be written ({error.strerror}).",
            "Free some space and start again: the ablation goes on where it was.",
        ) from error


def _score(values: Mapping[str, Any]) -> Score:
    pairs = {name: tuple(values[name]) for name in ("exact_match_interval", "accuracy_interval")}
    return Score(**{**values, **pairs})


def _cells(row: Row, first: Row, groups: Sequence[str]) -> list[str]:
    result, size = row.result, row.result.size
    score, found = (
        result.scores["all"],
        result.router.get("labels") or result.router.get("questions"),
    )
    low, high = score.exact_match_interval
    below, above = row.difference_interval
    return [
        result.variant,
        f"{score.exact_match:.1%}",
        f"{low:.1%} to {high:.1%}",
        "" if row is first else f"{100 * row.difference:+.1f}",
        "" if row is first else f"{100 * below:+.1f} to {100 * above:+.1f}",
        *(f"{result.scores[name].exact_match:.1%}" for name in groups),
        "" if found is None or found.accuracy is None else f"{found.accuracy:.1%}",
        f"{size.activated / 1e6:.2f} M",
        f"{size.language / 1e6:.2f} M",
        f"{size.bytes / 1e6:.1f} MB",
        _timed(row.latency.first_token, first.latency.first_token),
        _timed(row.latency.token, first.latency.token),
    ]


def _timed(seconds: float, first: float) -> str:
    return f"{1000 * seconds:.1f} ms ({seconds / first:.2f}x)"
