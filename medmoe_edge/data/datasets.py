"""Questions about images, and images with labels, as read from files.

Two forms of question file are read: our JSONL, one object a line, and the JSON list of the
official Med-MoE code (LLaVA's `conversations`). Images are named, not opened, here.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import DataError

AnswerType = Literal["OPEN", "CLOSED"]

Split = Literal["train", "val", "test"]


ANSWER_TYPES: dict[str, AnswerType] = {"open": "OPEN", "close": "CLOSED", "closed": "CLOSED"}

_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}


T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One question about one image, with its reference answer (which may be empty).

    `answer_as_written` has the spaces around the answer, which the official scorer compares too;
    None where there are none. `listed_id` is the id of the file where reading made it unique.
    """

    id: str
    image: Path
    question: str
    answer: str
    answer_type: AnswerType
    modality: str | None
    body: str | None
    content: str | None
    source: str
    answer_as_written: str | None = None
    listed_id: str | None = None


@dataclass(frozen=True)
class LabelledImage:
    """One image of known modality, body part and finding."""

    image: Path
    modality: str
    body: str
    finding: str
    source: str
    split: Split


def read_examples(
    file: Path,
    *,
    image_root: Path | None = None,
    check_images: bool = False,
    first_turn: bool = False,
) -> list[Example]:
    """Read our JSONL or the official code's JSON list, told apart by the first character.

    Image paths are relative to `image_root`, by default the file's folder. A line without `id` gets
    its number as one, and without `source` the file's name. In the official list ids may repeat
    and a conversation may have several turns: later ones get `-2`, `-3` ... added; `first_turn`
    leaves them out, as the official scorer does.

    Raises `DataError` naming file and line (or item) for a missing file, bad JSON, missing keys
    (all at once), an unknown answer type, an id used twice and, with `check_images`, an
    absent image.
    """
    text = read_text(file)
    root = file.parent if image_root is None else image_root
    if text.lstrip().startswith("["):
        examples = list(_from_conversations(text, file, root, first_turn=first_turn))
    else:
        examples = list(_from_records(text, file, root))
    if not examples:
        raise DataError(f"{file} holds no questions.", "Give a file with at least one.")
    if check_images:
        _require_images([example.image for example in examples], file)
    return examples


def read_labels(file: Path, *, check_images: bool = False) -> list[LabelledImage]:
    """Read labelled images from JSONL; image paths are relative to the file's folder.

    Raises `DataError` as `read_examples` does.
    """
    images = [
        LabelledImage(
            image=file.parent / record.text("image"),
            modality=record.text("modality"),
            body=record.text("body"),
            finding=record.text("finding"),
            source=record.text("source"),
            split=record.choice("split", _SPLITS),
        )
        for record in _records(read_text(file), file)
    ]
    if not images:
        raise DataError(f"{file} holds no labelled images.", "Give a file with at least one.")
    if check_images:
        _require_images([image.image for image in images], file)
    return images


class UniqueIds:
    """Hands out each id once: a repeated one gets `-2`, `-3` ... added."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # every id given out, and the last number added to it

    def __call__(self, base: str) -> str:
        identity, number = base, self._last.get(base, 1)
        while identity in self._last:
            number += 1
            identity = f"{base}-{number}"
        self._last[base] = number
        self._last.setdefault(identity, 1)
        return identity


class Record:
    """A JSON object whose values are checked as they are taken.

    `where` is its file and line for messages, `number` the line alone.
    """

    def __init__(self, value: object, where: str, number: int = 0) -> None:
        if not isinstance(value, Mapping):
            raise DataError(f"{where} is not a JSON object.", "Check the file's structure.")
        self.value: Mapping[str, Any] = value
        self.where, self.number = where, number

    def __getitem__(self, key: str) -> Any:
        if key not in self.value:
            raise DataError(f"{self.where} lacks the key {key!r}.", "Add it.")
        return self.value[key]

    def require(self, *keys: str) -> None:
        """Raise `DataError` naming all keys that are missing."""
        missing = [key for key in keys if key not in self.value]
        if missing:
            named = f"key{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"
            raise DataError(
                f"{self.where} lacks the {named}.",
                f"Every entry needs: {', '.join(keys)}.",
            )

    def text(self, key: str, *, empty: bool = False) -> str:
        """A required string or number (ids and counts are written both ways), stripped."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{self.where}: {key!r} is not text.", "Write it as a string.")
        stripped = str(value).strip()
        if not stripped and not empty:
            raise DataError(f"{self.where}: {key!r} is empty.", "Fill it in.")
        if not stripped.isprintable() and any("\ud800" <= mark <= "\udfff" for mark in stripped):
            raise DataError(f"{self.where}: {key!r} is broken Unicode.", "Correct its characters.")
        return stripped

    def as_written(self, key: str) -> str | None:
        """A string that has spaces around it, with them; else None."""
        value = self.value.get(key)
        return value if isinstance(value, str) and value != value.strip() else None

    def optional(self, key: str) -> str | None:
        """A string, or None where the key is absent, null or empty."""
        return None if self.value.get(key) is None else self.text(key, empty=True) or None

    def choice(self, key: str, known: Mapping[str, T]) -> T:
        """What `known` says of a required string, whose case does not matter."""
        value = self.text(key).lower()
        if value not in known:
            raise DataError(f"{self.where}: unknown {key!r}.", f"Use one of: {', '.join(known)}.")
        return known[value]


