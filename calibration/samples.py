"""Calibration samples: questions about pictures from a folder, a file, or installed packages."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from medmoe_edge.data.datasets import (
    LABELS_FILE,
    AnswerType,
    Record,
    UniqueIds,
    answer_type,
    modality_name,
    parse_json,
    questions_of,
    read_examples,
    read_labels,
)
from medmoe_edge.data.folder import SUMMARY
from medmoe_edge.errors import DataError, ImageError, MissingDependencyError
from medmoe_edge.image.formats import HEAD_BYTES, is_dicom, is_nifti, is_raster
from medmoe_edge.image.loading import Image, decoding, load_image, shown_name

Field = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of a picture, in pixels."""

# In the words of SLAKE and VQA-RAD, which Med-MoE is trained on.
QUESTIONS: tuple[tuple[str, AnswerType], ...] = (
    ("What modality is used to take this image?", "OPEN"),
    ("What is the scanning plane of this image?", "OPEN"),
    ("Which part of the body does this image belong to?", "OPEN"),
    ("What is the main organ in the image?", "OPEN"),
    ("Are there abnormalities in this image?", "CLOSED"),
    ("Where is the abnormality in this image?", "OPEN"),
    ("What diseases are included in the picture?", "OPEN"),
    ("Is there a pleural effusion?", "CLOSED"),
    ("Is there a fracture?", "CLOSED"),
)


@dataclass(frozen=True)
class Sample:
    """One question about one picture; `answer` may be empty, `modality` unknown.

    The picture is a file's, or one `frame` of several, or a `field` cut out of it.
    """

    id: str
    image: Path
    question: str
    answer: str
    modality: str | None
    answer_type: AnswerType
    frame: int | None = None
    field: Field | None = None

    @property
    def picture(self) -> tuple[Path, int | None, Field | None]:
        """What it looks at: the same for all questions about one picture."""
        return self.image, self.frame, self.field

    @property
    def sha256(self) -> str:
        """The hash of its id, for what is written down: the id may name a patient."""
        return hashlib.sha256(self.id.encode()).hexdigest()

    def load(self) -> Image:
        """Decode its picture; the errors of `medmoe_edge.image.loading.load_image`."""
        image = load_image(self.image, frame=self.frame)
        if self.field is None:
            return image
        left, top, right, bottom = self.field
        return Image.from_array(image.pixels[top:bottom, left:right])


def ask_about(
    name: str,
    image: Path,
    modality: str | None,
    *,
    frame: int | None = None,
    field: Field | None = None,
) -> Iterator[Sample]:
    """The bedside questions about one picture, whose ids start with `name`."""
    for number, (question, kind) in enumerate(QUESTIONS, start=1):
        identity = f"{name}?{number}"
        yield Sample(identity, image, question, "", modality, kind, frame, field)


SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif"),
    *(".dcm", ".dicom", ".nii", ".nii.gz"),
)


def folder_samples(folder: Path) -> Iterator[Sample]:
    """The bedside questions about every picture in and below `folder`; no pixel is decoded.

    A picture is known by its suffix or its first bytes, so that a damaged one is not overlooked.
    Notes, hidden files and DICOM objects without an image are none. Links to folders are not
    followed. DICOM says its modality. Of a dataset folder, as `medmoe-edge data` makes it, the
    questions and labels to train on are taken instead. Raises `DataError` for a folder that cannot
    be read.
    """
    if (folder / SUMMARY).is_file():
        yield from _dataset_samples(folder)
        return
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


def _dataset_samples(folder: Path) -> Iterator[Sample]:
    """What a dataset folder asks in training, and the bedside questions about other images."""
    asked = set()
    if questions := questions_of(folder, "train"):
        for sample in file_samples(questions):
            asked.add(sample.image)
            yield sample
    if (folder / LABELS_FILE).is_file():
        for number, item in enumerate(read_labels(folder / LABELS_FILE), start=1):
            if item.split == "train" and item.image not in asked:
                yield from ask_about(f"label-{number}", item.image, item.modality)


