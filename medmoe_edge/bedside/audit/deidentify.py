"""A DICOM image without its patient: the Basic Profile of PS3.15, annex E.

What becomes of each attribute is table E.1-1's, as the library dicom-anonymizer keeps it by edition
of the standard; it is applied here at every depth:

    X, and X/... of sequences    removed
    Z, X/Z                       emptied
    D, Z/D, X/D, X/Z/D           a dummy of its VR; in a sequence, all that is in it
    U, X/Z/U*                    UIDs replaced, by the same for the same

Beyond the table, whatever is not known to be harmless goes: private attributes, attributes that the
data dictionary does not know, names of persons, overlays and curves as a whole, bits of the pixels
that do not belong to them, and what encoders write beside compressed pictures.

Pixels are not looked at. Where they are marked as showing text, or of a kind that often does, the
image is refused; allowed knowingly, the result does not claim that its patient is removed.
"""

import contextlib
import functools
import hashlib
import hmac
import io
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from pydicom import DataElement, Dataset, dcmwrite
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

from medmoe_edge._version import __version__
from medmoe_edge.atomic import atomic_file, writing
from medmoe_edge.errors import ImageError
from medmoe_edge.image.dicom import read_dicom
from medmoe_edge.image.dicom_container import PixelElement, read_codestreams, read_whole
from medmoe_edge.image.dicom_pixels import read_layout
from medmoe_edge.image.dicom_tables import Header
from medmoe_edge.image.loading import check_file, decoding
from medmoe_edge.image.pixels import shown_name

OVERLAYS = range(0x6000, 0x6100, 2)
JPEG, JPEG_2000 = b"\xff\xd8", b"\xff\x4f"  # how a codestream begins

# The first scan or tile, and all behind it, is left alone: there are no comments in it.
SCANS = {0xDA, 0x90}  # SOS of ITU-T T.81, table B.1, and SOT of T.800, table A.2
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
COMMENTS = {0xFE, 0x64}

# Application segments, T.81 B.2.4.6: those of JFIF, of SPIFF and JPEG-LS colours, and of Adobe say
# how the picture is to be decoded; the others hold descriptions.
APPLICATION, NEEDED = range(0xE0, 0xF0), {0xE0, 0xE8, 0xEE}
COMMENTED = (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes)
LARGEST = 2**32 - 2  # bytes whose offsets a Basic Offset Table can tell


def clean_pixels(dataset: Dataset) -> None:
    """Clear all that is not a value of a pixel; raises `ImageError` where that cannot be done."""
    hides_overlays = any(  # whose data is not in an attribute of its own (PS3.3 C.9.2)
        Tag(group, 0x0100) in dataset and Tag(group, 0x3000) not in dataset for group in OVERLAYS
    )
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated and hides_overlays:
        try:
            dataset.decompress(generate_instance_uid=False)
        except Exception as error:  # whatever decoders raise
            raise ImageError(
                "The picture has an overlay in its unused bits, and cannot be decompressed.",
                "Save it uncompressed first.",
            ) from error
    if "PixelData" not in dataset:
        return
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in COMMENTED:
        _clean_frames(dataset)
    elif not syntax.is_encapsulated:
        _clean_values(dataset)