def parse_json(text: str, where: str) -> Any:
    """Parsed JSON; bad or too deeply nested text raises `DataError` at `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON.", "Correct or download it again.") from error


def read_text(file: Path) -> str:
    """A UTF-8 file with any line ends and mark of order; raises `DataError` that names it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text.", "Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read.", "Give a readable file.") from error


def _records(text: str, file: Path) -> Iterator[Record]:
    # Split at "\n" alone: JSON strings may hold other characters that str.splitlines() breaks at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield Record(parse_json(line, where), where, number)


def _from_records(text: str, file: Path, root: Path) -> Iterator[Example]:
    seen: set[str] = set()
    for record in _records(text, file):
        record.require("image", "question", "answer", "answer_type")
        identity = record.optional("id") or str(record.number)
        if identity in seen:
            raise DataError(f"{record.where} repeats the id of an earlier line.", "Make it unique.")
        seen.add(identity)
        yield Example(
            id=identity,
            image=root / record.text("image"),
            question=record.text("question"),
            answer=record.text("answer", empty=True),
            answer_type=record.choice("answer_type", ANSWER_TYPES),
            modality=record.optional("modality"),
            body=record.optional("body"),
            content=record.optional("content"),
            source=record.optional("source") or file.stem,
            answer_as_written=record.as_written("answer"),
        )


def _from_conversations(
    text: str, file: Path, root: Path, *, first_turn: bool
) -> Iterator[Example]:
    unique = UniqueIds()
    for number, value in enumerate(parse_json(text, str(file)), start=1):
        record = Record(value, f"{file}, item {number}")
        record.require("id", "image", "answer_type")
        answer_type = record.choice("answer_type", ANSWER_TYPES)
        listed, turns = record.text("id"), _turns(record)
        for question, answer, written in itertools.islice(turns, 1 if first_turn else None):
            yield Example(
                id=unique(listed),
                image=root / record.text("image"),
                question=question,
                answer=answer,
                answer_type=answer_type,
                modality=None,
                body=None,
                content=None,
                source=file.stem,
                answer_as_written=written,
                listed_id=listed,
            )


def _turns(record: Record) -> Iterator[tuple[str, str, str | None]]:
    # The official VQA-RAD list really has the misspelt key.
    key = "conversatons" if "conversatons" in record.value else "conversations"
    messages = record[key]
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise DataError(
            f"{record.where}: {key!r} is not pairs of question and answer.",
            'Let "human" and "gpt" take turns.',
        )
    for human, gpt in zip(messages[::2], messages[1::2], strict=True):
        asked, answered = Record(human, record.where), Record(gpt, record.where)
        if asked["from"] != "human" or answered["from"] != "gpt":
            raise DataError(
                f"{record.where}: a turn is out of order.", 'Let "human" and "gpt" take turns.'
            )
        question = asked.text("value").replace("<image>", "").strip()
        if not question:
            raise DataError(f"{record.where}: a question is empty.", "Fill it in.")
        yield question, answered.text("value", empty=True), answered.as_written("value")


def _require_images(images: list[Path], file: Path) -> None:
    absent = [number for number, image in enumerate(images, start=1) if not image.is_file()]
    if absent:
        raise DataError(
            f"{file}: the image of entry {absent[0]} does not exist ({len(absent)} are absent).",
            "Check the image paths and the folder they are relative to.",
        )


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