def file_samples(file: Path) -> Iterator[Sample]:
    """The questions of a JSONL file, or of the official code's JSON list as `read_examples` does.

    A line of the JSONL needs only `image`, relative to the file's folder; without `question` it
    gets the bedside ones. `answer`, `answer_type`, `modality` and `id` are read where they are.
    Raises `DataError` naming file and line.
    """
    text = _text(file)
    if text.lstrip().startswith("[") or '"conversa' in text.partition("\n")[0]:
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
    listed = record["image"]  # of several images the first, as training takes them
    named = Record({"image": listed[0]}, record.where) if listed and isinstance(listed, list) else record
    image = root / named.text("image")
    modality = modality_name(record.optional("modality") or "") or None
    question = record.optional("question")
    if question is None:
        yield from ask_about(identity, image, modality)
        return
    answer = record.optional("answer") or ""
    yield Sample(identity, image, question, answer, modality, answer_type(record, answer))


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


# By the module that holds them: of which package, and in which of its folders.
PACKAGES = {
    "pydicom": ("pydicom", "data/test_files"),
    "data_store": ("pydicom-data", "data"),
    "skimage": ("scikit-image", "data"),
}

# Module, file, modality, frame and field: real pictures of patients, chosen by eye. Most lie there
# in several encodings, of which one is taken, and none that needs more than the base install to be
# decoded. Phantoms, test patterns and the 16 x 16 pixels of pydicom's DICOMDIR are left out.
# The slide is one picture: like a pathologist, we look at it field by field.
PICTURES: tuple[tuple[str, str, str, int | None, Field | None], ...] = (
    ("pydicom", "CT_small.dcm", "ct", None, None),  # spine
    ("pydicom", "J2K_pixelrep_mismatch.dcm", "ct", None, None),  # skull base
    ("data_store", "693_UNCR.dcm", "ct", None, None),  # brain
    ("data_store", "explicit_VR-UN.dcm", "ct", None, None),  # abdomen
    ("pydicom", "MR_small.dcm", "mri", None, None),  # shoulder
    ("data_store", "MR2_UNCI.dcm", "mri", None, None),  # shoulder
    ("data_store", "MR-SIEMENS-DICOM-WithOverlays.dcm", "mri", None, None),  # abdomen
    ("data_store", "emri_small.dcm", "mri", 0, None),  # head, three slices of ten
    ("data_store", "emri_small.dcm", "mri", 4, None),
    ("data_store", "emri_small.dcm", "mri", 9, None),
    ("data_store", "RG1_UNCI.dcm", "xray", None, None),  # chest
    ("data_store", "RG3_UNCI.dcm", "xray", None, None),  # lower leg
    ("skimage", "ihc.png", "pathology", None, (0, 0, 256, 256)),  # colon, immunohistochemistry
    ("skimage", "ihc.png", "pathology", None, (256, 0, 512, 256)),
    ("skimage", "ihc.png", "pathology", None, (0, 256, 256, 512)),
    ("skimage", "ihc.png", "pathology", None, (256, 256, 512, 512)),
)


def builtin_samples() -> Iterator[Sample]:
    """The bedside questions about every built-in picture; nothing is imported or downloaded.

    Raises `MissingDependencyError` where a package is not installed.
    """
    for number, (module, file, modality, frame, field) in enumerate(PICTURES, start=1):
        path = _folder(module) / file
        if not path.is_file():
            raise DataError(
                f"The package {PACKAGES[module][0]!r} lacks its file {file!r}.",
                "Install it again, or calibrate on images of your own.",
            )
        yield from ask_about(f"{number}-{file}", path, modality, frame=frame, field=field)


def _folder(module: str) -> Path:
    package, folder = PACKAGES[module]
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(package, "export")
    return Path(found.submodule_search_locations[0], folder)
