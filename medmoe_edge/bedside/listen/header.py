"""What a received object says of itself: whose it is, which it is, and its text as it was sent.

Devices break the letter of the standard: identifiers longer than their VR allows, UIDs with leading
zeros, dates of other forms, text in another character set than the declared one. All of it is taken
over as it is, so that a report lies beside its image, and is told of in `notices_of`; only what a
result cannot refer to is refused, by `check_uids`.

Body parts are compared by what they mean: the defined terms of PS3.16 annex L, their SNOMED CT
codes (of Anatomic Region Sequence) and other words for the same are one; a region that is made of
several, such as CHESTABDPELVIS, holds each of them.
"""

import datetime
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydicom import DataElement, Dataset, config
from pydicom.charset import convert_encodings, decode_bytes, default_encoding
from pydicom.charset import python_encoding as KNOWN
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.sr.coding import Code
from pydicom.tag import BaseTag
from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR

from medmoe_edge.errors import ImageError, Notice

UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
SHARED = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName"),
)
UNIVERSAL_ISSUER = "UniversalEntityID"  # of the item that `issuer_of` finds
NO_ISSUER = {"IssuerOfPatientID": "", UNIVERSAL_ISSUER: ""}
PERSON = ("PatientName", "PatientBirthDate", "PatientSex")
# Those of PS3.5 9.1, but for leading zeros and length, which real devices disregard.
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
LONGEST_UID = 128
UNDECODED = "\ufffd"  # in place of bytes that are not in a character set
DELIMITERS = {ord(mark) for mark in "\\^=\r\n\t\f"}  # end what escapes began, PS3.5 6.1.2.5.3
PADDING = "\0 "
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Of each body part: its defined term (PS3.16 annex L), its SNOMED CT codes, older ones too, and
# other words for it, in English and in what devices of other countries write.
BODY_PARTS = (
    ("CHEST", "816094009 51185008 43799004", "THORAX THORACIC BRUST CXR RIBCAGE TORAX POITRINE"),
    ("ABDOMEN", "818981001 113345001", "ABD ABDO BAUCH"),
    ("PELVIS", "816092008 12921003", "PEL PELV BECKEN PELVIC BASSIN"),
    ("HEAD", "69536005", "KOPF CRANIUM TETE"),
    ("SKULL", "89546000", "SCHAEDEL SCHÄDEL"),
    ("BRAIN", "12738006", "HIRN GEHIRN CEREBRUM"),
    ("NECK", "45048000", "HALS COU"),
    ("LUNG", "39607008", "LUNGS LUNGE"),
    ("HEART", "80891009", "HERZ CARDIAC COEUR"),
    ("BREAST", "76752008", "MAMMA BREASTS"),
    ("SPINE", "421060004", "WS WIRBELSÄULE WIRBELSAEULE"),
    ("CSPINE", "122494005", "CERVICALSPINE HWS"),
    ("TSPINE", "122495006", "THORACICSPINE DSPINE BWS"),
    ("LSPINE", "122496007", "LUMBARSPINE LWS"),
    ("SHOULDER", "16982005", "SCHULTER"),
    ("ELBOW", "16953009", "ELBOWJOINT ELLENBOGEN"),
    ("WRIST", "74670003", "WRISTJOINT HANDGELENK"),
    ("HAND", "85562004", ""),
    ("FINGER", "7569003", "FINGERS"),
    ("HIP", "24136001 29836001", "HIPJOINT HÜFTE HUEFTE"),
    ("KNEE", "72696002", "KNIE GENOU"),
    ("ANKLE", "70258002", "ANKLEJOINT SPRUNGGELENK OSG"),
    ("FOOT", "56459004", "FUSS PIED"),
    ("KIDNEY", "64033007", "KIDNEYS NIERE RENAL"),
    ("LIVER", "10200004", "LEBER HEPATIC"),
)
REGIONS = (  # made of several; those of PS3.16 annex L
    ("ABDOMENPELVIS ABDPELVIS ABDPELV", "818982008 416949008", "ABDOMEN PELVIS"),
    ("CHESTABDOMEN CHESTABD", "416550000", "CHEST ABDOMEN"),
    ("CHESTABDPELVIS CAP CHESTTOPELVIS", "416775004", "CHEST ABDOMEN PELVIS"),
    ("HEADNECK", "774007", "HEAD NECK"),
    ("NECKCHEST", "417437006", "NECK CHEST"),
    ("NECKCHESTABDOMEN", "416152001", "NECK CHEST ABDOMEN"),
    ("NECKCHESTABDPELVIS", "416319003", "NECK CHEST ABDOMEN PELVIS"),
)
BESIDE = {"AND", "LEFT", "RIGHT", "L", "R", "BILATERAL", "BOTH", "UND", "OF", "THE"}


