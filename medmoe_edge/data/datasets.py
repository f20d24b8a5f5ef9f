"""Questions about images, and images with labels, as read from files.

Two forms of question file are read: our JSONL, one object a line, and the JSON list of the
official Med-MoE code (LLaVA's `conversations`). Images are named, not opened, here. What the keys
of our own forms mean is said by the JSON schemas beside this module, which error messages quote.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from medmoe_edge.errors import DataError, of_machine

AnswerType = Literal["OPEN", "CLOSED"]
Split = Literal["train", "val", "test"]
ANSWER_TYPES: dict[str, AnswerType] = {"open": "OPEN", "close": "CLOSED", "closed": "CLOSED"}
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What people call a modality that the models know under another name.
_SAME = {"x-ray": "xray", "x ray": "xray", "radiograph": "xray", "mr": "mri", "us": "ultrasound"}
# The files of a dataset folder, in the order in which they are looked for.
QUESTION_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.jsonl", "vqa_train.jsonl", "train.json", "questions.jsonl"),
    "val": ("val.jsonl", "vqa_val.jsonl", "val.json"),
    "test": ("test.jsonl", "vqa_test.jsonl", "test.json"),
}
LABELS_FILE = "labels.jsonl"
FINDINGS_FILE = "findings.jsonl"
BOXES_FILES = ("boxes.json", "slake_boxes.json")
FormName = Literal["questions", "labels", "findings"]
NO_SCAN = "none"  # the modality of a picture that is no medical image
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One question about one image, with its reference answer (which may be empty).

    `answer_as_written` has the spaces around the answer, which the official scorer compares too;
    None where there are none. `listed_id` is the id of the file where reading made it unique.
    `patient` is what the data calls whose image it is; it never goes into a result.
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
    patient: str | None = None


def by_image(examples: Iterable[Example]) -> dict[Path, list[Example]]:
    """The questions about each image, both in order of first appearance."""
    groups: dict[Path, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.image].append(example)
    return dict(groups)


@dataclass(frozen=True)
class LabelledImage:
    """One image of known modality, body part and finding; `patient` never goes into a result."""

    image: Path
    modality: str
    body: str
    finding: str
    source: str
    split: Split
    patient: str | None = None


@dataclass(frozen=True)
class Finding:
    """One image, with the findings that its source says are present and absent in it.

    Names of findings are in lower case, and none is in two of the three tuples. `implied_absent`
    are those that the source does not mention though it would have looked for them, which is weaker
    than `absent`. A picture that is no medical image has the modality "none" (`NO_SCAN`), no
    findings, and says of what `kind` it is. `patient` never goes into a result.
    """

    image: Path
    modality: str
    body: str
    view: str | None
    present: tuple[str, ...]
    absent: tuple[str, ...]
    implied_absent: tuple[str, ...]
    patient: str | None
    split: Split
    kind: str | None
    source: str


Read = TypeVar("Read", Example, LabelledImage, Finding)


def owner_of(item: Example | LabelledImage | Finding) -> str:
    """Whose an image is, where that counts as one: the patient of its source, else itself."""
    return f"{item.source}: {item.patient}" if item.patient else str(item.image)


def questions_of(folder: Path, *splits: Split) -> Path | None:
    """A dataset folder's question file of the first of `splits` that has one."""
    names = (folder / name for split in splits for name in QUESTION_FILES[split])
    return next((file for file in names if file.is_file()), None)


