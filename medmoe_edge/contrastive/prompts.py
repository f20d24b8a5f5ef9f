"""Labels with the prompts that stand for them, as a person writes them down."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe_edge.errors import DataError

MAX_BYTES = 2**20
EXAMPLE = 'Write: {"pneumonia": ["pneumonia", "consolidation of the lung"], "no finding": [...]}'

Prompts = dict[str, list[str]]


def read_prompts(path: Path) -> Prompts:
    """Label -> prompts, from a JSON file; raises `DataError` for anything else."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise DataError(f"{path} is larger than 1 MB.", "Give fewer prompts.")
        found = json.loads(text, object_pairs_hook=_once)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {(error.strerror or 'unknown reason').lower()}.",
            "Check the path and its permissions.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON file.", EXAMPLE) from error
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no labels.", EXAMPLE)
    for label, prompts in found.items():
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise DataError(f"{path}: the prompts of {label!r} are no list of texts.", EXAMPLE)
    return found


def parse_labels(given: str) -> list[str]:
    """The labels of a list with commas."""
    return [label.strip() for label in given.split(",") if label.strip()]


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DataError("The prompts name a label twice.", "Put all its prompts into one list.")
    return found
