"""What lies beside the values of pixels: overlays in their unused bits, bytes behind them, comments.

None of it is shown by most viewers, and all of it may tell of a patient. The values stay as they are.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.tag import Tag

from medmoe_edge.errors import ImageError

OVERLAYS = range(0x6000, 0x6100, 2)
SOI, JPEG_LS, SOS = b"\xff\xd8", 0xF7, 0xDA
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment, ITU-T T.81 table B.1
COMMENT = 0xFE
# Application segments, T.81 B.2.4.6: those of JFIF, of SPIFF and JPEG-LS colours, and of Adobe say
# how the picture is to be decoded; the others hold descriptions.
APPLICATION, NEEDED = range(0xE0, 0xF0), {0xE0, 0xE8, 0xEE}
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
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        _clean_frames(dataset)
    else:
        _clean_values(dataset)


def _hides_overlays(dataset: Dataset) -> bool:
    """Whether there are overlays whose data is not in an attribute of its own (PS3.3 C.9.2)."""
    return any(
        Tag(group, 0x0100) in dataset and Tag(group, 0x3000) not in dataset for group in OVERLAYS
    )


def _clean_values(dataset: Dataset) -> None:
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel) * frames
    if str(dataset.PhotometricInterpretation) == "YBR_FULL_422":
        samples = samples * 2 // 3
    size = (samples * allocated + 7) // 8
    data = dataset.PixelData[:size]
    if allocated in (8, 16, 32) and stored < allocated:
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        values = np.frombuffer(
            data[: len(data) // (allocated // 8) * (allocated // 8)], f"{order}u{allocated // 8}"
        )
        data = _masked(values, stored, int(dataset.HighBit), bool(dataset.PixelRepresentation))
    dataset.PixelData = data + b"\0" * (len(data) % 2)


def _masked(values: npt.NDArray[np.unsignedinteger], stored: int, high: int, signed: bool) -> bytes:
    """The values with all bits 0 that are not theirs; above negative ones 1, as many readers need."""
    low = high - stored + 1
    bits = values.dtype.itemsize * 8
    own = ((1 << stored) - 1) << low
    cleared = values & values.dtype.type(own)
    if signed:
        above = ((1 << bits) - 1) ^ ((1 << (high + 1)) - 1)
        negative = (values >> values.dtype.type(high)) & 1 == 1
        cleared = np.where(negative, cleared | values.dtype.type(above), cleared)
    return cleared.astype(values.dtype).tobytes()


def _clean_frames(dataset: Dataset) -> None:
    count = int(dataset.get("NumberOfFrames") or 1)
    extended = [dataset.get(f"ExtendedOffsetTable{part}") for part in ("", "Lengths")]
    tables = None if None in extended else tuple(extended)
    frames = list(
        generate_frames(dataset.PixelData, number_of_frames=count, extended_offsets=tables)
    )
    cleaned = [_without_comments(frame) for frame in frames]
    if cleaned == frames:
        return
    for part in ("", "Lengths"):
        dataset.pop(f"ExtendedOffsetTable{part}", None)
    has_table = sum(map(len, cleaned)) < LARGEST - 8 * len(cleaned)
    dataset.PixelData = encapsulate(cleaned, has_bot=has_table)


def _without_comments(frame: bytes) -> bytes:
    """A JPEG or JPEG-LS codestream without its comments; any other as it is."""
    if not frame.startswith(SOI):
        return frame
    return SOI + b"".join(
        frame[start:end]
        for marker, start, end in _segments(frame)
        if marker != COMMENT and (marker not in APPLICATION or marker in NEEDED)
    )


def _segments(frame: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment; the last one is the first scan, and all behind it."""
    at = len(SOI)
    while at + 4 <= len(frame):
        if frame[at] != 0xFF:
            break
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == SOS:
            break
        end = at + 2 if marker in ALONE else at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
        yield marker, at, min(end, len(frame))
        at = end
    if at < len(frame):
        yield SOS, at, len(frame)
