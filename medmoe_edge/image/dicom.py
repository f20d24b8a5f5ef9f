"""DICOM: one frame of a file as a viewer shows it, or the reason why not.

A file's container says where its attributes and pixels are (`dicom_container`); a frame's cells or
codestream become stored values (`dicom_pixels`, `codestreams`), these become grey or RGB
(`dicom_display`, `dicom_tables`), and here the picture gets its true proportions.

No value of the file reaches a message: it may be about a patient.
"""

import datetime
import hashlib
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import ImageError, Notice
from medmoe_edge.image.dicom_container import Container, add_misplaced, open_container
from medmoe_edge.image.dicom_display import file_window, is_inverted, read_modality, show
from medmoe_edge.image.dicom_pixels import Layout, Stored, read_frame, read_layout
from medmoe_edge.image.dicom_tables import Header, Say
from medmoe_edge.image.pixels import (
    MAX_PIXELS,
    Image,
    as_pixels,
    finite,
    label_notices,
    labels_of,
    modality_of,
    pick_frame,
    shown_name,
    square_pixels,
)

# What an enhanced multi-frame object says frame by frame, or once for all frames.
FRAME_GROUPS = (
    *("PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence"),
    *("PlaneOrientationSequence", "PlanePositionSequence", "FramePixelDataPropertiesSequence"),
)
# What a frame's own window or rescale takes the place of: half of one and half of another are none.
OF_INTEREST = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")
RESCALE = ("RescaleSlope", "RescaleIntercept")
OF_MODALITY = ("ModalityLUTSequence", *RESCALE)
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
NUMBERS = (  # that decide how a picture is shown
    *("BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames", "PlanarConfiguration"),
    *(*RESCALE, "WindowCenter", "WindowWidth"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelAspectRatio", *SPACINGS),
)

# What the head of a viewer says, and where it stands.
BANNER = {
    "name": "PatientName",
    "id": "PatientID",
    "birth_date": "PatientBirthDate",
    "sex": "PatientSex",
    "study_date": "StudyDate",
    "study": "StudyDescription",
    "series": "SeriesDescription",
    "laterality": "ImageLaterality",
}
LONGEST = 100  # characters of each
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}
OBLIQUE = 0.25  # of a direction's length, about 15 degrees: then its second letter is told too
OVERLAYS = range(0x6000, 0x6020, 2)
MARKS = ("Segmentation", "RT Dose", "Presentation State")  # storage classes about another image


def read_dicom(path: Path, frame: int | None, most_pixels: int = MAX_PIXELS) -> Image:
    """Read one frame; the errors of `load_image`, and whatever pydicom raises."""
    name = shown_name(path)
    notices: dict[str, Notice] = {}  # the first of each code

    def say(code: str, message: str) -> None:
        notices.setdefault(code, Notice(code, message))

    with open_container(path, name, say) as container:
        add_misplaced(container)
        stored, header, layout = _read_stored(container, frame, name, most_pixels, say)
    pixels, window = show(stored, header, layout, name, say)
    if any((group, 0x0010) in header.dataset for group in OVERLAYS):
        say("overlay", "The file has overlays, which are not shown.")
    if header.text("ShutterShape"):
        say("shutter", "The file has a shutter, which is not drawn: what it hides is shown.")
    if header.text("RecommendedViewingMode") == "SUB":
        say("subtraction", "The file is to be seen with a mask subtracted: it is shown without.")
    if odd := [keyword for keyword in NUMBERS if header.is_odd(keyword)]:
        say("header", f"What the file states as {', '.join(odd)} is no number: it does not count.")
    whole = (header.whole(f"TotalPixelMatrix{way}") or 0 for way in ("Rows", "Columns"))
    if any(size > own for size, own in zip(whole, (layout.rows, layout.columns), strict=True)):
        say("tile", f"The picture is stored in tiles ({layout.frames:,}): one of them is shown.")
    image = Image(
        as_pixels(pixels),
        modality_of(header),
        window,
        _spacing(header),
        layout.frames,
        notices=(*notices.values(), *label_notices(header)),
        labels=labels_of(header),
        sides=_sides(header),
    )
    return square_pixels(image, _ratio(header), most_pixels)


