"""What a batch is about: images of a folder or a CSV file, and the questions asked of each.

A folder gives all its files, also those in folders within, in the order of their paths; hidden ones
are left out. A CSV file gives its rows in their order: the column `image` holds paths, relative to
the CSV's folder, and the column `question`, where there is one, what is asked of that row's image.
Nothing is opened here: a file that is no image is found out when it is asked about.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from medmoe_edge.data.datasets import read_text
from medmoe_edge.errors import DataError, InputError
from medmoe_edge.prompt import check_question

COLUMNS = "Let its first line be: image, or image,question"


class Item(NamedTuple):
    """An image, as it is named in the results and as it is opened, and what is asked of it."""

    image: str
    path: str
    questions: tuple[str, ...]


def read_items(
    inputs: Path, questions: Path | None, *, besides: Collection[Path] = ()
) -> list[Item]:
    """The images of a folder (but the files `besides`) or of a CSV file, with their questions.

    Where a CSV file has questions of its own there must be no `questions`, else there must.
    Raises `DataError` that names file and line, and `InputError` for what cannot be put together.
    """
    if inputs.is_dir():
        asked = _shared(questions, "images of a folder")
        left_out = {path.resolve() for path in (*besides, *([questions] if questions else []))}
        items = [Item(name, path, asked) for name, path in _files(inputs, left_out)]
    else:
        items = _from_csv(inputs, questions)
    if not items:
        raise InputError(f"{inputs} names no images.", "Give a folder of images, or a CSV file.")
    return items


def read_questions(file: Path) -> tuple[str, ...]:
    """The questions in a text file, one on a line; empty lines are left out.

    Raises `DataError` that names the line of an unusable one.
    """
    lines = enumerate(read_text(file).split("\n"), start=1)
    found = tuple(_checked(line, file, number) for number, line in lines if line.strip())
    if not found:
        raise DataError(f"{file} holds no questions.", "Write one on each line.")
    return found


def fingerprint(items: Sequence[Item], *more: object) -> str:
    """SHA-256 of a job, by which an interrupted one is known again."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for item in items:
        digest.update(json.dumps([item.image, item.questions]).encode())
    return digest.hexdigest()


def _shared(questions: Path | None, of_what: str) -> tuple[str, ...]:
    if questions is None:
        raise InputError(
            f"There are no questions for the {of_what}.",
            "Write them into a file, one on each line: --questions FILE",
        )
    return read_questions(questions)


def _files(folder: Path, left_out: Collection[Path]) -> Iterator[tuple[str, str]]:
    """Of each file its path below the folder, with `/`, and its whole path."""

    def refuse(error: OSError) -> None:  # its images would be missing, and nobody would know
        raise InputError(
            f"{folder} or a folder within cannot be read: {(error.strerror or 'unknown').lower()}.",
            "Check its permissions, or name the images in a CSV file.",
        ) from error

    root = folder.resolve()
    found = []
    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path not in left_out]
    for path in sorted(found):
        yield path.relative_to(root).as_posix(), str(path)


def _from_csv(file: Path, questions: Path | None) -> list[Item]:
    rows = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        columns = rows.fieldnames or ()
        if "image" not in columns:
            raise DataError(f"{file} has no column named image.", COLUMNS)
        has_questions = "question" in columns
        if has_questions and questions is not None:
            raise InputError(
                f"{file} has questions of its own, and --questions gives others.",
                "Leave --questions out, or the column.",
            )
        asked = () if has_questions else _shared(questions, f"images of {file}")
        return [_item(row, file, rows.line_num, asked) for row in rows]
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: this is no CSV.", COLUMNS) from error


def _item(row: dict[str, str | None], file: Path, line: int, asked: tuple[str, ...]) -> Item:
    image = row["image"]
    if not image:
        raise DataError(f"{file}, line {line}: there is no image.", "Fill it in.")
    questions = asked or (_checked(row["question"] or "", file, line),)
    return Item(image, str(file.parent.resolve() / image), questions)


def _checked(question: str, file: Path, line: int) -> str:
    try:
        return check_question(question)
    except InputError as error:
        raise DataError(f"{file}, line {line}: {error.what}", error.remedy) from error
