"""Calibration data: which questions about which images a model is calibrated on.

A source is put into a fixed shuffled order once, and samples are drawn from it evenly over the
modalities. Images are decoded as they are drawn, once; those that cannot be are skipped and listed.

What an image's modality is says the list or the DICOM file, else the folder that it lies in, and
where neither does, the model's own router, when it is calibrated (`calibration.run`).
"""

import contextlib
import hashlib
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.config import VisionConfig
from medmoe_edge.data.datasets import (
    LABELS_FILE,
    AnswerType,
    Record,
    UniqueIds,
    answer_type,
    files_below,
    modality_name,
    parse_json,
    questions_of,
    read_examples,
    read_labels,
)
from medmoe_edge.data.folder import SUFFIXES, SUMMARY
from medmoe_edge.errors import (
    DataError,
    ImageError,
    InputError,
    MissingDependencyError,
    of_machine,
)
from medmoe_edge.image.loading import Decoded, dicom_origin, load_image
from medmoe_edge.image.pixels import (
    HEAD_BYTES,
    KINDS,
    Image,
    is_dicom,
    is_nifti,
    is_raster,
    shown_name,
)

LabelledBy = Literal["list", "dicom", "folder", "router"]

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
    """One question about one picture.

    Attributes:
        id: Its own in the whole source.
        image: The picture's file.
        question: As it is asked.
        answer: May be empty.
        modality: None where nobody told it.
        answer_type: Closed, with few possible answers, or open.
        frame: The picture is this one of several in the file, from 1.
        field: The picture is cut out of the file's: left, top, right and bottom, in pixels.
        labelled_by: Who told the modality, where it is known.
    """

    id: str
    image: Path
    question: str
    answer: str
    modality: str | None
    answer_type: AnswerType
    frame: int | None = None
    field: Field | None = None
    labelled_by: LabelledBy = "list"

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
    labelled_by: LabelledBy = "list",
) -> Iterator[Sample]:
    """The bedside questions about one picture, whose ids start with `name`."""
    for number, (question, kind) in enumerate(QUESTIONS, start=1):
        identity = f"{name}?{number}"
        yield Sample(identity, image, question, "", modality, kind, frame, field, labelled_by)


USUAL = ("xray", "ct", "mri", "ultrasound", "pathology", "fundus")  # modalities


def folder_samples(folder: Path, known: Collection[str] = ()) -> Iterator[Sample]:
    """The bedside questions about every picture in and below `folder`; no pixel is decoded.

    A picture is known by its suffix or its first bytes, so that a damaged one is not overlooked.
    Notes, hidden files and DICOM objects without an image are none. Links to folders are not
    followed. DICOM says its modality; that of other files is the innermost folder's whose name has
    one of `known` or the usual ones in it, such as `chest_xray`. Of a dataset folder, as
    `medmoe-edge data` makes it, the questions and labels to train on are taken instead. Raises
    `DataError` for a folder that cannot be read.
    """
    if (folder / SUMMARY).is_file():
        yield from _dataset_samples(folder)
        return
    for file in files_below(folder):
        head = _head(file)
        modality = None
        if is_dicom(head):
            is_image = True
            with contextlib.suppress(ImageError):  # whoever draws it will hear why
                is_image, modality, _ = dicom_origin(file)
            if not is_image:
                continue
        elif not (file.name.lower().endswith(SUFFIXES) or is_raster(head) or is_nifti(head)):
            continue
        inside = file.relative_to(folder)
        by: LabelledBy = "dicom"
        if modality is None:
            by, modality = "folder", modality_of_folders(inside.parts[:-1], known)
        name = printable(inside.as_posix())
        yield from ask_about(name, file, modality, labelled_by=by)


