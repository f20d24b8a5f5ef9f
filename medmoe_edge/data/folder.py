"""A dataset folder: what `train`, `eval` and `calibrate` read, made of one or more sets.

    dataset.json                    which sets it holds
    train.jsonl val.jsonl test.jsonl    questions
    labels.jsonl                    what is known of images, each with its split
    images/SET/...                  the pictures of each set

A set is added to what is there already, or replaces itself. No picture and no patient is in two
splits: what is known to be held out for a test is not learned from.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmoe_edge.atomic import atomic_folder
from medmoe_edge.data.datasets import (
    LABELS_FILE,
    QUESTION_FILES,
    Split,
    UniqueIds,
    parse_json,
    read_text,
)
from medmoe_edge.errors import DataError, InputError

SUMMARY = "dataset.json"
_ORDER: tuple[Split, ...] = ("train", "val", "test")  # a later one wins over an earlier
_FILES = {split: QUESTION_FILES[split][0] for split in _ORDER}

Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What a folder holds after a set was added.

    Attributes:
        folder: Where it is.
        questions: Of the set, for each split that has any.
        labels: Labelled images of the set, for each split that has any.
        images: Pictures of the set.
        left_out: Questions of any set that were left out of a split, because their picture or
            patient is held out in another.
        modalities: How many labelled images of the set are of each modality.
    """

    folder: Path
    questions: Mapping[Split, int]
    labels: Mapping[Split, int]
    images: int
    left_out: int
    modalities: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return vars(self) | {"folder": str(self.folder)}


@dataclass
class Addition:
    """A set that is being added to a folder that nobody else sees yet."""

    name: str
    folder: Path
    questions: dict[Split, list[Row]] = field(
        default_factory=lambda: {split: [] for split in _ORDER}
    )
    labels: list[Row] = field(default_factory=list)
    copied: set[str] = field(default_factory=set)
    _unique: UniqueIds = field(default_factory=UniqueIds)

    def ask(self, split: Split, *, id: str, **row: str | None) -> None:
        """Add a question; what is None is left out."""
        self.questions[split].append({"id": self._unique(id)} | _known(row))

    def label(self, **row: str | None) -> None:
        """Add what is known of an image."""
        self.labels.append(_known(row))

    def write(self, name: str, content: bytes) -> str:
        """Write a picture of the set once; gives its path in the folder back."""
        path = self.folder / "images" / self.name / name
        if name not in self.copied:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.copied.add(name)
        return path.relative_to(self.folder).as_posix()


@contextlib.contextmanager
def adding(
    name: str, out: Path, *, force: bool = False, as_published: bool = False
) -> Iterator[tuple[Addition, list[Prepared]]]:
    """Add the set `name` to the dataset folder `out`, which is made or replaced as a whole.

    Yields the addition, and a list that holds the result once the block has ended well. With
    `as_published` the set's own splits stay as they are, also where they share pictures.

    Raises `InputError` for a set that is there already without `force`, and for a folder that is
    no dataset folder; `DataError` where nothing was added; `ResourceError` if the disk fails.
    """
    out = out.resolve()
    sets = _sets(out)
    if name in sets and not force:
        raise InputError(
            f"{out} holds the set {name!r} already.", "Add --force to replace it in there."
        )
    results: list[Prepared] = []
    with atomic_folder(out, force=True, marker=SUMMARY) as folder:
        kept = [row for row in _rows(out) if row.set != name] if sets else []
        for row in kept:
            _link(out / row.data["image"], folder / row.data["image"])
        addition = Addition(name, folder)
        yield addition, results
        rows = [*kept, *_added(addition)]
        if not any(row.set == name for row in rows):
            raise DataError("No question and no label was found.", "Check what was given.")
        published = {each for each, told in sets.items() if told.get("as_published")} - {name}
        rows, left_out = _apart(rows, folder, published | ({name} if as_published else set()))
        _write(folder, rows)
        summary = {
            each: _counts(rows, each) | {"as_published": each in published}
            for each in sorted({*sets, name})
        }
        summary[name]["as_published"] = as_published
        text = json.dumps({"sets": summary}, indent=1)
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
        mine = summary[name]
        results.append(
            Prepared(
                out, mine["questions"], mine["labels"], mine["images"], left_out, mine["modalities"]
            )
        )


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