def read_grey_values(
    path: Path, frame: int | None, name: str
) -> tuple[npt.NDArray[np.float32], bool] | None:
    """A frame's values [H, W] in its unit (HU for CT), and whether the lowest is shown white.

    None for colours. The file is one that `load_image` has accepted, whose errors these are.
    """

    def ignore(_code: str, _message: str) -> None:
        """What should be known of the file was said when it was read as a picture."""

    with open_container(path, name, ignore) as container:
        add_misplaced(container)
        stored, header, layout = _read_stored(container, frame, name, MAX_PIXELS, ignore)
    if stored.colour != "grey":
        return None
    values = read_modality(header, stored, ignore).apply(stored.values)
    return finite(values).astype(np.float32), is_inverted(header, layout)


def read_origin(path: Path) -> tuple[bool, str | None, str | None]:
    """Whether a file is an image, its modality, and a name for its patient; None if not stated.

    No image is what has no pixels (reports, plans, directories ...) or marks those of another image
    (segmentations, RT doses, presentation states). The name is a hash of the PatientID or, in
    archives that took it out, of the study. It keeps one patient's images together and does not
    tell who that is to a reader; whoever knows the list of all identifiers can still find it out.
    """
    with open_container(path) as container:
        header, kind = container.header, _class_name(container)
        patient = header.text("PatientID") or header.text("StudyInstanceUID")
        modality = modality_of(header)
        seen = container.pixels is not None and container.pixels.length != 0
    named = hashlib.sha256(patient.encode()).hexdigest()[:16] if patient else None
    is_image = seen or kind is None  # damaged, perhaps: whoever reads the picture says so
    return is_image and not any(mark in (kind or "") for mark in MARKS), modality, named


def read_stated(path: Path, frame: int | None) -> dict[str, Any]:
    """What a file that `load_image` has accepted says of its patient and its series.

    These are the fields of `medmoe_edge.image.worker.Stated`; without a `frame` the place is that
    of the first one.
    """
    with open_container(path) as container:
        header = _of_frame(container.header, frame or 0)
    found = {name: _line(header, keyword) for name, keyword in BANNER.items()}
    found |= {name: _date(found[name]) for name in ("birth_date", "study_date")}
    uid = _line(header, "SeriesInstanceUID")
    whole = "\n".join((uid, found["id"], found["name"])).encode()
    return {
        "patient": {name: text for name, text in found.items() if text},
        "series": hashlib.sha256(whole).hexdigest()[:16] if uid else None,
        "position": _position(header),
        "instance": header.whole("InstanceNumber"),
    }


def _line(header: Header, keyword: str) -> str:
    """The first value as a person reads it, on one line, not too long; empty without one."""
    value = header.value(keyword)
    if value is None or isinstance(value, bytes):
        return ""
    if keyword == "PatientName":
        groups = [str(group).split("^") for group in getattr(value, "components", [value])]
        # "Doe, Jane", and the same name in ideographs and as it is spoken
        names = [", ".join(filter(None, (name[0], " ".join(name[1:3]).strip()))) for name in groups]
        value = " · ".join(filter(None, names))
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in str(value))
    return " ".join(text.split())[:LONGEST]


def _date(text: str) -> str:
    """DICOM's date as ISO 8601 has it; anything else as it is."""
    try:
        return datetime.datetime.strptime(text.replace(".", ""), "%Y%m%d").date().isoformat()
    except ValueError:
        return text


def _read_stored(
    container: Container, frame: int | None, name: str, most_pixels: int, say: Say
) -> tuple[Stored, Header, Layout]:
    header, element = container.header, container.pixels
    if element is None or element.length == 0:
        raise _without_image(container, name)
    layout = read_layout(header, element.kind, name, most_pixels, say)
    index = pick_frame(name, frame, layout.frames)
    stored = read_frame(element, container.syntax, layout, index)
    return stored, _of_frame(header, index), layout