def modality_of_folders(folders: Sequence[str], known: Collection[str] = ()) -> str | None:
    """The modality that the innermost of some folders is named after; None where none is."""
    names = {*USUAL, *(name.lower() for name in known)}
    for folder in reversed(folders):
        words = [folder, *re.split(r"[\W_]+", folder), *re.findall(r"[A-Za-z]+-[A-Za-z]+", folder)]
        found = {modality_name(word) for word in words} & names
        if len(found) == 1:
            return found.pop()
    return None


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
            told = given.question, given.answer, given.modality, given.answer_type
            yield Sample(given.id, given.image, *told)
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
    several = isinstance(listed, list) and listed
    named = Record({"image": listed[0]}, record.where) if several else record
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
    except (OSError, ValueError) as error:  # ValueError: no UTF-8
        what = f"{shown_name(file)} cannot be read as a list of questions."
        other = DataError(what, "Give a JSONL file, or the folder that the images lie in.")
        raise (of_machine(shown_name(file), error) or other) from None


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(HEAD_BYTES)
    except OSError:
        return b""  # whoever draws it will hear why


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
    for number, (module, file, modality, frame, attribute) in enumerate(PICTURES, start=1):
        path = _folder(module) / file
        if not path.is_file():
            raise DataError(
                f"The package {PACKAGES[module][0]!r} lacks its file {file!r}.",
                "Install it again, or calibrate on images of your own.",
            )
        yield from ask_about(f"{number}-{file}", path, modality, frame=frame, field=attribute)


def _folder(module: str) -> Path:
    package, folder = PACKAGES[module]
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(package, "export")
    return Path(found.submodule_search_locations[0], folder)


__all__ = ["BUILTIN", "CalibrationData", "Sample", "Skipped", "read_calibration"]


BUILTIN = "builtin"
MAX_UNREADABLE = 0.05  # of the images decoded
FEW = 20  # images; of fewer, no share is taken unless there are no more


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, by its file's name alone, and the reason."""

    image: str
    reason: str


@dataclass
class CalibrationData:
    """A whole source.

    Attributes:
        name: Of the source, never a path.
        samples: In the order in which they are drawn: every picture's first question before any
            picture's second.
        sha256: Over ids, questions, answers, modalities and the names and sizes of the files,
            wherever they lie and whatever the seed.
        skipped: Grows as unreadable images are met.
        decoded: Keeps what is decoded, where the model is known.
    """

    name: str
    samples: tuple[Sample, ...]
    sha256: str
    skipped: list[Skipped] = field(default_factory=list)
    decoded: Decoded | None = None
    _readable: dict[object, bool] = field(default_factory=dict, repr=False)  # by picture

    def load(self, sample: Sample) -> Image:
        """A sample's picture; with `decoded`, as the model sees it, which reads files only once."""
        if self.decoded is None:
            return sample.load()
        return self.decoded.load(sample.picture, sample.load)

    def label(self, found: Mapping[object, str]) -> None:
        """Take what the router read, by picture, for the modality of samples that have none."""
        self.samples = tuple(
            replace(sample, modality=found[sample.picture], labelled_by="router")
            if sample.modality is None and sample.picture in found
            else sample
            for sample in self.samples
        )

    def unlabelled(self, count: int, progress: Progress = no_progress) -> list[Sample]:
        """The first `count` readable samples without a modality, one for each picture."""
        found: dict[object, Sample] = {}
        for sample in self.samples:
            if len(found) == count:
                break
            if sample.modality is not None or sample.picture in found:
                continue
            if self._is_readable(sample, missing=count - len(found)):
                found[sample.picture] = sample
                progress("decoding", len(found), count)
        return list(found.values())

    def draw(
        self,
        count: int,
        *,
        modalities: Collection[str] | None = None,
        exclude: Iterable[Sample] = (),
        progress: Progress = no_progress,
    ) -> list[Sample]:
        """The next `count` samples outside `exclude`, one of each modality in turn.

        A modality that is used up drops out; fewer are returned if there are no more. Samples
        without a modality take their turn last, and none where `modalities` are given.

        Raises `DataError` where more than 5% of the images cannot be read.
        """
        taken = {sample.id for sample in exclude}
        allowed = None if modalities is None else {name.lower() for name in modalities}
        strata: dict[str | None, deque[Sample]] = {}
        for sample in self.samples:
            if (allowed is None or sample.modality in allowed) and sample.id not in taken:
                strata.setdefault(sample.modality, deque()).append(sample)
        turns = deque(strata[key] for key in sorted(strata, key=lambda key: (key is None, key)))
        drawn: list[Sample] = []
        known = len(self.skipped)
        while turns and len(drawn) < count:
            stratum = turns.popleft()
            while stratum:
                sample = stratum.popleft()
                if self._is_readable(sample, missing=count - len(drawn)):
                    drawn.append(sample)
                    turns.append(stratum)
                    progress("decoding", len(drawn), count)
                    break
        self._check_readable(missing=0)
        if skipped := len(self.skipped) - known:
            logger.warning("Skipped images that cannot be read: %d.", skipped)
        return drawn

    def _is_readable(self, sample: Sample, missing: int) -> bool:
        if sample.picture not in self._readable:
            try:
                self.load(sample)
                self._readable[sample.picture] = True
            except ImageError as error:
                self._readable[sample.picture] = False
                self.skipped.append(Skipped(printable(sample.image.name), error.what))
                logger.info("Skipped: %s", error.what)  # names of files may be those of patients
                self._check_readable(missing)
        return self._readable[sample.picture]

    def _check_readable(self, missing: int) -> None:
        """Raise `DataError` if too many are unreadable, were all that is `missing` yet readable.

        The share is one of 20 images at least, or of all there are: before so many are decoded,
        one bad image says little. Where there are no more, all that may be drawn are tried first.
        """
        decoded, bad = len(self._readable), len(self.skipped)
        pictures = len({sample.picture for sample in self.samples})
        if missing and pictures <= FEW:
            return
        if bad > MAX_UNREADABLE * min(pictures, max(decoded + missing, FEW)):
            raise DataError(
                f"{bad} of {decoded} images of {self.name!r} cannot be read, more than "
                f"{MAX_UNREADABLE:.0%}: {self.skipped[0].reason}",
                "Remove or replace the images that cannot be read.",
            )


