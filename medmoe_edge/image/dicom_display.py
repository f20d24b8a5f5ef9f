"""What a DICOM viewer shows of stored values: 0..255, grey or RGB.

Grey: modality LUT or rescale -> VOI LUT or window, MONOCHROME1 turned over (PS3.4 annex N.2). A
file without a window shows 8-bit values as they are, a CT its soft tissue, and everything else
its 1st to 99th percentile.
"""

import math

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
)

from medmoe_edge.errors import ImageError
from medmoe_edge.image.loading import Pixels, Window, finite, show_percentiles

GREY = ("MONOCHROME1", "MONOCHROME2")
SOFT_TISSUE: Window = (40.0, 400.0)  # centre and width in HU
MAX_PALETTE = 2**16  # entries of a lookup table


def show(
    stored: npt.NDArray[np.generic], dataset: Dataset, name: str
) -> tuple[Pixels, Window | None]:
    """Stored values [H, W] or [H, W, 3] as uint8 of that shape (RGB for a palette); the window."""
    if dataset.PhotometricInterpretation in GREY:
        pixels, window = _show_grey(stored, dataset)
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        return 255 - pixels if inverted else pixels, window
    if dataset.PhotometricInterpretation != "PALETTE COLOR":
        return _scaled(stored, int(dataset.BitsStored)), None
    _check_palette(dataset, name)
    colours = apply_color_lut(stored, dataset)[..., :3]
    return _scaled(colours, 8 * colours.dtype.itemsize), None


def _check_palette(dataset: Dataset, name: str) -> None:
    """Refuse a segmented table that unfolds without end: four bytes may stand for 65,535 entries.

    A segment is an opcode, a length and its values (DICOM PS3.3 C.7.9.2): 0 lists them, 1 draws a
    line to its one value. Indirect segments, opcode 2, are not read.
    """
    dtype = np.dtype("u1" if dataset.RedPaletteColorLookupTableDescriptor[2] == 8 else "u2")
    if not dataset.file_meta.TransferSyntaxUID.is_little_endian:
        dtype = dtype.newbyteorder(">")
    for colour in ("Red", "Green", "Blue", "Alpha"):
        data = dataset.get(f"Segmented{colour}PaletteColorLookupTableData") or b""
        table = np.frombuffer(data[: 8 * MAX_PALETTE], dtype).tolist()
        at = entries = 0
        while at + 1 < len(table) and entries <= MAX_PALETTE:
            opcode, length = table[at : at + 2]
            entries += length if opcode in (0, 1) else MAX_PALETTE + 1
            at += 3 if opcode else 2 + length
        if entries > MAX_PALETTE or len(data) > 8 * MAX_PALETTE:
            raise ImageError(f"{name} has an unsupported colour table.", "Save it as RGB or PNG.")


def _show_grey(stored: npt.NDArray[np.generic], dataset: Dataset) -> tuple[Pixels, Window | None]:
    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        depth = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return _scaled(apply_voi(values, dataset), depth), None
    window = _file_window(dataset)
    bits = int(dataset.get("BitsStored", 32))
    if window is None and bits <= 8 and values is stored:  # already made for a screen
        return _scaled(stored, bits), None
    if window is None and dataset.get("Modality") == "CT":
        window = SOFT_TISSUE
    if window is None:
        return show_percentiles(values)
    return _windowed(finite(values), window, str(dataset.get("VOILUTFunction") or "LINEAR")), window


def _file_window(dataset: Dataset) -> Window | None:
    """The first window of the file, if it is one."""
    centre, width = (numbers_of(dataset.get(f"Window{part}"))[:1] for part in ("Center", "Width"))
    return (centre[0], width[0]) if centre and width and width[0] >= 1 else None


def _windowed(values: npt.NDArray[np.float64], window: Window, function: str) -> Pixels:
    # pydicom's output range is that of these attributes: here 0..255.
    attributes = Dataset()
    attributes.PhotometricInterpretation = "MONOCHROME2"
    attributes.BitsStored = 8
    attributes.PixelRepresentation = 0
    attributes.VOILUTFunction = function
    attributes.WindowCenter, attributes.WindowWidth = window
    shown: npt.NDArray[np.float64] = apply_windowing(values, attributes)
    return np.rint(np.clip(shown, 0, 255)).astype(np.uint8)


def _scaled(values: npt.NDArray[np.generic], bits: int) -> Pixels:
    """Values of so many bits, their whole range on 0..255."""
    if bits == 8 and values.dtype == np.uint8:
        return np.asarray(values, np.uint8)
    shown: npt.NDArray[np.float64] = np.clip(finite(values) * (255 / (2**bits - 1)), 0, 255)
    return np.rint(shown).astype(np.uint8)


def numbers_of(value: object) -> list[float]:
    """An attribute of one or several decimal strings; empty if any is missing or no number."""
    values = np.atleast_1d(np.asarray(value, object))
    try:
        numbers = [float(item) for item in values]
    except (TypeError, ValueError):
        return []
    return numbers if all(map(math.isfinite, numbers)) else []
