"""Calibration samples from files: a folder of pictures, or a list of questions."""

import os
from collections.abc import Iterator
from pathlib import Path

from medmoe_edge.calibration.samples import Sample, ask_about
from medmoe_edge.data.datasets import (
    ANSWER_TYPES,
    AnswerType,
    Record,
    UniqueIds,
    parse_json,
    read_examples,
)
from medmoe_edge.errors import DataError, ImageError
from medmoe_edge.image.formats import HEAD_BYTES, is_dicom, is_nifti, is_raster
from medmoe_edge.image.loading import decoding, shown_name

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif"),
    *(".dcm", ".dicom", ".nii", ".nii.gz"),
)


def folder_samples(folder: Path) -> Iterator[Sample]:
    """The bedside questions about every picture in and below `folder`; no pixel is decoded.

    A picture is known by its suffix or its first bytes, so that a damaged one is not overlooked.
    Notes, hidden files and DICOM objects without an image are none. Links to folders are not
    followed. DICOM says its modality. Raises `DataError` for a folder that cannot be read.
    """
    for file in _files(folder):
        head = _head(file)
        modality = None
        if is_dicom(head):
            kind, modality = _dicom_header(file)
            if kind and "Image" not in kind:  # a directory, a report, a plan, a segmentation ...
                continue
        elif not (file.name.lower().endswith(SUFFIXES) or is_raster(head) or is_nifti(head)):
            continue
        yield from ask_about(printable(file.relative_to(folder).as_posix()), file, modality)


def file_samples(file: Path) -> Iterator[Sample]:
    """The questions of a JSONL file, or of the official code's JSON list as `read_examples` does.

    A line of the JSONL needs only `image`, relative to the file's folder; without `question` it
    gets the bedside ones. `answer`, `answer_type`, `modality` and `id` are read where they are.
    Raises `DataError` naming file and line.
    """
    text = _text(file)
    if text.lstrip().startswith("["):
        for given in read_examples(file):
            yield Sample(
                given.id,
                given.image,
                given.question,
                given.answer,
                given.modality,
                given.answer_type,
            )
        return
    unique = UniqueIds()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        record = Record(parse_json(line, where), where)
        yield from _line_samples(record, unique(record.optional("id") or str(number)), file.parent)


def printable(name: str) -> str:
    """A file's name as valid Unicode; names on disk need not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def _line_samples(record: Record, identity: str, root: Path) -> Iterator[Sample]:
    image = root / record.text("image")
    modality = (record.optional("modality") or "").lower() or None
    question = record.optional("question")
    if question is None:
        yield from ask_about(identity, image, modality)
        return
    answer = record.optional("answer") or ""
    answer_type: AnswerType = "CLOSED" if answer.lower() in ("yes", "no") else "OPEN"
    if record.optional("answer_type"):
        answer_type = record.choice("answer_type", ANSWER_TYPES)
    yield Sample(identity, image, question, answer, modality, answer_type)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):  # ValueError: no UTF-8
        raise DataError(
            f"{shown_name(file)} cannot be read as a list of questions.",
            "Give a JSONL file, or the folder that the images lie in.",
        ) from None


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(
            f"The folder {shown_name(Path(error.filename))} cannot be read.",
            "Check its permissions.",
        ) from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = (name for name in folders if not name.startswith("."))
        for name in names:
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():  # reading a pipe might never end
                yield file


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(HEAD_BYTES)
    except OSError:
        return b""  # whoever draws it will hear why


def _dicom_header(file: Path) -> tuple[str | None, str | None]:
    """The kind of a DICOM object, as the standard calls its storage class, and its modality."""
    from medmoe_edge.image.dicom import read_kind

    try:
        with decoding(shown_name(file)):
            return read_kind(file)
    except ImageError:  # whoever draws it will hear why
        return None, None