class Origin(NamedTuple):
    """Of a received object, only to be compared: SHA-256 of what it is and whose.

    `uid` is of its SOP Instance UID, `content` of all its elements, `study` of its study's UID, and
    `patient` of who it is about: without the number's issuer, and with it where that is known.
    `person` is what else it says of the patient, the elements of `PERSON`, empty where it does not.
    """

    uid: str
    content: str
    patient: str
    study: str
    person: str = ""


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
        return value in ("M", "F", "O", "")
    vr = dictionary_VR(keyword)
    if CONTROL.search(value) or any(group.count("^") > 4 for group in value.split("=")):
        return False  # pydicom does not look for these
    try:
        if vr == "DA" and value:
            datetime.datetime.strptime(value, "%Y%m%d")
        return DataElement(keyword, vr, value, validation_mode=config.RAISE).VM <= 1
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
    if not texts["PatientID"].value.strip():
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


def body_parts(text: str) -> frozenset[str]:
    """The body parts that a word or a SNOMED CT code stands for; itself where it is not known."""
    plain = "".join(letter for letter in text.upper() if letter.isalnum())
    words = [word for word in re.split(r"[\W_]+", text.upper()) if word and word not in BESIDE]
    found = [_names().get(word) for word in words]
    if plain in _names() or not plain:
        return _names().get(plain, frozenset())
    if found and all(found):
        return frozenset().union(*(each for each in found if each))
    return frozenset([plain])


def body_parts_of(dataset: Dataset) -> frozenset[str]:
    """All that an object says of the body part that it shows: words and codes."""
    words = text_of(dataset, "BodyPartExamined").value.split("\\")
    found = frozenset().union(*map(body_parts, words))
    for item in _regions(dataset):
        code = Code(str(item.get("CodeValue", "")), str(item.get("CodingSchemeDesignator", "")), "")
        for known in (*BODY_PARTS, *REGIONS):
            if any(code == Code(value, "SCT", "") for value in known[1].split()):
                found |= body_parts(known[0].split()[0])
        found |= body_parts(str(item.get("CodeMeaning", "")))
    return found


def modality_of(dataset: Dataset) -> str:
    """The first of an object's modalities, in capitals."""
    return text_of(dataset, "Modality").value.partition("\\")[0].strip().upper()


def _regions(dataset: Dataset) -> Iterator[Dataset]:
    """The codes of an object's anatomic region; of an enhanced one, that of all frames."""
    try:
        yield from dataset.get("AnatomicRegionSequence") or ()
        for group in dataset.get("SharedFunctionalGroupsSequence") or ():
            for anatomy in group.get("FrameAnatomySequence") or ():
                yield from anatomy.get("AnatomicRegionSequence") or ()
    except Exception:  # pydicom raises nearly anything on damaged values
        return


@functools.cache
def _names() -> dict[str, frozenset[str]]:
    """What is known under each word and code, written in capitals without spaces."""
    found = {}
    for name, values, others in BODY_PARTS:
        for word in (name, *values.split(), *others.split()):
            found[word] = frozenset([name])
    for names, values, parts in REGIONS:
        for word in (*names.split(), *values.split()):
            found[word] = frozenset(parts.split())
    return found


def shared_of(dataset: Dataset) -> dict[str, str]:
    """The texts of `SHARED`, and of the number's `UNIVERSAL_ISSUER`."""
    universal = text_of(issuer_of(dataset) or Dataset(), UNIVERSAL_ISSUER).value
    return {each: text_of(dataset, each).value for each in SHARED} | {UNIVERSAL_ISSUER: universal}


