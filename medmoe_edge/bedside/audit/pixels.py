"""What lies beside the values of pixels: overlays in unused bits, bytes behind them, comments.

None of it is shown by most viewers, and all of it may tell of a patient. The values stay as they
are.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.tag import Tag
from pydicom.uid import JPEG2000TransferSyntaxes, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes

from medmoe_edge.errors import ImageError

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
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated and _hides_overlays(dataset):
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


def _hides_overlays(dataset: Dataset) -> bool:
    """Whether there are overlays whose data is not in an attribute of its own (PS3.3 C.9.2)."""
    return any(
        Tag(group, 0x0100) in dataset and Tag(group, 0x3000) not in dataset for group in OVERLAYS
    )


def _clean_values(dataset: Dataset) -> None:
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    high = int(dataset.get("HighBit", stored - 1))
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel) * frames
    if str(dataset.PhotometricInterpretation) == "YBR_FULL_422":
        samples = samples * 2 // 3
    size = (samples * allocated + 7) // 8
    data = dataset.PixelData[: size + size % 2]  # in words, the last byte may be before the filler
    if allocated in (8, 16, 32) and stored < allocated and stored - 1 <= high < allocated:
        width = allocated // 8
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        values = np.frombuffer(data[: len(data) // width * width], f"{order}u{width}")
        data = _masked(values, stored, high, signed=bool(dataset.get("PixelRepresentation")))
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
    count = int(dataset.get("NumberOfFrames") or 1)
    starts, lengths = (dataset.get(f"ExtendedOffsetTable{part}") for part in ("", "Lengths"))
    tables = None if starts is None or lengths is None else (starts, lengths)
    data = dataset.PixelData
    try:
        frames = list(generate_frames(data, number_of_frames=count, extended_offsets=tables))
    except Exception as error:  # pydicom raises nearly anything on odd fragments
        raise ImageError(
            "The frames of the compressed picture cannot be told apart, nor what is written beside "
            "them.",
            "Save it uncompressed first.",
        ) from error
    cleaned = [_without_comments(frame) for frame in frames]
    if cleaned == frames:
        return
    for part in ("", "Lengths"):
        dataset.pop(f"ExtendedOffsetTable{part}", None)
    has_table = sum(map(len, cleaned)) < LARGEST - 16 * len(cleaned)
    dataset.PixelData = encapsulate(cleaned, has_bot=has_table)


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
