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
from medmoe_edge.image.loading import (
    SIGNATURES,
    TIFF_SIGNATURES,
    decoding,
    is_nifti,
    load_image,
    shown_name,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom", ".nii", ".nii.gz")
MODALITY = 0x0008_0060  # of DICOM's tags, which stand in ascending order


def folder_samples(folder: Path) -> Iterator[Sample]:
    """The bedside questions about every picture in and below `folder`; no pixel is decoded.

    A picture is known by its suffix or its first bytes, so that a damaged one is not overlooked.
    Notes, hidden files and DICOM objects without an image are none. Links to folders are not
    followed. DICOM says its modality. Raises `DataError` for a folder that cannot be read.
    """
    for file in _files(folder):
        head = _head(file)
        modality = None
        if _is_dicom(head):
            kind, modality = _dicom_header(file, head)
            if kind and "Image" not in kind:  # a directory, a report, a plan, a segmentation ...
                continue
        elif not (
            file.name.lower().endswith(SUFFIXES)
            or head.startswith((*SIGNATURES.values(), *TIFF_SIGNATURES))
            or is_nifti(head)
        ):
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
            return stream.read(348)
    except OSError:
        return b""  # whoever draws it will hear why


def _is_dicom(head: bytes) -> bool:
    # Old files lack the preamble, as `load_image` knows.
    return _has_preamble(head) or (head[:2] == b"\x08\0" and head[3:4] == b"\0")


def _has_preamble(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def _dicom_header(file: Path, head: bytes) -> tuple[str | None, str | None]:
    """The kind of a DICOM object, as the standard calls its storage class, and its modality."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_file_meta_info, read_partial
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    from medmoe_edge.image.dicom import MODALITIES

    try:
        with decoding(shown_name(file)):
            meta = read_file_meta_info(file) if _has_preamble(head) else FileMetaDataset()
            uid = meta.get("MediaStorageSOPClassUID")
            kind = uid.name if uid and uid.name != uid else None  # private classes have no name
            deflated = meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
            if not deflated:  # pydicom would inflate without a limit
                with file.open("rb") as stream:
                    header = read_partial(stream, lambda tag, *_: tag > MODALITY, force=True)
                return kind, MODALITIES.get(str(header.get("Modality")))
        return kind, load_image(file).modality
    except ImageError:  # whoever draws it will hear why
        return None, None
