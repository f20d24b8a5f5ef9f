"""What every reader shares: a file's kind by its first bytes, its picture, and its labels.

Labels are in the models' words: there is one mapping from DICOM's Modality (PS3.3 C.7.3.1.1.1, with
the retired values that old archives still hold) and storage classes (PS3.4 annex B) to the
modalities that the models know.
"""

import dataclasses
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from medmoe_edge.errors import ImageError, Notice

if TYPE_CHECKING:
    from medmoe_edge.image.dicom_tables import Header


Pixels = npt.NDArray[np.uint8]
Window = tuple[float, float]
MAX_PIXELS = 100_000_000  # of one picture: 10,000 x 10,000
MAX_BYTES = 2**30  # of all frames of a file, decoded: 2,000 CT slices

# The paper pads to a square before it shrinks. Longer sides are reduced to this first, or a strip
# of 1 x 100,000,000 pixels would need a square of 10^16.
MAX_SQUARE = 8192

# Likewise, only the middle of a longer strip can reach the centre crop.
MAX_ASPECT = 16
SQUARE = 0.005  # pixels that are less out of square than this are shown as they are
MAX_STRETCH = 16.0  # what says more than this is taken for a mistake
BAND = 2**20  # values that are worked on at once
FLAT = 16  # in a picture of fewer grey levels next to nothing can be seen
HEAD_BYTES = 348  # enough for all of these; a NIfTI-1 header is the longest
KINDS = "a PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM or NIfTI file"

RASTERS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",  # JPEG
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF and BigTIFF
    *(b"GIF87a", b"GIF89a"),
)

BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of what follows the 14 bytes of every BMP
NIFTI_MAGICS = {344: (b"n+1\0", b"ni1\0"), 4: (b"n+2\0", b"ni2\0")}  # by offset
GZIP = b"\x1f\x8b"
SAVE_AS = "Open it in the program that made it, and save the picture as PNG."

# What else people try, each with its remedy.
OTHERS: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), kind, remedy)
    for pattern, kind, remedy in (
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", SAVE_AS),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", SAVE_AS),
        (rb"\xff\xd8", "a JPEG picture whose first bytes are damaged", "Copy it again."),
        (rb".{4}ftyp(avi|hei|hev|mif|msf)", "a HEIF or AVIF picture", SAVE_AS),
        (rb".{4}ftyp|.{4}moov|RIFF.{4}AVI |\x1aE\xdf\xa3", "a film", "Save one frame as PNG."),
        (rb"8BPS", "a Photoshop document", SAVE_AS),
        (rb"%PDF", "a PDF document", "Export the picture in it as PNG."),
        (rb"\s*(<\?xml.*)?<(svg|!DOCTYPE svg)", "an SVG drawing", "Export it as PNG."),
        (rb"PK\x03\x04|Rar!|7z\xbc\xaf|.{257}ustar", "an archive", "Unpack it, and give one file."),
        (rb"NRRD", "an NRRD volume", "Convert it to NIfTI, as 3D Slicer does."),
        (rb"ObjectType\s*=|NDims\s*=", "a MetaImage volume", "Convert it to NIfTI."),
        (rb"\x89HDF|CDF[\x01\x02]", "an HDF5 or MINC file", "Convert it to NIfTI."),
        (
            rb"\x5c\x01\0\0|\0\0\x01\x5c",
            "the header of an Analyze 7.5 volume, which does not say where left and right are",
            "Convert it to NIfTI with a tool that knows the scanner.",
        ),
    )
)


def is_raster(head: bytes) -> bool:
    """Whether a file's first bytes are those of a PNG, JPEG, TIFF, WebP, BMP or GIF file."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    bmp = head[:2] == b"BM" and len(head) >= 18
    bmp = bmp and struct.unpack_from("<I", head, 14)[0] in BMP_HEADERS
    return webp or bmp or head.startswith(RASTERS)


def is_dicom(head: bytes) -> bool:
    """Whether a file's first bytes begin a DICOM file, or a data set without its preamble.

    Without it, the first element is of group 2 or 8 and has a short number, in either byte order.
    """
    group, element = head[:2], head[2:4]
    little = group in (b"\x02\0", b"\x08\0") and element[1:] == b"\0"
    big = group in (b"\0\x02", b"\0\x08") and element[:1] == b"\0"
    return head[128:132] == b"DICM" or head[:4] == b"DICM" or little or big


def is_nifti(head: bytes) -> bool:
    """Whether a file's first 348 bytes are a NIfTI header."""
    return any(head[at : at + 4] in magics for at, magics in NIFTI_MAGICS.items())


def may_be_nifti(head: bytes) -> bool:
    """Whether they are one, or gzip, which has to be opened to be known."""
    return head.startswith(GZIP) or is_nifti(head)