def _clean_values(dataset: Dataset) -> None:
    layout = read_layout(Header(dataset), "integer", "the image", sys.maxsize, _ignore)
    bits = layout.rows * layout.columns * layout.samples * layout.frames * layout.allocated
    data = dataset.PixelData
    if layout.photometric == "YBR_FULL_422" and 8 * len(data) < bits:
        bits = bits * 2 // 3
    size = (bits + 7) // 8
    data = data[: size + size % 2]  # in words, the last byte may be before the filler
    if layout.allocated in (8, 16, 32) and layout.stored < layout.allocated:
        width = layout.allocated // 8
        order = "<" if dataset.original_encoding[1] else ">"
        values = np.frombuffer(data[: len(data) // width * width], f"{order}u{width}")
        data = _masked(values, layout.stored, layout.high, signed=layout.signed)
    dataset.PixelData = data + b"\0" * (len(data) % 2)


def _masked(values: npt.NDArray[Any], stored: int, high: int, *, signed: bool) -> bytes:
    """The values, all bits 0 that are not theirs; above negative ones 1, as many readers need."""
    kind, bits = values.dtype.type, values.dtype.itemsize * 8
    own = ((1 << stored) - 1) << (high - stored + 1)
    cleared = values & kind(own)
    if signed:
        above = ((1 << bits) - 1) ^ ((1 << (high + 1)) - 1)
        negative = (values >> kind(high)) & kind(1) == 1
        cleared = np.where(negative, cleared | kind(above), cleared)
    return bytes(cleared.astype(values.dtype).tobytes())


def _clean_frames(dataset: Dataset) -> None:
    count = Header(dataset).whole("NumberOfFrames") or 1
    data = io.BytesIO(dataset.PixelData)
    pixels = PixelElement(data, 0, None, "integer", False, True, "the file", _ignore)
    # as the picture is read, whatever the tables of offsets say
    frames = read_codestreams(pixels, count)
    cleaned = [_without_comments(frame) for frame in frames]
    if cleaned == frames:
        return
    for part in ("", "Lengths"):
        dataset.pop(f"ExtendedOffsetTable{part}", None)
    has_table = sum(map(len, cleaned)) < LARGEST - 16 * len(cleaned)
    dataset.PixelData = encapsulate(cleaned, has_bot=has_table)


def _ignore(_code: str, _message: str) -> None:
    """What should be known of a picture is said where it is looked at."""


def _without_comments(frame: bytes) -> bytes:
    """A JPEG, JPEG-LS or JPEG 2000 codestream without its comments; any other as it is."""
    if not frame.startswith((JPEG, JPEG_2000)):
        return frame
    return frame[:2] + b"".join(
        frame[start:end]
        for marker, start, end in _segments(frame)
        if marker not in COMMENTS and (marker not in APPLICATION or marker in NEEDED)
    )


def _segments(frame: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan; then 0 for all the rest."""
    at = 2
    while at + 4 <= len(frame) and frame[at] == 0xFF and frame[at + 1] not in SCANS:
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = 0 if marker in ALONE else int.from_bytes(frame[at + 2 : at + 4], "big")
        end = min(at + 2 + length, len(frame))
        yield marker, at, end
        at = end
    if at < len(frame):
        yield 0, at, len(frame)


EDITION = "2026c"
Action = Literal["X", "Z", "D", "U", "U*"]

CATEGORIES: dict[str, Action] = {
    "D_TAGS": "D",
    "Z_TAGS": "Z",
    "X_TAGS": "X",
    "U_TAGS": "U",
    "Z_D_TAGS": "D",
    "X_Z_TAGS": "Z",
    "X_D_TAGS": "D",
    "X_Z_D_TAGS": "D",
    "X_Z_U_STAR_TAGS": "U*",
}

OPTIONAL = ("X_Z_TAGS", "X_D_TAGS", "X_Z_D_TAGS")  # sequences of these are in no image's type 1
WORDS = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT")

DUMMIES: dict[str, Any] = {
    **dict.fromkeys(WORDS, "ANONYMIZED"),
    **dict.fromkeys(("FD", "FL", "SS", "US", "SL", "UL", "SV", "UV"), 0),
    **dict.fromkeys(("DS", "IS"), "0"),
    **dict.fromkeys(("OB", "UN"), b"\0\0"),
    "AS": "000Y",
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
    "UR": "http://anonymized.invalid",
}

WELL_KNOWN = "1.2.840.10008."  # UIDs of the standard itself, which tell of nobody
REPEATING = ((0x5000, 0xFF00), (0x6000, 0xFF00))  # curves and overlays

# Where text in the picture is usual: ultrasound, endoscopy, captures of screens and of paper.
TEXT_MODALITIES = {"US", "IVUS", "ES", "OT", "SC", "HC", "DOC", "XC", "DMS"}
TEXT_CLASSES = ("Ultrasound", "Secondary Capture", "Endoscopic", "Photographic", "Hardcopy")
SCREENS = ("SCREEN SAVE", "SCREEN_SAVE", "SCREENSAVE", "SECONDARY CAPTURE")
METHOD = f"PS3.15 {EDITION} Basic Profile, medmoe-edge {__version__}"[:64]


def deidentify(
    source: Path, target: Path, *, allow_burned_in: bool = False, secret: bytes = b""
) -> bool:
    """Write `source` without what identifies a patient to `target`, whole or not at all.

    Args:
        source: A DICOM file with an image.
        target: What to write; it is replaced.
        allow_burned_in: Also take pictures that show text, or may.
        secret: What replaced UIDs depend on, the same for all files of a study. Without one,
            whoever has the original UIDs can tell which was made from which.

    Returns:
        Whether the result claims that its patient is removed; pictures that may show text do not.

    Raises:
        ImageError: What is no DICOM image, and pixels that are marked as showing text (PS3.3
            C.7.6.1.1.5, Burned In Annotation) or often do, unless allowed.
        ResourceError: The disk does not take `target`.
    """
    name = shown_name(source)
    check_file(source, name)
    with decoding(name):
        dataset = read_whole(source, name)
        _check_image(dataset, name)
        may_show_text = _may_show_text(dataset)
        if may_show_text and not allow_burned_in:
            raise _refusal(dataset)
        clean_pixels(dataset)
        _Cleaning(secret).clean(dataset)
        _claim(dataset, removed=not may_show_text)
        with writing(target), atomic_file(target) as file:  # what the disk refuses is its own error
            dcmwrite(file, dataset, enforce_file_format=True)
            file.flush()
            _check_picture(source, Path(file.name), name)
    return not may_show_text


def _check_picture(source: Path, written: Path, name: str) -> None:
    """Refuse what shows another picture than its source, where that is of a kind that is read."""
    try:
        before = read_dicom(source, None)
    except Exception:  # there is none to compare with
        return
    with contextlib.suppress(Exception):
        after = read_dicom(written, None)
        if after.frames == before.frames and np.array_equal(after.pixels, before.pixels):
            return
    raise ImageError(
        f"{name} would show another picture without what is written beside it.",
        "Save it uncompressed first, as a viewer shows it.",
    )


def _check_image(dataset: Dataset, name: str) -> None:
    has_pixels = any(f"{kind}PixelData" in dataset for kind in ("", "Float", "DoubleFloat"))
    if not has_pixels and not dataset.get("SOPClassUID"):
        raise ImageError(f"{name} is no DICOM image.", "Give one.")
    if not has_pixels:
        raise ImageError(
            f"{name} holds no image: of a report or a document nobody can tell here what in its "
            "words is about the patient.",
            "Give an image.",
        )
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not dataset.get(keyword):
            raise ImageError(f"{name} has no {keyword}.", "Export it again.")
    if not dataset.file_meta.TransferSyntaxUID.is_transfer_syntax:
        raise ImageError(
            f"The transfer syntax of {name} is private, or is none.",
            "Save it as Explicit VR Little Endian first.",
        )


def _may_show_text(dataset: Dataset) -> bool:
    marked = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    if marked in ("YES", "NO"):
        return marked == "YES"
    kinds = {str(dataset.get("Modality") or "").strip().upper()}
    sop_class = dataset.get("SOPClassUID")
    class_name = getattr(sop_class, "name", "")
    shown = " ".join(_values(dataset.get("ImageType"))).upper()
    return bool(
        kinds & TEXT_MODALITIES
        or "ConversionType" in dataset  # made from paper, film or a screen
        or any(word in class_name for word in TEXT_CLASSES)
        or any(word in shown for word in SCREENS)
    )


def _refusal(dataset: Dataset) -> ImageError:
    what = (
        "Pictures of this kind often show text, such as a patient's name, and the file does not "
        "say that this one shows none (Burned In Annotation)."
    )
    if str(dataset.get("BurnedInAnnotation") or "").strip():
        what = "The picture is marked as showing text (Burned In Annotation), often a name."
    return ImageError(what, "Look at it; cover what it tells, or allow it: --allow-burned-in.")


def _claim(dataset: Dataset, *, removed: bool) -> None:
    """Say in the object what was done to it, and no more."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta, dataset.preamble = meta, None
    for keyword in ("DeidentificationMethodCodeSequence", "DeidentificationMethod"):
        if keyword in dataset:  # of an earlier hand, which may have kept more
            del dataset[keyword]
    dataset.PatientIdentityRemoved = "YES" if removed else "NO"
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    dataset.DeidentificationMethod = METHOD if removed else [METHOD, "Pixels were not looked at"]
    if removed:
        item, basic = Dataset(), codes.DCM.BasicApplicationConfidentialityProfile
        item.CodeValue, item.CodingSchemeDesignator = basic.value, basic.scheme_designator
        item.CodeMeaning = basic.meaning
        dataset.DeidentificationMethodCodeSequence = [item]


class _Cleaning:
    """The table's actions on the attributes of one dataset and of all in its sequences."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def clean(self, dataset: Dataset) -> None:
        """Leave in a dataset only what the profile leaves."""
        for tag in list(dataset.keys()):
            action = _action(BaseTag(tag))
            if action == "X":
                del dataset[tag]
                continue
            self._apply(action, dataset, dataset[tag])

    def _apply(self, action: Action | None, dataset: Dataset, element: DataElement) -> None:
        is_sequence = element.VR == "SQ"
        if action == "D":
            self._replace(dataset, element)
        elif action == "Z":
            element.value = [] if is_sequence else None
        elif is_sequence:
            for item in element.value:
                self.clean(item)
        elif action in ("U", "U*"):
            self._replace_uids(element)
        elif element.VR == "PN":  # the table has all of today's
            element.value = None

    def _replace(self, dataset: Dataset, element: DataElement) -> None:
        """A dummy of the same VR; what has none is removed."""
        if BaseTag(element.tag).is_private or BaseTag(element.tag).element == 0:
            del dataset[element.tag]
        elif element.VR == "SQ":
            for item in element.value:
                for each in list(item):
                    self._replace(item, each)
        elif element.VR == "UI":
            self._replace_uids(element)
        elif element.VR in DUMMIES:
            element.value = DUMMIES[element.VR]
        else:
            del dataset[element.tag]

    def _replace_uids(self, element: DataElement) -> None:
        found = [self._uid(value) for value in _values(element.value)]
        element.value = found if len(found) > 1 else next(iter(found), None)

    def _uid(self, uid: str) -> str:
        """The same for the same, under the root for UUIDs (PS3.5 B.2)."""
        if uid.startswith(WELL_KNOWN):
            return uid
        digest = hmac.digest(self._secret, f"medmoe-edge {uid}".encode(), hashlib.sha256)
        return f"2.25.{uuid.UUID(bytes=digest[:16], version=4).int}"


def _values(value: object) -> list[str]:
    many: Iterable[object] = value if isinstance(value, MultiValue | list) else [value]
    return [str(each) for each in many if each not in (None, "")]


def _action(tag: BaseTag) -> Action | None:
    repeats = any(tag.group & mask == group for group, mask in REPEATING)
    if tag.is_private or tag.element == 0 or repeats:
        return "X"
    return _table().get((tag.group, tag.element), None if dictionary_has_tag(tag) else "X")


@functools.cache
def _table() -> dict[tuple[int, int], Action]:
    """By group and element; the repeating groups are removed as a whole."""
    table: dict[tuple[int, int], Action] = {}
    categories = dicom_anonymization_database_selector(f"dicomfields_{EDITION}")
    for category, action in CATEGORIES.items():
        for group, element, *masks in categories[category]:
            tag = (group, element)
            is_sequence = dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"
            if not masks:
                table[tag] = "X" if is_sequence and category in OPTIONAL else action
    return table
