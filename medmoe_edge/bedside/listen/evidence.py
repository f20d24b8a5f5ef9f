"""What a result takes over from the object that it is about: whose it is, and what it refers to.

The UIDs of results follow from what they are about and what they say: made again, a result is the
same object; with another answer, model or setting it is another. UIDs made here can be told from
all others (`is_ours`): they are UUIDs of version 8 (RFC 9562) that begin with the same four bytes.
"""

import dataclasses
import hashlib
import json
import uuid
from typing import Self

from pydicom import Dataset

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.header import (
    SHARED,
    UIDS,
    element_of,
    is_allowed,
    notices_of,
    patient_of,
    taken_at,
    text_of,
    uid_of,
)
from medmoe_edge.bedside.listen.queue import key_of
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import Notice
from medmoe_edge.image.pixels import Image

# The root of all UIDs made here, itself made by chance once.
NAMESPACE = uuid.UUID("6e7f2a53-5f0c-4c58-9a2b-0d8c8d3c3d6e")
MARK = bytes.fromhex("6e7f2a53")  # the first bytes of them all
MAKER = "medmoe-edge"
CHARACTERS = "ISO_IR 192"  # UTF-8, PS3.3 C.12.1.1.2


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The header of an object that was answered, as far as results need it.

    Attributes:
        header: For the makers of documents, which take only what the standard allows: all else is
            empty there.
        values: By keyword, what results take over, as the object has it.
        frame: Of several frames the one that was answered, from 1.
        sha256: Of the object's file.
        key: By which the node knows the object, and this version of it.
        notices: What a reader of the results should know of the object.
        taken: When the image was taken, by `header.taken_at`.
        number: Its Instance Number, as it has it.
    """

    header: Dataset
    values: dict[str, str]
    frame: int | None
    sha256: str
    key: str
    notices: tuple[Notice, ...] = ()
    taken: str = ""
    number: str = ""

    @classmethod
    def of(cls, dataset: Dataset, image: Image, sha256: str, key: str | None = None) -> Self:
        """From a whole dataset, and the picture of it that was read (the middle one)."""
        frame = (image.frames - 1) // 2 + 1 if image.frames > 1 else None
        notices = notices_of(dataset)
        values = {keyword: text_of(dataset, keyword).value for keyword in SHARED}
        header = _header(dataset, values)
        header.Rows, header.Columns = image.pixels.shape[:2]
        key = key or key_of(header.SOPInstanceUID)
        number = text_of(dataset, "InstanceNumber").value
        return cls(header, values, frame, sha256, key, notices, taken_at(dataset), number)

    @property
    def uid(self) -> str:
        """The SOP Instance UID."""
        return str(self.header.SOPInstanceUID)

    @property
    def frames(self) -> list[int] | None:
        """For references to the object."""
        return None if self.frame is None else [self.frame]

    def take_over(self, document: Dataset) -> None:
        """Give a document the patient and study of the object, as the object has them."""
        for keyword, value in self.values.items():
            if value or keyword in document:
                document.add(element_of(keyword, value))


@dataclasses.dataclass(frozen=True)
class Result:
    """One question about one series, answered; `when` by ISO 8601, UTC.

    Attributes:
        evidence: The object that gave the answer; of several, the most confident.
        answer: What it, or a vote of all, says.
        when: It was answered.
        pictures: The Secondary Captures of what the model saw, if they were made, without pixels.
        others: All objects that were asked, where they are several.
        of: How many objects the series has.
        settings: The configuration's settings that an answer depends on.
        repeat: How many results about the same objects were replaced before it.
    """

    evidence: Evidence
    answer: Answer
    when: str
    pictures: tuple[Dataset, ...] = ()
    others: tuple[Evidence, ...] = ()
    of: int = 1
    settings: str = ""
    repeat: int = 0

    @property
    def sources(self) -> tuple[Evidence, ...]:
        """All objects that were asked."""
        return self.others or (self.evidence,)

    def uid(self, kind: str) -> str:
        """The SOP Instance UID of this result as a document of a kind.

        The same for the same objects, question, answer, model and settings, and for no others; and
        another where such a result was replaced, and maybe withdrawn, before.
        """
        answer = self.answer
        said = [
            *(answer.question, answer.text, answer.confidence, answer.complete, answer.modality),
            *([notice.code, notice.message] for notice in answer.warnings),
            *([answer.probabilities] if answer.probabilities else ()),
        ]
        about = [(each.key, each.sha256) for each in self.sources]
        whole = [about, self.of, said, answer.model, __version__, self.settings, self.repeat]
        return made_uid(json.dumps(whole, sort_keys=True, default=str), kind)

    def uuid(self, kind: str) -> str:
        """The UID as a UUID."""
        return str(uuid.UUID(int=int(self.uid(kind).removeprefix("2.25."))))

    def series_uid(self, kind: str) -> str:
        """The series of all results of a kind about a patient in the study."""
        return series_uid(self.evidence, kind)


def series_uid(evidence: Evidence, kind: str) -> str:
    """The series of what is made of a kind; a study that holds two patients has two."""
    study = str(evidence.header.StudyInstanceUID)
    return made_uid(study, *patient_of(evidence.values), "series", kind)


def made_uid(*parts: str) -> str:
    """A UID that stands for these words: a UUID of version 8 under 2.25 (PS3.5, B.2)."""
    words = "\0".join(parts).encode("utf-8", "surrogatepass")
    value = bytearray(MARK + hashlib.sha256(NAMESPACE.bytes + words).digest()[:12])
    value[6] = 0x80 | value[6] & 0x0F  # version and variant, RFC 9562
    value[8] = 0x80 | value[8] & 0x3F
    return f"2.25.{int.from_bytes(value)}"


def is_ours(uid: str) -> bool:
    """Whether `made_uid` made a UID."""
    root, _, number = uid.rpartition(".")
    if root != "2.25" or not number.isascii() or not number.isdigit() or len(number) > 39:
        return False
    value = int(number).to_bytes(17)[1:] if int(number) < 2**128 else b""
    return value.startswith(MARK) and value[6] >> 4 == 8 and value[8] >> 6 == 2


def device_uid(answer: Answer) -> str:
    """The UID of what answers: this model, run by this version."""
    return made_uid("device", answer.model["sha256"], __version__)


def _header(dataset: Dataset, values: dict[str, str]) -> Dataset:
    header = Dataset()
    header.SpecificCharacterSet = CHARACTERS
    for keyword in UIDS:
        header.add(element_of(keyword, uid_of(dataset, keyword)))
    if str(dataset.get("BurnedInAnnotation") or "").strip().upper() in ("YES", "NO"):
        header.BurnedInAnnotation = str(dataset.BurnedInAnnotation).strip().upper()
    for keyword, value in values.items():
        setattr(header, keyword, value if is_allowed(keyword, value) else "")
    return header
