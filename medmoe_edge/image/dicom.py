"""DICOM: one frame of a file, decoded; `image_dicom_display` makes it visible.

No value of the file reaches a message: it may be about a patient.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.tag import BaseTag

from medmoe_edge.errors import ImageError, MissingDependencyError
from medmoe_edge.image.dicom_display import GREY, numbers_of, show
from medmoe_edge.image.loading import (
    MAX_BYTES,
    Image,
    as_pixels,
    check_size,
    pick_frame,
    shown_name,
)

MODALITIES = {
    "CT": "ct",
    "MR": "mri",
    **dict.fromkeys(("CR", "DX", "DR", "RG", "XA", "MG"), "xray"),
    "US": "ultrasound",
    **dict.fromkeys(("SM", "GM"), "pathology"),
    "OP": "fundus",
}
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")  # pydicom decodes all to RGB

# What an enhanced multi-frame object says frame by frame, or once for all frames.
FRAME_GROUPS = ("PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence")


def read_dicom(path: Path, frame: int | None) -> Image:
    """Read one frame; the errors of `image.loading.load_image`, and whatever pydicom raises."""
    name = shown_name(path)
    dataset = open_dataset(path, name)
    if not any(f"{kind}PixelData" in dataset for kind in ("", "Float", "DoubleFloat")):
        raise ImageError(
            f"{name} is a DICOM file without an image.",
            "Give a file of an image series; if this is one, it was cut off: copy it again.",
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    _check_header(dataset, name, frames)
    index = pick_frame(name, frame, frames)
    stored = decode_frame(dataset, name, index, frames)
    unfold_frame(dataset, index)
    pixels, window = show(stored, dataset, name)
    return Image(
        as_pixels(pixels),
        MODALITIES.get(str(dataset.get("Modality"))),
        window,
        _spacing(dataset),
        frames,
    )


def open_dataset(path: Path, name: str) -> Dataset:
    """The file's elements; raises `ImageError` naming it `name`, and whatever pydicom raises."""
    if path.stat().st_size > MAX_BYTES:
        raise ImageError(f"{name} is larger than {MAX_BYTES:,} bytes.", "Split the series.")
    with path.open("rb") as file:
        file.seek(132)
        meta = read_dataset(file, False, True, stop_when=_is_past_meta)
        if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
            dataset: Dataset = dcmread(path, force=True)  # old files lack the preamble
            return _with_transfer_syntax(dataset)
        # pydicom would inflate without a limit.
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(file.read(), MAX_BYTES)
    if inflater.unconsumed_tail:
        raise ImageError(f"{name} inflates to more than {MAX_BYTES:,} bytes.", "Split the series.")
    dataset = read_dataset(io.BytesIO(data), False, True)
    dataset.set_original_encoding(False, True)
    return _with_transfer_syntax(dataset)


def _is_past_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group != 2


def _with_transfer_syntax(dataset: Dataset) -> Dataset:
    """Say how uncompressed pixels lie where the file's header does not."""
    meta = getattr(dataset, "file_meta", FileMetaDataset())
    if "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        native = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else native
    dataset.file_meta = meta
    return dataset


def _check_header(dataset: Dataset, name: str, frames: int) -> None:
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    check_size(name, rows, columns)
    bits = int(dataset.BitsAllocated) * int(dataset.SamplesPerPixel)
    if frames * rows * columns * bits > 8 * MAX_BYTES:
        raise ImageError(
            f"{name} holds {frames} frames of {columns} x {rows} pixels, more than the limit of "
            f"{MAX_BYTES:,} bytes.",
            "Split the series.",
        )
    if dataset.PhotometricInterpretation not in (*GREY, *COLOUR, "PALETTE COLOR"):
        raise ImageError(f"{name} has colours of an unsupported kind.", "Save it as RGB or PNG.")


def decode_frame(dataset: Dataset, name: str, index: int, frames: int) -> npt.NDArray[np.generic]:
    """Stored values of a frame, `[H, W]` or `[H, W, 3]`; the errors of `open_dataset`."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return pixel_array(dataset, index=index)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(
            f"{name} is compressed in an unsupported way.", "Save it uncompressed or as PNG."
        ) from None
    _check_codestream(get_frame(dataset.PixelData, index, number_of_frames=frames), dataset, name)
    # The RLE plugin's panics are no Exceptions; pydicom's own decoder needs no plugin at all.
    plugin = "pydicom" if syntax == uid.RLELossless else ""
    try:
        return pixel_array(dataset, index=index, decoding_plugin=plugin)
    except RuntimeError:
        if "pylibjpeg" not in decoder.available_plugins:
            raise MissingDependencyError("pylibjpeg", "images") from None
        raise


def _check_codestream(data: bytes, dataset: Dataset, name: str) -> None:
    """Refuse a compressed picture of another size than the header's, before it is decoded."""
    size = jpeg_size(data)
    if size is not None and size != (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel):
        raise ImageError(
            f"{name} holds a compressed picture of another size than it says.",
            "Export the file again.",
        )


def jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components of a JPEG, JPEG-LS or JPEG 2000 picture; None if it is neither.

    The frame header SOFn of ITU-T T.81 B.2.2 (JPEG-LS: SOF55), the segment SIZ of T.800 A.5.1.
    """
    start = data.find(b"\xff\x4f\xff\x51")  # SOC and SIZ; a JP2 file wraps them in boxes
    if start >= 0 and not data.startswith(b"\xff\xd8"):
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        return bottom - top, right - left, *struct.unpack_from(">H", data, start + 40)
    if not data.startswith(b"\xff\xd8"):
        return None
    at = 2
    while True:
        marker, length = struct.unpack_from(">HH", data, at)
        if marker == 0xFFFF:  # a fill byte
            at += 1
        elif marker == 0xFFF7 or (0xFFC0 <= marker <= 0xFFCF and marker & 0xF not in (4, 8, 12)):
            return struct.unpack_from(">HHB", data, at + 5)
        else:
            at += 2 + length


def unfold_frame(dataset: Dataset, index: int) -> None:
    """Bring a frame's own rescale, window and spacing to the top, where plain files have them."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    each = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*shared[:1], *each[index : index + 1]):
        for name in FRAME_GROUPS:
            for item in groups.get(name) or []:
                dataset.update(item)


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    numbers = numbers_of(dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing"))
    if len(numbers) != 2 or min(numbers) <= 0:
        return None
    return numbers[0], numbers[1]