def read_examples(
    file: Path, *, check_images: bool = False, first_turn: bool = False
) -> list[Example]:
    """Read our JSONL or the official code's JSON list, told apart by the first character.

    A line needs `image`, `question` and `answer`; the others may be left out: `id` is then the
    line's number, `source` the file's name, and `answer_type` CLOSED for yes and no. Image paths
    are relative to the file's folder. Of several images of one question the first is read, with a
    warning. In the official list ids may repeat and a conversation may have several turns: later
    ones get `-2`, `-3` ... added; `first_turn` leaves later turns out, as the official scorer does.
    Of a dataset folder, the questions to test on are read, or else those to validate on.

    Raises `DataError` naming file and line (or item) for a missing file, bad JSON, missing keys
    (all at once), an unknown answer type, an id used twice and, with `check_images`, an absent
    image.
    """
    if file.is_dir():
        file = _held_out(file)
    text = read_text(file)
    listed = text.lstrip().startswith("[")
    records = json_lines(text, file)
    if listed:
        items = enumerate(parse_json(text, str(file)), start=1)
        records = (Record(value, f"{file}, item {number}") for number, value in items)
    reader = _Reader(file, listed, first_turn)
    examples = [example for record in records for example in reader.read(record)]
    reader.warn()
    return _some(examples, "questions", file, check_images)


def _held_out(folder: Path) -> Path:
    found = questions_of(folder, "test", "val")
    if found is None:
        raise DataError(
            f"{folder} holds no {QUESTION_FILES['test'][0]} and no {QUESTION_FILES['val'][0]}.",
            f"Score its labels with --labels {folder / 'labels.jsonl'} alone; or give questions."
            if (folder / "labels.jsonl").exists()
            else "Give a file of questions, or make such a folder with: medmoe-edge data",
        )
    return found


def read_labels(file: Path, *, check_images: bool = False) -> list[LabelledImage]:
    """Read labelled images from JSONL; image paths are relative to the file's folder.

    A line needs `image` and `modality`. Raises `DataError` as `read_examples` does.
    """
    images = []
    for record in json_lines(read_text(file), file):
        record.require("image", "modality", form="labels")
        images.append(
            LabelledImage(
                image=file.parent / record.text("image"),
                modality=modality_name(record.text("modality")),
                body=record.optional("body") or "",
                finding=record.optional("finding") or "",
                source=record.optional("source") or file.stem,
                split=record.choice("split", SPLITS) if record.optional("split") else "train",
                patient=record.optional("patient"),
            )
        )
    return _some(images, "labelled images", file, check_images)


def read_findings(file: Path, *, check_images: bool = False) -> list[Finding]:
    """Read a file of findings (JSONL, `findings.schema.json`): the images of all its splits.

    What a panel of readers decided (`adjudicated`) is read as present or absent. Raises `DataError`
    as `read_examples` does, and where a finding is both present and absent.
    """
    images = [_finding(record, file) for record in json_lines(read_text(file), file)]
    return _some(images, "images with findings", file, check_images)


def modality_name(name: str) -> str:
    """A modality in the models' words: lower case, and one name for what has several."""
    lower = name.strip().lower()
    return _SAME.get(lower, lower)


