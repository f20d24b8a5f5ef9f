"""What a received object says of itself: whose it is, which it is, and its text as it was sent.

Devices break the letter of the standard: identifiers longer than their VR allows, UIDs with leading
zeros, dates of other forms, text in another character set than the declared one. All of it is taken
over as it is, so that a report lies beside its image, and is told of in `notices_of`; only what a
result cannot refer to is refused, by `check_uids`.
"""

import datetime
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydicom import DataElement, Dataset, config
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR

from medmoe_edge.errors import ImageError, Notice

UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
SHARED = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName"),
)
SEXES = ("M", "F", "O", "")
# Those of PS3.5 9.1, but for leading zeros and length, which real devices disregard.
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
LONGEST_UID = 128
DELIMITERS = {ord(mark) for mark in "\\^=\r\n\t\f"}  # end what escapes began, PS3.5 6.1.2.5.3
PADDING = "\0 "
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Origin(NamedTuple):
    """Of a received object, only to be compared: SHA-256 of what it is and whose.

    `uid` is of its SOP Instance UID, `content` of all its elements, `patient` of who it is about,
    `study` of its Study Instance UID.
    """

    uid: str
    content: str
    patient: str
    study: str


class Text(NamedTuple):
    """An element's text; `charset` tells how it was read where not by what the object declares."""

    value: str
    charset: str | None = None


def check_uids(dataset: Dataset) -> None:
    """Raise `ImageError` where what a result must refer to is missing or no UID."""
    for keyword in UIDS:
        value = uid_of(dataset, keyword)
        if not value:
            raise ImageError(f"The object has no {keyword}.", "Export it again.")
        if not UID.fullmatch(value) or len(value) > LONGEST_UID:
            raise ImageError(f"The object's {keyword} is no UID.", "Export it again.")


def uid_of(dataset: Dataset, keyword: str) -> str:
    """A UID as it was sent, without its padding; empty where there is none."""
    return text_of(dataset, keyword).value


def text_of(dataset: Dataset, keyword: str) -> Text:
    """An element's text as it was sent, all of it, in whatever form; empty where there is none.

    Bytes that are not in the declared character set are read as UTF-8 where they are that, else as
    ISO 8859-1, which loses none of them.
    """
    tag = tag_for_keyword(keyword)
    assert tag is not None
    element = dataset.get_item(tag)
    value = None if element is None else element.value
    if isinstance(value, bytes):
        if dictionary_VR(keyword) not in CUSTOMIZABLE_CHARSET_VR:
            return Text(value.decode("iso-8859-1").strip(PADDING))  # to ASCII; loses no other byte
        text = _decoded(value, dataset)
        return Text(text.value.strip(PADDING), text.charset)
    values = value if isinstance(value, MultiValue | list | tuple) else [value]
    return Text("\\".join(str(each) for each in values if each is not None).strip(PADDING))


def element_of(keyword: str, value: str) -> DataElement:
    """An element with a value that the standard need not allow."""
    return DataElement(
        keyword, dictionary_VR(keyword), value or None, validation_mode=config.IGNORE
    )


def is_allowed(keyword: str, value: str) -> bool:
    """Whether the standard allows a value of an element."""
    if keyword == "PatientSex":
        return value in SEXES
    vr = dictionary_VR(keyword)
    if CONTROL.search(value) or any(group.count("^") > 4 for group in value.split("=")):
        return False  # pydicom does not look for these
    try:
        if vr == "DA" and value:
            datetime.datetime.strptime(value, "%Y%m%d")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            element = DataElement(keyword, vr, value, validation_mode=config.RAISE)
        return element.VM <= 1
    except Exception:  # pydicom raises nearly anything on damaged values
        return False


def notices_of(dataset: Dataset) -> tuple[Notice, ...]:
    """What a reader of the results should know of the header; no values, only names of elements."""
    texts = {keyword: text_of(dataset, keyword) for keyword in (*SHARED, *UIDS)}
    odd = [
        keyword
        for keyword, text in texts.items()
        if text.value and not is_allowed(keyword, text.value)
    ]
    found = []
    if not texts["PatientID"].value:
        what = "The object has no Patient ID, and so its results have none."
        found.append(Notice("no_patient_id", what))
    if odd:
        what = f"The object breaks the standard in {', '.join(odd)}: taken over as it is."
        found.append(Notice("nonconforming_header", what))
    if charsets := {text.charset for text in texts.values() if text.charset}:
        what = (
            "The object's text is not in the character set that it declares, and was read as "
            f"{' and '.join(sorted(charsets))}: compare the names with the image's."
        )
        found.append(Notice("wrong_character_set", what))
    return tuple(found)


def patient_of(values: Mapping[str, str]) -> tuple[str, ...]:
    """Who an object is about, to be compared: by number, or without one by name and birth."""
    if values["PatientID"]:
        return values["IssuerOfPatientID"], values["PatientID"]
    name = re.sub(r"[\s^=]+", " ", values["PatientName"]).strip().casefold()
    return "", "", name, values["PatientBirthDate"]


def origin_of(dataset: Dataset, pixels: bytes | memoryview) -> Origin:
    """From a header that `check_uids` has accepted, and the encoded pixels."""
    patient = patient_of({keyword: text_of(dataset, keyword).value for keyword in SHARED})
    content = hashlib.sha256()
    for part in _parts(dataset):
        content.update(part)
    content.update(pixels)
    return Origin(
        uid=_hash(uid_of(dataset, "SOPInstanceUID")),
        content=content.hexdigest(),
        patient=_hash("\0".join(patient)),
        study=_hash(uid_of(dataset, "StudyInstanceUID")),
    )


def _parts(dataset: Dataset) -> Iterator[bytes]:
    """All elements as bytes that are the same in implicit and explicit encoding."""
    for tag in sorted(dataset.keys()):
        if BaseTag(tag).element == 0:  # a group's length, which is of the encoding
            continue
        element = dataset.get_item(tag)
        yield f"{tag:08x}".encode()
        if _is_sequence(tag, element):
            for item in dataset[tag].value:
                yield b"["
                yield from _parts(item)
            yield b"]"
        else:
            value: Any = element.value  # bytes, as they were sent, unless somebody has read it
            data = value if isinstance(value, bytes) else str(value or "").encode("utf-8")
            yield data.rstrip(b"\0 ")
        yield b";"


def _is_sequence(tag: BaseTag, element: DataElement | RawDataElement) -> bool:
    if element.VR is not None:
        return element.VR == "SQ"
    return dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"


def _decoded(value: bytes, dataset: Dataset) -> Text:
    if value.isascii() and b"\x1b" not in value:
        return Text(value.decode("ascii"))
    declared = dataset.get("SpecificCharacterSet")
    if declared not in (None, "", "ISO_IR 6"):  # which have no letters beyond ASCII
        try:
            with config.strict_reading(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names of character sets that it understands
                return Text(decode_bytes(value, convert_encodings(declared), DELIMITERS))
        except Exception:  # an unknown name of a character set, or bytes that are not in it
            pass
    try:
        return Text(value.decode("utf-8"), "UTF-8")
    except UnicodeDecodeError:
        return Text(value.decode("iso-8859-1"), "ISO 8859-1")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