def _without_image(container: Container, name: str) -> ImageError:
    """The error for a file without pixels, which says what it is instead if a class is known."""
    if container.header.value("DirectoryRecordSequence"):
        return ImageError(
            f"{name} is a DICOMDIR, the table of contents of a disc.", "Give one of its images."
        )
    if container.header.value("PixelDataProviderURL"):
        return ImageError(f"The pixels of {name} lie on a server.", "Fetch the image from there.")
    known = _class_name(container)
    return ImageError(
        f"{name} is a DICOM file without an image{f' ({known})' if known else ''}.",
        "Give a file of an image series; if this is one, it was cut off: copy it again.",
    )


def _class_name(container: Container) -> str | None:
    """What the standard calls a file's storage class; it has no name for private ones."""
    kind = container.kind
    return kind.name if kind is not None and kind.name != kind else None


def _of_frame(header: Header, index: int) -> Header:
    """The header with a frame's own rescale, window and spacing, where plain files have them."""
    shared = header.items("SharedFunctionalGroupsSequence")[:1]
    each = header.items("PerFrameFunctionalGroupsSequence")[index : index + 1]
    stated = (
        (item, _replaced(group, item))
        for groups in (*shared, *each)
        for group in FRAME_GROUPS
        for item in groups.items(group)
    )
    items = [(item, replaced) for item, replaced in stated if replaced is not None]
    return header.with_items(items) if items else header


def _replaced(group: str, item: Header) -> tuple[str, ...] | None:
    """What else of the header a frame's item takes the place of; None where it states no window."""
    if group == "FrameVOILUTSequence":
        tables = item.items("VOILUTSequence")
        is_whole = file_window(item) or any(table.value("LUTData") for table in tables)
        return OF_INTEREST if is_whole else None
    is_stated = any(item.number(keyword) is not None for keyword in RESCALE)
    return OF_MODALITY if is_stated else ()


# --- Geometry ----------------------------------------------------------------


def _spacing(header: Header) -> tuple[float, float] | None:
    for keyword in SPACINGS:
        numbers = header.numbers(keyword)
        if len(numbers) == 2 and min(numbers) > 0:
            return numbers[0], numbers[1]
    return None


def _ratio(header: Header) -> float:
    """The distance between rows, divided by that between columns; 1 where neither is stated."""
    spacing = _spacing(header)
    if spacing is None:
        numbers = header.numbers("PixelAspectRatio")
        spacing = (1, 1) if len(numbers) != 2 or min(numbers) <= 0 else (numbers[0], numbers[1])
    return spacing[0] / spacing[1]


def _directions(header: Header) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Where rows run to the right, and columns downwards: unit vectors to the left, back and head.

    None where the file does not say (PS3.3 C.7.6.2.1.1), or says what cannot be.
    """
    numbers = header.numbers("ImageOrientationPatient")
    if len(numbers) != 6 or header.text("AnatomicalOrientationType") == "QUADRUPED":
        return None
    row, column = np.array(numbers[:3]), np.array(numbers[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not all(0.9 < length < 1.1 for length in lengths) or abs(row @ column) > 0.1:
        return None
    return row, column


def _sides(header: Header) -> tuple[str, str, str, str] | None:
    """The letters of the left, upper, right and lower edge, as of `Image.sides`."""
    directions = _directions(header)
    if directions is not None:
        right, down = (_letters(direction) for direction in directions)
    else:
        stated = header.texts("PatientOrientation")
        if len(stated) != 2 or not all(text and set(text) <= set(OPPOSITE) for text in stated):
            return None
        right, down = (text[:2] for text in stated)
    left, up = ("".join(OPPOSITE[letter] for letter in letters) for letters in (right, down))
    return left, up, right, down


def _letters(direction: npt.NDArray[np.float64]) -> str:
    """A direction's letters, the nearest first; the second where it is oblique."""
    pairs = ("R", "L"), ("A", "P"), ("F", "H")
    order = np.argsort(-np.abs(direction), kind="stable")[:2]
    letters = [pairs[axis][int(direction[axis] > 0)] for axis in order]
    return "".join(letters if abs(direction[order[1]]) > OBLIQUE else letters[:1])


def _position(header: Header) -> float | None:
    """How far along its normal the plane lies, in mm: what puts a series in its order."""
    directions, place = _directions(header), header.numbers("ImagePositionPatient")
    if directions is None or len(place) != 3:
        return None
    return float(np.cross(*directions) @ np.array(place))
