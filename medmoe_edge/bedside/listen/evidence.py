"""What a result takes over from the object that it is about: whose it is, and what it refers to.

The UIDs of results follow from what they are about and what they say: made again, a result is the
same object; with another answer, model or setting it is another. UIDs made here can be told from
all others (`is_ours`): they are UUIDs of version 8 (RFC 9562) that begin with the same four bytes.

An answer to a question that asks for a configured finding is coded too, as `Coded`: whether it is
there (PS3.16, CID 240), and how certain that is.
"""

import dataclasses
import datetime
import hashlib
import json
import re
import uuid
from collections.abc import Iterable
from typing import Self

from pydicom import DataElement, Dataset

from medmoe_edge._version import __version__
from medmoe_edge.bedside.listen.config import Certainty, Code, Finding
from medmoe_edge.bedside.listen.header import (
    SHARED,
    UIDS,
    element_of,
    is_allowed,
    issuer_of,
    modality_of,
    notices_of,
    patient_of,
    shared_of,
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
DATE = re.compile(r"\d{8}")
OFFSET = re.compile(r"Z|[+-](0\d|1[0-3]):?[0-5]\d|[+-]14:?00")  # those that FHIR knows
ISSUER = "IssuerOfPatientIDQualifiersSequence"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The header of an object that was answered, as far as results need it.

    Attributes:
        header: For the makers of documents, which take only what the standard allows: all else is
            empty there.
        values: By keyword, what results take over, as the object has it.
        frame: Of several frames the one that was answered, from 1.
        of_frames: How many it has.
        asked: All its frames that were asked, from 1, where they are several.
        sha256: Of the object's file.
        key: By which the node knows the object, and this version of it.
        notices: What a reader of the results should know of the object.
        taken: When the image was taken, by `taken_at`.
        number: Its Instance Number, as it has it.
        modality: Its modality, in capitals.
    """

    header: Dataset
    values: dict[str, str]
    frame: int | None
    sha256: str
    key: str
    notices: tuple[Notice, ...] = ()
    taken: str = ""
    number: str = ""
    modality: str = ""
    of_frames: int = 1
    asked: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        image: Image,
        sha256: str,
        key: str | None = None,
        index: int | None = None,
    ) -> Self:
        """From a whole dataset, and the frame of it that was read, from 0: else the middle one."""
        middle = (image.frames - 1) // 2
        frame = 1 + (middle if index is None else index) if image.frames > 1 else None
        values = shared_of(dataset)
        header = _header(dataset, values)
        header.Rows, header.Columns = image.pixels.shape[:2]
        key = key or key_of(header.SOPInstanceUID)
        return cls(
            header,
            values,
            frame,
            sha256,
            key,
            notices_of(dataset),
            taken_at(dataset),
            text_of(dataset, "InstanceNumber").value,
            modality_of(dataset),
            image.frames,
        )

    @property
    def uid(self) -> str:
        """The SOP Instance UID."""
        return str(self.header.SOPInstanceUID)

    @property
    def frames(self) -> list[int] | None:
        """For references to the object."""
        if self.asked:
            return list(self.asked)
        return None if self.frame is None else [self.frame]

    @property
    def place(self) -> str:
        """The object and the frame, by which its answers are told apart."""
        return f"{self.key} {self.frame or ''}"

    @property
    def is_whole(self) -> bool:
        """Whether all its frames were asked."""
        return len(self.frames or [0]) == self.of_frames

    def take_over(self, document: Dataset) -> None:
        """Give a document the patient and study of the object, as the object has them."""
        for keyword in SHARED:
            if self.values[keyword] or keyword in document:
                document.add(element_of(keyword, self.values[keyword]))
        if ISSUER in self.header:
            document[ISSUER] = self.header[ISSUER]


def taken_at(dataset: Dataset) -> str:
    """When the image was taken, as FHIR writes it (ISO 8601); empty where it does not say.

    Without the object's own offset from UTC only the date: FHIR knows no time without a zone.
    """
    moment = text_of(dataset, "AcquisitionDateTime").value
    for kind in ("Acquisition", "Content", "Series", "Study"):
        if DATE.match(moment):
            break
        date, time = (text_of(dataset, f"{kind}{part}").value for part in ("Date", "Time"))
        moment = date + time if DATE.fullmatch(date) else ""
    zone = moment[-5:] if re.search(r"[+-]\d{4}$", moment) else ""
    zone = zone or text_of(dataset, "TimezoneOffsetFromUTC").value
    try:
        day = datetime.datetime.strptime(moment[:8], "%Y%m%d").date()
    except ValueError:
        return ""
    try:
        offset = datetime.datetime.strptime(zone if OFFSET.fullmatch(zone) else "", "%z").tzinfo
        time_of_day = datetime.datetime.strptime(moment[8:14], "%H%M%S").time()
    except ValueError:
        return day.isoformat()
    return datetime.datetime.combine(day, time_of_day, offset).isoformat()


def together(asked: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """Each object once, with all its frames that were asked."""
    objects: dict[str, list[Evidence]] = {}
    for each in asked:
        objects.setdefault(each.key, []).append(each)
    return tuple(
        each[0]
        if len(each) == 1
        else dataclasses.replace(each[0], asked=tuple(one.frame or 1 for one in each))
        for each in objects.values()
    )


PRESENT = Code("52101004", "SCT", "Present")
ABSENT = Code("272519000", "SCT", "Absent")
UNDETERMINED = Code("373068000", "SCT", "Undetermined")
SCHEME = "99MEDMOE"  # of codes of our own
CONFIDENCE = {  # by the answer's `confidence_kind`
    "raw": Code("probability", SCHEME, "Model's own probability of its answer"),
    "calibrated": Code("chance", SCHEME, "Calibrated chance that the answer is right"),
}
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")
PROBABLY_PRESENT = Code("410592001", "SCT", "Probably present")
PROBABLY_ABSENT = Code("410593006", "SCT", "Probably not present")
POSSIBLE = Code("410590009", "SCT", "Known possible")
YES_OR_NO = re.compile(r"\s*(yes|no)\s*\.?\s*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Coded:
    """A finding, whether it is there, and how certain that is; None where it is undetermined."""

    finding: Finding
    presence: Code
    certainty: Code | None


def coded(
    finding: Finding, answer: Answer, certainty: Certainty, *, agreed: bool, is_whole: bool
) -> Coded:
    """What an answer says of a finding, in codes.

    Only a complete answer that is "yes" or "no" and nothing more but a full stop, and of which the
    model is not unsure, says whether it is there: what follows may take it back. A finding in one
    slice of many is there, whatever most slices say: where they have not `agreed` it is
    undetermined, and it is absent only where the whole series was asked.
    """
    match = YES_OR_NO.fullmatch(answer.text)
    is_clear = answer.complete and agreed and not answer.unsure
    if match is None or not is_clear or answer.confidence < certainty.possible:
        return Coded(finding, UNDETERMINED, None)
    is_there = match[1].lower() == "yes"
    if not is_there and not is_whole:
        return Coded(finding, UNDETERMINED, None)
    probable = PROBABLY_PRESENT if is_there else PROBABLY_ABSENT
    grade = probable if answer.confidence >= certainty.probable else POSSIBLE
    return Coded(finding, PRESENT if is_there else ABSENT, grade)


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
        coded: What the answer says in codes, where the question asks for a configured finding.
    """

    evidence: Evidence
    answer: Answer
    when: str
    pictures: tuple[Dataset, ...] = ()
    others: tuple[Evidence, ...] = ()
    of: int = 1
    settings: str = ""
    repeat: int = 0
    coded: Coded | None = None

    @property
    def sources(self) -> tuple[Evidence, ...]:
        """All objects that were asked."""
        return self.others or (self.evidence,)

    @property
    def confidence(self) -> Code:
        """What the number of the answer's confidence is."""
        return CONFIDENCE[self.answer.confidence_kind]

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
            *([answer.confidence_kind] if answer.confidence_kind != "raw" else ()),
        ]
        about = [(each.key, each.sha256, *each.asked) for each in self.sources]
        whole = [about, self.of, said, answer.model, __version__, self.settings, self.repeat]
        if self.coded is not None:
            found = self.coded
            whole += [found.finding.model_dump(), found.presence, found.certainty]
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
    for keyword in SHARED:
        setattr(header, keyword, values[keyword] if is_allowed(keyword, values[keyword]) else "")
    if (issuer := issuer_of(dataset)) is not None:
        item = Dataset()
        for keyword in ("UniversalEntityID", "UniversalEntityIDType"):
            item.add(element_of(keyword, text_of(issuer, keyword).value))
        header.add(DataElement(ISSUER, "SQ", [item]))
    return header