@functools.cache
def schema(name: FormName) -> dict[str, Any]:
    """The JSON schema of one line of a file of questions, labels or findings."""
    text = files("medmoe_edge.data").joinpath(f"{name}.schema.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


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
    """A JSON object whose values are checked as they are taken; `where` is its file and line."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise DataError(f"{where} is not a JSON object.", "Check the file's structure.")
        self.value: Mapping[str, Any] = value
        self.where = where

    def __getitem__(self, key: str) -> Any:
        if key not in self.value:
            raise DataError(f"{self.where} lacks the key {key!r}.", "Add it.")
        return self.value[key]

    def require(self, *keys: str, form: FormName) -> None:
        """Raise `DataError` for all of `keys` that are absent, and say what each is for."""
        if not (missing := [key for key in keys if key not in self.value]):
            return
        known = schema(form)["properties"]
        advice = (f"{key}: {known[key]['description'].rstrip('.')}" for key in missing)
        raise DataError(
            f"{self.where} lacks the key{'s' * (len(missing) > 1)} "
            f"{', '.join(map(repr, missing))}.",
            f"Add {'; '.join(advice)}.",
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

    def texts(self, key: str) -> list[str]:
        """A list of non-empty strings; none where the key is absent or null."""
        values = self.value.get(key)
        if values is None:
            return []
        if not isinstance(values, list):
            raise DataError(f"{self.where}: {key!r} is not a list.", "Write it in brackets.")
        return [Record({key: value}, self.where).text(key) for value in values]

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
        other = DataError(f"{file} cannot be read.", "Give a readable file.")
        raise (of_machine(str(file), error) or other) from error


def files_below(folder: Path) -> Iterator[Path]:
    """The files in and below a folder in order, but for hidden ones; links are not followed.

    Raises `DataError` for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        name = Path(error.filename).name
        raise DataError(f"The folder {name!r} cannot be read.", "Check its permissions.") from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():  # reading a pipe might never end
                yield file


def safe_name(
    name: str, where: str, advice: str = "Use the official download; report this."
) -> str:
    """The relative path `name`, if it stays inside the folder it is joined to; else `DataError`."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or set(name) & set("\\:\0"):
        raise DataError(f"{where} names a file outside the dataset.", advice)
    return path.as_posix()


def set_name(text: str) -> str:
    """A name for a set that is also one for a folder."""
    return re.sub(r"[^\w-]+", "_", text).strip("_") or "mine"


def split_evenly(keys: Mapping[Hashable, Hashable]) -> dict[Hashable, Split]:
    """Of the groups of each stratum (group -> stratum) a tenth each to validate and to test on.

    The same groups give the same splits, in whatever order they come.
    """
    strata: dict[Hashable, list[Hashable]] = defaultdict(list)
    for group in sorted(keys, key=lambda group: hashlib.sha256(repr(group).encode()).digest()):
        strata[keys[group]].append(group)
    turns: dict[int, Split] = {4: "val", 9: "test"}
    return {
        group: turns.get(number % 10, "train")
        for groups in strata.values()
        for number, group in enumerate(groups)
    }


def json_lines(text: str, file: Path) -> Iterator[Record]:
    """The JSON objects of a file's text, one a line; raises `DataError` with file and line."""
    # Split at "\n" alone: JSON strings may hold other characters that str.splitlines() breaks at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield Record(parse_json(line, where), where)


# The official VQA-RAD list really has the misspelt key.
_CONVERSATIONS = ("conversations", "conversatons", "conversation")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


class _Reader:
    """Reads the records of one question file, in either form."""

    def __init__(self, file: Path, listed: bool, first_turn: bool) -> None:
        self.file, self.listed = file, listed
        self._turns = 1 if first_turn else None
        self._unique = UniqueIds()
        self._seen: set[str] = set()
        self._number = 0
        self._several = 0  # records with more than one image
        self._without = 0  # records with none

    def read(self, record: Record) -> Iterator[Example]:
        """The questions of one record."""
        self._number += 1
        key = next((key for key in _CONVERSATIONS if key in record.value), None)
        listed = self.listed or key is not None
        if key is not None and not ("image" in record.value or "images" in record.value):
            self._without += 1  # LLaVA's lists mix in turns about no image
            return
        if key is None:
            record.require("image", "question", "answer", form="questions")
            asked = record.text("question"), record.text("answer", empty=True)
            identity = self._id(record, repeatable=listed)
            yield self._example(record, identity, *asked, record.as_written("answer"))
            return
        for question, answer, written in itertools.islice(_turns(record, key), self._turns):
            identity = self._id(record, repeatable=True)
            yield self._example(record, identity, question, answer, written)

    def warn(self) -> None:
        """Say what was left out."""
        if self._several:
            logger.warning(
                "%s: %d entries have several images; the first of each is used.",
                self.file.name,
                self._several,
            )
        if self._without:
            logger.warning(
                "%s: %d entries have no image and are left out.", self.file.name, self._without
            )

    def _id(self, record: Record, *, repeatable: bool) -> str:
        identity = record.optional("id")
        if identity is None or repeatable:
            return self._unique(identity or str(self._number))
        if identity in self._seen:
            raise DataError(f"{record.where} repeats the id of an earlier line.", "Make it unique.")
        self._seen.add(identity)
        return self._unique(identity)

    def _example(
        self, record: Record, identity: str, question: str, answer: str, written: str | None
    ) -> Example:
        modality = record.optional("modality")
        return Example(
            id=identity,
            image=self.file.parent / self._image(record),
            question=question,
            answer=answer,
            answer_type=answer_type(record, answer),
            modality=modality_name(modality) if modality else None,
            body=record.optional("body"),
            content=record.optional("content"),
            source=record.optional("source") or self.file.stem,
            answer_as_written=written,
            listed_id=record.optional("id"),
            patient=record.optional("patient"),
        )

    def _image(self, record: Record) -> str:
        key = "image" if "image" in record.value else "images"
        listed = record.value[key]
        if not isinstance(listed, list):
            return record.text(key)
        if not listed:
            raise DataError(f"{record.where}: {key!r} is empty.", "Fill it in.")
        if len(listed) > 1:
            self._several += 1
        return Record({key: listed[0]}, record.where).text(key)


def answer_type(record: Record, answer: str) -> AnswerType:
    """What a record states; else yes and no are closed, as in LLaVA-Med."""
    if record.optional("answer_type"):
        return record.choice("answer_type", ANSWER_TYPES)
    return "CLOSED" if answer.strip().rstrip(".").lower() in ("yes", "no") else "OPEN"


def _turns(record: Record, key: str) -> Iterator[tuple[str, str, str | None]]:
    messages = record[key]
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise DataError(
            f"{record.where}: {key!r} is not pairs of question and answer.",
            'Let "human" and "gpt" take turns.',
        )
    for human, gpt in zip(messages[::2], messages[1::2], strict=True):
        asked, answered = Record(human, record.where), Record(gpt, record.where)
        if asked["from"] not in _ASKS or answered["from"] not in _ANSWERS:
            raise DataError(
                f"{record.where}: a turn is out of order.", 'Let "human" and "gpt" take turns.'
            )
        question = asked.text("value").replace("<image>", "").strip()
        if not question:
            raise DataError(f"{record.where}: a question is empty.", "Fill it in.")
        yield question, answered.text("value", empty=True), answered.as_written("value")


def _finding(record: Record, file: Path) -> Finding:
    record.require("image", "modality", form="findings")
    judged = record.value.get("adjudicated")
    judged = {} if judged is None else judged
    if not isinstance(judged, Mapping) or not all(isinstance(one, bool) for one in judged.values()):
        raise DataError(
            f"{record.where}: 'adjudicated' does not say true or false of findings.",
            'Write it as {"fracture": false}.',
        )
    decided = {name.strip().lower(): found for name, found in judged.items()}
    present, absent, implied = (
        dict.fromkeys(name.lower() for name in record.texts(key))
        for key in ("findings", "negatives", "implied_negatives")
    )
    present |= dict.fromkeys(name for name, found in decided.items() if found)
    absent |= dict.fromkeys(name for name, found in decided.items() if not found)
    if both := [name for name in present if name in absent or name in implied]:
        raise DataError(
            f"{record.where}: {both[0]!r} is both present and absent.", "Correct the line."
        )
    return Finding(
        image=file.parent / record.text("image"),
        modality=modality_name(record.text("modality")),
        body=record.optional("body") or "",
        view=record.optional("view"),
        present=tuple(present),
        absent=tuple(absent),
        implied_absent=tuple(name for name in implied if name not in absent),
        patient=record.optional("patient"),
        split=record.choice("split", SPLITS) if record.optional("split") else "train",
        kind=record.optional("kind"),
        source=record.optional("source") or file.stem,
    )


def _some(found: list[Read], what: str, file: Path, check_images: bool) -> list[Read]:
    """What was read; raises `DataError` for nothing and, if they are checked, an absent image."""
    if not found:
        raise DataError(f"{file} holds no {what}.", "Give a file with at least one.")
    if check_images:
        check_exist((each.image for each in found), file)
    return found


def check_exist(images: Iterable[Path], file: Path) -> None:
    """Raise `DataError`, which names the first, for images of `file` that are absent."""
    if absent := [image for image in dict.fromkeys(images) if not image.is_file()]:
        raise DataError(
            f"{file}: the image {absent[0]} does not exist ({len(absent)} are absent).",
            "Check the image paths and the folder they are relative to.",
        )