@dataclass(frozen=True)
class _Row:
    """A line of one of the files; `split` is None for a label, whose line says it."""

    set: str
    split: Split | None
    data: Row

    @property
    def held(self) -> int:
        """The place of its split in `_ORDER`."""
        return _ORDER.index(self.split or self.data["split"])


def _known(row: Mapping[str, str | None]) -> Row:
    return {key: value for key, value in row.items() if value is not None}


def _sets(out: Path) -> dict[str, Any]:
    """The sets that a folder holds; none where it is no dataset folder."""
    file = out / SUMMARY
    if not file.is_file():
        return {}
    data = parse_json(read_text(file), str(file))
    sets = data.get("sets") if isinstance(data, dict) else None
    if not isinstance(sets, dict):
        raise DataError(f"{file} is of an earlier version.", "Choose another folder.")
    return sets


def _rows(folder: Path) -> Iterator[_Row]:
    names: dict[str, Split | None] = {name: split for split, name in _FILES.items()}
    for name, split in (names | {LABELS_FILE: None}).items():
        file = folder / name
        for line in read_text(file).split("\n") if file.exists() else ():
            if line.strip():
                data = parse_json(line, str(file))
                yield _Row(data["image"].split("/")[1], split, data)


def _added(addition: Addition) -> Iterator[_Row]:
    for split, questions in addition.questions.items():
        yield from (_Row(addition.name, split, data) for data in questions)
    yield from (_Row(addition.name, None, data) for data in addition.labels)


def _link(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)


def _apart(rows: list[_Row], folder: Path, published: Iterable[str]) -> tuple[list[_Row], int]:
    """The rows without those that a held-out split forbids, and how many questions went.

    A picture is known by its bytes, a patient by what the set calls them. Labels move to the split
    that holds their picture or patient; questions of another split are left out.
    """
    sums: dict[str, str] = {}
    for row in rows:
        image = row.data["image"]
        if image not in sums:
            sums[image] = hashlib.sha256((folder / image).read_bytes()).hexdigest()

    def keys(row: _Row) -> Iterator[Hashable]:
        yield sums[row.data["image"]]
        if row.data.get("patient") is not None:
            yield row.set, str(row.data["patient"])

    strongest: Counter[Hashable] = Counter()
    changed = True
    while changed:  # a patient ties pictures together, and a picture patients
        changed = False
        for row in rows:
            held = max(row.held, *(strongest[key] for key in keys(row)))
            for key in keys(row):
                if strongest[key] < held:
                    strongest[key], changed = held, True
    exempt = set(published)
    kept, left_out = [], 0
    for row in rows:
        held = strongest[next(keys(row))]
        if row.split is None:
            kept.append(_Row(row.set, None, row.data | {"split": _ORDER[held]}))
        elif row.held == held or row.set in exempt:
            kept.append(row)
        else:
            left_out += 1
    return kept, left_out


def _write(folder: Path, rows: Iterable[_Row]) -> None:
    """The question files and the labels; ids that two sets share are told apart."""
    unique = UniqueIds()
    lines: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        data = row.data
        if row.split is not None:
            data = data | {"id": unique(data["id"])}
        name = LABELS_FILE if row.split is None else _FILES[row.split]
        lines[name].append(json.dumps(data, ensure_ascii=False))
    for name, text in lines.items():
        (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")


def _counts(rows: Iterable[_Row], name: str) -> dict[str, Any]:
    mine = [row for row in rows if row.set == name]
    questions = Counter(row.split for row in mine if row.split)
    labels = [row.data for row in mine if row.split is None]
    return {
        "questions": {split: questions[split] for split in _ORDER if questions[split]},
        "labels": dict(Counter(data["split"] for data in labels)),
        "images": len({row.data["image"] for row in mine}),
        "modalities": dict(sorted(Counter(data["modality"] for data in labels).items())),
    }
