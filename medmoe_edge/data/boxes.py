"""Boxes that people drew around what is in an image, by its name."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medmoe_edge.data.datasets import Record
from medmoe_edge.errors import DataError

Box = tuple[float, float, float, float]  # x, y, width, height in pixels


@dataclass(frozen=True)
class Place:
    """A phrase and the boxes around what it names in an image."""

    image: Path
    phrase: str
    boxes: tuple[Box, ...]

    def holds(self, x: float, y: float) -> bool:
        """Whether the point (x, y) lies in one of the boxes."""
        return any(
            left <= x < left + width and top <= y < top + height
            for left, top, width, height in self.boxes
        )

    def mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        """True for the pixels `[H, W]` whose centre lies in a box."""
        rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
        mask = np.zeros((height, width), np.bool_)
        for x, y, wide, high in self.boxes:
            across = (x <= columns) & (columns < x + wide)
            mask |= ((y <= rows) & (rows < y + high))[:, None] & across
        return mask

    def within(self, left: float, top: float, scale: float) -> "Place":
        """The same in a part of the image that begins at (left, top) and is enlarged by `scale`."""
        boxes = (
            (scale * (x - left), scale * (y - top), scale * width, scale * height)
            for x, y, width, height in self.boxes
        )
        return replace(self, boxes=tuple(boxes))


def read_places(file: Path, images: Iterable[Path]) -> list[Place]:
    """The boxes drawn on `images`, by label in lower case; `file` names images from its folder.

    Raises `DataError` for a file of another form.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read.", "Give the boxes of SLAKE as JSON.") from error
    everything = Record(data, str(file)).value
    wanted = set(images)
    return [
        Place(file.parent / name, phrase, tuple(boxes))
        for name, drawn in everything.items()
        if file.parent / name in wanted
        for phrase, boxes in _grouped(drawn, f"{file}, {name!r}").items()
    ]


def _grouped(drawn: object, where: str) -> Mapping[str, list[Box]]:
    if not isinstance(drawn, list):
        raise DataError(f"{where} is no list of boxes.", "Check the file's structure.")
    grouped: dict[str, list[Box]] = {}
    for item in drawn:
        record = Record(item, where)
        grouped.setdefault(record.text("label").lower(), []).append(_box(record))
    return grouped


def _box(record: Record) -> Box:
    values = record["xywh"]
    if not (isinstance(values, list) and len(values) == 4 and all(_is_number(v) for v in values)):
        raise DataError(f"{record.where}: a box is not four numbers.", "Give x, y, width, height.")
    x, y, width, height = values
    return x, y, width, height


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