def read_calibration(
    source: str | Path,
    *,
    known_modalities: Sequence[str] = (),
    vision: VisionConfig | None = None,
    seed: int = 0,
) -> CalibrationData:
    """Read what a model is calibrated or verified on.

    Args:
        source: A folder of images, which get the questions of `QUESTIONS`; a JSONL file of
            questions; or the named set "builtin", which a `Path` never is.
        known_modalities: Of the model's experts.
        vision: The model's: each picture is then decoded once and kept as the model sees it.
        seed: Of the order, which depends on the ids (a folder's are paths within it) and this.

    Raises:
        InputError: There is no such source.
        DataError: It is empty or malformed, or names modalities, but none of `known_modalities`.
    """
    path = Path(source)
    if source == BUILTIN:
        name, samples = BUILTIN, list(builtin_samples())
    elif os.path.isdir(source):
        name, samples = path.resolve().name, list(folder_samples(path, known_modalities))
    elif os.path.isfile(source):
        name, samples = path.name, list(file_samples(path))
    else:
        raise InputError(
            f"There is no calibration data {str(source)!r}.",
            f"Give a folder of images, a JSONL file of questions, or a set's name: {BUILTIN}.",
        )
    if not samples:
        raise DataError(f"{name!r} holds no image.", f"Give images, such as {KINDS}.")
    _check_modalities(name, samples, known_modalities)
    decoded = None if vision is None else Decoded(vision)
    ordered, digest = _in_order(samples, seed), _fingerprint(samples)
    return CalibrationData(printable(name), ordered, digest, decoded=decoded)


def _check_modalities(name: str, samples: Iterable[Sample], known: Sequence[str]) -> None:
    labels = {sample.modality for sample in samples if sample.modality}
    if known and labels and labels.isdisjoint(name.lower() for name in known):
        raise DataError(
            f"{name!r} names modalities that the model does not know: "
            f"{', '.join(sorted(labels)[:5])}.",
            f"Use: {', '.join(known)}; or leave them out.",
        )


def _in_order(samples: Iterable[Sample], seed: int) -> tuple[Sample, ...]:
    def shuffled(sample: Sample) -> bytes:
        return hashlib.sha256(f"{seed} {sample.id}".encode()).digest()

    asked: Counter[object] = Counter()
    rounds: list[tuple[int, Sample]] = []
    for sample in sorted(samples, key=shuffled):
        rounds.append((asked[sample.picture], sample))
        asked[sample.picture] += 1
    return tuple(sample for _, sample in sorted(rounds, key=lambda turn: turn[0]))


def _fingerprint(samples: Collection[Sample]) -> str:
    sizes = {image: _size(image) for image in {sample.image for sample in samples}}
    lines = (
        (s.id, s.question, s.answer, s.modality, printable(s.image.name), sizes[s.image])
        for s in samples
    )
    return hashlib.sha256("\n".join(sorted(map(repr, lines))).encode()).hexdigest()


def _size(image: Path) -> int:
    try:
        return image.stat().st_size
    except (OSError, ValueError):  # absent; or no path at all
        return -1
