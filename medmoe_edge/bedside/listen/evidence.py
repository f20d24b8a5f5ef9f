"""What a result takes over from the object that it is about: whose it is, and what it refers to.

Headers come from anyone, so that only values that the standard allows are taken over. The UIDs of
results follow from what they are about: made again, a result is the same object.
"""

import dataclasses
import uuid
import warnings
from typing import Any, Self

from pydicom import Dataset, config
from pydicom.uid import UID

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.files import key_of
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import Image

# The root of all UIDs made here, itself made by chance once.
NAMESPACE = uuid.UUID("6e7f2a53-5f0c-4c58-9a2b-0d8c8d3c3d6e")
UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
SHARED = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName"),
    *("Modality", "BodyPartExamined"),
)
CHARACTERS = "ISO_IR 192"  # UTF-8, PS3.3 C.12.1.1.2
SEXES = ("M", "F", "O")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The header of an object that was answered; `frame`, from 1, of several frames."""

    header: Dataset
    frame: int | None
    sha256: str

    @classmethod
    def of(cls, dataset: Dataset, image: Image, sha256: str) -> Self:
        """From a whole dataset, and the picture of it that was read (the middle one)."""
        frame = (image.frames - 1) // 2 + 1 if image.frames > 1 else None
        header = _header(dataset)
        header.Rows, header.Columns = image.pixels.shape[:2]
        return cls(header, frame, sha256)

    @property
    def uid(self) -> str:
        """The SOP Instance UID."""
        return str(self.header.SOPInstanceUID)

    @property
    def frames(self) -> list[int] | None:
        """For references to the object."""
        return None if self.frame is None else [self.frame]


@dataclasses.dataclass(frozen=True)
class Result:
    """One question about one object, answered; `when` by ISO 8601, UTC."""

    evidence: Evidence
    answer: Answer
    when: str

    def uid(self, kind: str) -> str:
        """The SOP Instance UID of this result as a document of a kind: always the same."""
        return made_uid(key_of(self.evidence.uid), self.answer.question, kind)

    def uuid(self, kind: str) -> str:
        """The same as a UUID."""
        return str(uuid.UUID(int=int(self.uid(kind).removeprefix("2.25."))))

    def series_uid(self, kind: str) -> str:
        """The series of all results of a kind in the study."""
        return made_uid(str(self.evidence.header.StudyInstanceUID), "series", kind)


def made_uid(*parts: str) -> str:
    """A UID that stands for these words: a UUID of version 5 under 2.25 (PS3.5, B.2)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, chr(0).join(parts)).int}"


def device_uid(answer: Answer) -> str:
    """The UID of what answers: this model, run by this version."""
    return made_uid("device", answer.model["sha256"], __version__)


def check_uids(dataset: Dataset) -> None:
    """Raise `ImageError` where what a result must refer to is missing or no UID."""
    for keyword in UIDS:
        value = dataset.get(keyword)
        if not isinstance(value, str) or not UID(value).is_valid:
            raise ImageError(f"The object has no valid {keyword}.", "Export it again.")


def _header(dataset: Dataset) -> Dataset:
    header = Dataset()
    header.SpecificCharacterSet = CHARACTERS
    for keyword in UIDS:
        setattr(header, keyword, str(dataset[keyword].value))
    for keyword in SHARED:
        setattr(header, keyword, _allowed(dataset, keyword))
    if header.PatientSex not in SEXES:
        header.PatientSex = ""
    return header


def _allowed(dataset: Dataset, keyword: str) -> Any:
    """A value as the standard allows it, or nothing."""
    try:
        value = str(dataset.get(keyword) or "").strip("\0 ")
        trial = Dataset()
        with config.strict_reading(), warnings.catch_warnings():
            warnings.simplefilter("error")
            setattr(trial, keyword, value)
            return str(trial[keyword].value or "") if _is_single(trial, keyword) else ""
    except Exception:  # pydicom raises nearly anything on damaged values
        return ""


def _is_single(dataset: Dataset, keyword: str) -> bool:
    return dataset[keyword].VM <= 1