def issuer_of(dataset: Dataset) -> Dataset | None:
    """The item that names the patient number's issuer by an identifier (PS3.3 table 10-18)."""
    try:
        item: Dataset = dataset.IssuerOfPatientIDQualifiersSequence[0]
        return item if UNIVERSAL_ISSUER in item else None
    except Exception:  # pydicom raises nearly anything on damaged values
        return None


def patient_of(values: Mapping[str, str]) -> tuple[str, ...]:
    """Who an object is about, to be compared: by number, or without one by name and birth."""
    if values["PatientID"].strip():
        issuer, universal = values["IssuerOfPatientID"], values[UNIVERSAL_ISSUER]
        return (issuer, values["PatientID"], *([universal] if universal else []))
    return "", "", _plain_name(values["PatientName"]), values["PatientBirthDate"]


def _plain_name(name: str) -> str:
    return re.sub(r"[\s^=]+", " ", name).strip().casefold()


def same_patient(one: str, other: str) -> bool:
    """Whether two `Origin.patient` may be the same.

    A number without an issuer may be of any; two with different issuers are different.
    """
    hashes, others = set(one.split()), set(other.split())
    return hashes <= others or others <= hashes


def origin_of(dataset: Dataset, pixels: bytes | memoryview) -> Origin:
    """From a header that `check_uids` has accepted, and the encoded pixels."""
    values = shared_of(dataset)
    unknown = (NO_ISSUER, {UNIVERSAL_ISSUER: ""}, {"IssuerOfPatientID": ""})
    patients = [patient_of(values | each) for each in unknown]
    name, *others = (values[each] for each in PERSON)
    said = (_plain_name(name.partition("=")[0]), *others)
    person = [each and hashed(values["PatientID"], each) for each in said]
    content = hashlib.sha256()
    for part in _parts(dataset):
        content.update(part)
    content.update(pixels)
    return Origin(
        uid=hashed(uid_of(dataset, "SOPInstanceUID")),
        content=content.hexdigest(),
        patient=" ".join(dict.fromkeys(hashed(*each) for each in patients)),
        study=hashed(uid_of(dataset, "StudyInstanceUID")),
        person=",".join(person),
    )


def _parts(dataset: Dataset) -> Iterator[bytes]:
    """All elements as bytes that are the same in implicit and explicit encoding."""
    for tag in sorted(dataset.keys()):
        if BaseTag(tag).element == 0:  # a group's length, which is of the encoding
            continue
        element = dataset.get_item(tag)
        yield f"{tag:08x}".encode()
        if (element.VR or (dictionary_has_tag(tag) and dictionary_VR(tag))) == "SQ":
            for item in dataset[tag].value:
                yield b"["
                yield from _parts(item)
            yield b"]"
        else:
            value: Any = element.value  # bytes, as they were sent, unless somebody has read it
            data = value if isinstance(value, bytes) else str(value or "").encode("utf-8")
            yield data.rstrip(b"\0 ")
        yield b";"


def _decoded(value: bytes, dataset: Dataset) -> Text:
    if value.isascii() and b"\x1b" not in value:
        return Text(value.decode("ascii"))
    declared = dataset.get("SpecificCharacterSet")
    if declared not in (None, "", "ISO_IR 6"):  # which have no letters beyond ASCII
        try:
            text = decode_bytes(value, _encodings(declared), DELIMITERS)
        except Exception:  # an unknown name of a character set
            text = UNDECODED
        if not any(mark in text for mark in (UNDECODED, "\x1b")):
            return Text(text)
    try:
        return Text(value.decode("utf-8"), "UTF-8")
    except UnicodeDecodeError:
        return Text(value.decode("iso-8859-1"), "ISO 8859-1")


def _encodings(declared: Any) -> list[str]:
    """Python's names of them; raises `LookupError` where pydicom would take another for one.

    Its strictness and the filters of warnings are the process's: other threads read meanwhile.
    """
    names = [declared] if isinstance(declared, str) else list(declared)
    found = convert_encodings(names)
    if any(convert_encodings([each]) == [default_encoding] for each in names if each not in KNOWN):
        raise LookupError
    return found


def hashed(*parts: str) -> str:
    """SHA-256 of texts, only to be compared."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