def unknown(name: str, head: bytes) -> ImageError:
    """The error for a file that none of the readers reads: what it is, and what to do with it."""
    for pattern, kind, remedy in OTHERS:
        if pattern.match(head):
            return ImageError(f"{name} is {kind}, which is not read.", remedy)
    return ImageError(f"{name} is not an image that can be read.", f"Give {KINDS}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One picture, ready to look at.

    `pixels` [H, W, 3] is read-only; grey is repeated in the three channels. `window` is the
    (centre, width) that made the file's values visible, in the file's unit (HU for CT); None
    where the values were shown as they are. `spacing` is the distance between rows and between
    columns in mm. `frames` counts the frames, pages or slices of the file. `notices` say what
    should be known of the picture as it was read; they become warnings of every answer about it.
    `labels` are all the modalities that the file states. `sides` are where the patient's left (L),
    right (R), front (A), back (P), head (H) and feet (F) lie: the letters of the picture's left,
    upper, right and lower edge, the nearest direction first (DICOM PS3.3 C.7.6.1.1.1); None where
    the file does not say.
    """

    pixels: Pixels
    modality: str | None = None
    window: Window | None = None
    spacing: tuple[float, float] | None = None
    frames: int = 1
    notices: tuple[Notice, ...] = ()
    labels: tuple[str, ...] = ()
    sides: tuple[str, str, str, str] | None = None

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> Self:
        """A picture from uint8 values, grey [H, W] or RGB [H, W, 3]; they are copied."""
        shown = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
        if not shown or array.dtype != np.uint8:
            raise ImageError(
                f"An array of {array.dtype} values in the shape {list(array.shape)} is no picture.",
                "Give uint8 values in the shape [H, W] or [H, W, 3].",
            )
        check_size("The array", *array.shape[:2])
        return cls(as_pixels(array))


def square_pixels(image: Image, ratio: float, most_pixels: int = MAX_PIXELS) -> Image:
    """The image in true proportions: the coarser axis is stretched until pixels are square.

    `ratio` is the distance between its rows, divided by that between its columns. Where stretching
    would exceed `most_pixels`, the finer axis shrinks too. It is the same image where its pixels
    are square already; with a notice, where the ratio cannot be meant.
    """
    if abs(ratio - 1) < SQUARE:
        return image
    if not 1 / MAX_STRETCH <= ratio <= MAX_STRETCH:
        odd = Notice(
            "proportions",
            "The file says that its pixels are far from square; they are shown as square.",
        )
        return dataclasses.replace(image, notices=(*image.notices, odd))
    rows, columns = image.pixels.shape[:2]
    height, width = rows * max(1.0, ratio), columns * max(1.0, 1 / ratio)
    shrink = min(1.0, math.sqrt(most_pixels / (height * width)))
    size = max(1, int(width * shrink + 0.5)), max(1, int(height * shrink + 0.5))
    # a stretched pixel stays of one shade, as on a viewer that does not interpolate
    stretched = Pillow.fromarray(image.pixels).resize(size, Pillow.Resampling.BOX)
    pixels = np.array(stretched)
    pixels.setflags(write=False)
    spacing = None if image.spacing is None else (min(image.spacing) / shrink,) * 2
    return dataclasses.replace(image, pixels=pixels, spacing=spacing)


def shown_name(path: Path) -> str:
    """How messages name a file: the last part of its path, quoted, control characters escaped."""
    return repr(path.name or str(path))


def check_size(name: str, rows: int, columns: int, most_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture without pixels or with more than `most_pixels`."""
    if rows < 1 or columns < 1:
        raise ImageError(f"{name} has no pixels.", "Give an image with at least one pixel.")
    if rows * columns > most_pixels:
        raise too_large(name, most_pixels)


def too_large(name: str, most_pixels: int = MAX_PIXELS) -> ImageError:
    """The error for a picture of more than `most_pixels`."""
    return ImageError(
        f"{name} has more than the limit of {most_pixels:,} pixels.", "Shrink it or crop it first."
    )


def pick_frame(name: str, frame: int | None, count: int) -> int:
    """The index of the wanted frame, or of the middle one."""
    if frame is None:
        return (count - 1) // 2
    if not 0 <= frame < count:
        raise ImageError(
            f"{name} has {count} frame{'s' * (count != 1)}; there is no frame {frame}.",
            f"Choose a frame from 0 to {count - 1}.",
        )
    return frame


def as_pixels(values: npt.NDArray[np.uint8]) -> Pixels:
    """Grey [H, W] or RGB [H, W, 3] as a read-only [H, W, 3] of its own."""
    if values.ndim == 3:
        pixels = values.copy(order="C")
    else:
        pixels = np.empty((*values.shape, 3), np.uint8)
        for channel in range(3):  # three times as fast as to repeat each value
            pixels[..., channel] = values
    pixels.setflags(write=False)
    return pixels


def finite(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The values as float64, NaN as 0 and everything within reach of further arithmetic."""
    return np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), -1e30, 1e30)


def show_percentiles(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], Window]:
    """Values without a display range of their own: 1st to 99th percentile from black to white.

    NaN is black and counts for nothing, as infinite values do, which are black or white.
    """
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    known = values
    if values.dtype.kind == "f":
        sound = np.isfinite(values)
        known = values if sound.all() else values[sound]
    if not known.size:
        known = np.zeros(1)
    low, high = _percentiles(known, (1, 99))
    if low == high:  # a few bright dots on black
        low, high = float(known.min()), float(known.max())
    return show_range(values, low, high), ((low + high) / 2, high - low)


def show_range(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Values `[H, W]` from `low`, shown black, to `high`, shown white; NaN is black."""
    shown = np.empty(values.shape, np.uint8)
    band = max(1, BAND // max(1, values.shape[1]))  # a picture in float64 takes eight times more
    for top in range(0, values.shape[0], band):
        part = values[top : top + band].astype(np.float64)
        part = np.clip((part - low) / ((high - low) or 1.0), 0, 1)
        shown[top : top + band] = np.rint(np.nan_to_num(part, copy=False) * 255)
    return shown


def _percentiles(values: npt.NDArray[Any], wanted: tuple[float, ...]) -> list[float]:
    """As `np.percentile` interpolates them, which takes a float64 copy and overflows in int8."""
    places = [(values.size - 1) * percent / 100 for percent in wanted]
    near = [(math.floor(place), math.ceil(place)) for place in places]
    ordered = np.partition(values.ravel(), sorted({index for pair in near for index in pair}))
    found = []
    for place, (below, above) in zip(places, near, strict=True):
        first, last = (min(max(float(ordered[k]), -1e300), 1e300) for k in (below, above))
        found.append(first + (last - first) * (place - below))
    return found


MODALITIES = {
    "CT": "ct",
    **dict.fromkeys(("MR", "MA", "MS"), "mri"),
    **dict.fromkeys(("CR", "DX", "DR", "MG", "RG", "IO", "PX", "PANO"), "xray"),
    **dict.fromkeys(("XA", "RF", "DF", "DS", "CF", "BMD", "RTIMAGE"), "xray"),
    **dict.fromkeys(("US", "IVUS", "EC", "DD", "CD", "BDUS"), "ultrasound"),
    **dict.fromkeys(("SM", "GM", "DM"), "pathology"),
    **dict.fromkeys(("OP", "OPT", "OPTENF", "FA", "FS"), "fundus"),
}

# What no model here was trained on; anything else, such as OT, says nothing of what is shown.
UNKNOWN = {
    "PT": "positron emission tomography",
    "NM": "nuclear medicine",
    "ST": "single-photon emission tomography",
    "ES": "endoscopy",
    "IVOCT": "intravascular optical coherence tomography",
    "OCT": "optical coherence tomography",
    "XC": "photography",
    "DMS": "dermatoscopy",
    "TG": "thermography",
    "EPS": "electrophysiology",
    "ECG": "electrocardiography",
    "SEG": "a segmentation",
    "RTDOSE": "a radiation dose",
}

# Words in the names of storage classes, where Modality says nothing.
_CLASSES = (
    (r"\bCT\b", "ct"),
    (r"\bMR\b", "mri"),
    (r"Ultrasound", "ultrasound"),
    (r"X-Ray|Computed Radiography|Enhanced XA|Enhanced XRF|Breast|RT Image", "xray"),
    (r"Microscop", "pathology"),
    (r"Ophthalmic (Photography|Tomography)", "fundus"),
)

_NAMES = {"ct": "CT", "mri": "MRI", "xray": "X-ray"}
UNLIKE_LABEL = "unlike_label"


def modality_of(header: "Header") -> str | None:
    """What Modality (0008,0060) states, of what models know; None where it does not."""
    return MODALITIES.get(header.text("Modality"))


def labels_of(header: "Header") -> tuple[str, ...]:
    """All modalities that a DICOM header states, by Modality and by its storage class."""
    from pydicom.uid import UID

    name = UID(header.text("SOPClassUID")).name  # of unknown ones the UID, in which no word is
    of_class = next((kind for words, kind in _CLASSES if re.search(words, name)), None)
    stated = (modality_of(header), of_class)
    return tuple(dict.fromkeys(kind for kind in stated if kind))


def label_notices(header: "Header") -> tuple[Notice, ...]:
    """What is odd about a header's own statement of what it shows."""
    code = header.text("Modality")
    if code in UNKNOWN:
        what = f"The file says that it shows {UNKNOWN[code]}, which the models were not trained on."
        return (Notice("unknown_modality", what),)
    labels = labels_of(header)
    if len(labels) < 2:
        return ()
    what = "The file says that it is {}, and its storage class is for {}."
    return (Notice("contradictory_label", what.format(*map(named, labels))),)


def unlike_label(labels: Sequence[str], read_as: str | None) -> tuple[Notice, ...]:
    """What to say where the model reads an image as none of the modalities its file states."""
    if not labels or read_as is None or read_as in labels:
        return ()
    what = (
        f"The file says that it is {named(labels[0])}, and the model reads the image as "
        f"{named(read_as)}: look at the picture before you rely on the answer."
    )
    return (Notice(UNLIKE_LABEL, what),)


def named(modality: str) -> str:
    """A modality as people write it."""
    return _NAMES.get(modality, modality)


def black_picture() -> Image:
    """What a model is shown that is not to look; every tower scales it to its own size."""
    return Image.from_array(np.zeros((64, 64), np.uint8))
