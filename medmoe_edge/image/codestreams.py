"""Compressed pictures as DICOM holds them: read by their own headers, and whole or refused.

JPEG (ITU-T T.81: baseline, extended, progressive and lossless), JPEG-LS (T.87) and JPEG 2000 with
its high throughput (T.800, T.814). Decoders make up what is missing: libjpeg reads zeros after the
end of the data and goes on. So what a codestream says of itself is read first, and a JPEG picture
is decoded with different bytes behind its data: a whole one does not depend on them.
"""

import dataclasses
import logging
import math
import re
import struct
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import ImageError, MissingDependencyError
from medmoe_edge.image.dicom_tables import Say

Kind = Literal["jpeg", "jpeg-ls", "jpeg 2000"]
Colour = Literal["ycc", "rgb"]
Segment = tuple[int, int]
MAX_COMPONENTS = 4
# A picture of more pixels than the first has a byte for so many of them, at least.
MANY_PIXELS, MOST_DENSE = 2**24, 2**12
JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
J2K = b"\xff\x4f\xff\x51"
JPEG = b"\xff\xd8\xff"
HIGH_THROUGHPUT, PREDICTABLE_TERMINATION = 0x40, 0x10  # styles of code blocks (T.800 table A.19)
# OpenJPEG's words for a code block of which bytes are left, or that needed more of them; and how
# many of each there may be: Kakadu cuts its blocks shorter than the standard's coder would.
TERMINATION = re.compile(r"PTERM check failure: (\d+) (remaining|synthesized)")
MOST_LEFT, MOST_MADE_UP = 2, 5
END_OF_IMAGE = END_OF_CODESTREAM = b"\xff\xd9"
SIZ_DEPTHS = 42  # where the components of a JPEG 2000 codestream are described (T.800 A.5.1)
SYCC = 18  # a JP2 file's enumerated colour space: YCbCr (T.800 table I.10)

# A marker in entropy-coded data; JPEG stuffs a zero after 0xFF, JPEG-LS a zero bit.
IN_JPEG = re.compile(rb"\xff+[\x01-\xfe]")
IN_JPEG_LS = re.compile(rb"\xff+[\x80-\xfe]")
# What is put behind each run of entropy-coded data in turn, longer than any one code.
PADS = (b"\0" * 16, b"\x5a\x35" * 8, b"\xb2\x4d\x69" * 6, b"\x93\xe7\x1c" * 6, b"\x2d\x54\xc8" * 6)


@dataclasses.dataclass(frozen=True)
class Codestream:
    """What a compressed picture says of itself.

    `colour` is how its three components are to be read: `ycc`, `rgb`, or None where it does not
    say. `entropy` are the runs of entropy-coded data between markers, per scan; from `start` to
    `end` lie the tiles of JPEG 2000 and all before them, with the bytes `styles` that say how code
    blocks are coded. `ended` tells whether the marker of a
    JPEG picture's end is there.
    """

    kind: Kind
    rows: int
    columns: int
    components: int
    precision: int
    signed: bool = False
    lossless: bool = False
    colour: Colour | None = None
    entropy: tuple[tuple[Segment, ...], ...] = ()
    start: int = 0
    end: int | None = None
    styles: tuple[int, ...] = ()
    ended: bool = True
    progressive: bool = False


def is_codestream(data: bytes) -> bool:
    """Whether data begins as one of these codestreams does."""
    return data.startswith((JPEG, J2K, JP2))


def read_codestream(data: bytes, name: str) -> Codestream:
    """Read a codestream's headers and follow its markers to its end.

    Args:
        data: The codestream of one frame.
        name: What messages call the file.

    Returns:
        What it says of itself.

    Raises:
        ImageError: It is cut off, damaged, or of a kind that is not read.
    """
    try:
        if data.startswith(JPEG):
            return _plausible(_read_jpeg(data, name), len(data), name)
        if data.startswith((J2K, JP2)):
            return _plausible(_read_jpeg2000(data, name), len(data), name)
    except (struct.error, IndexError):
        raise cut_off(name) from None
    raise ImageError(
        f"The compressed picture in {name} is neither JPEG, JPEG-LS nor JPEG 2000.",
        "Export the file again, uncompressed if there is a choice.",
    )


def _plausible(stream: Codestream, size: int, name: str) -> Codestream:
    """Refuse what would take seconds and a gigabyte to decode, to no picture at all."""
    pixels = stream.rows * stream.columns
    if pixels > MANY_PIXELS and pixels > MOST_DENSE * size:
        raise ImageError(
            f"{name} holds {size:,} bytes that unfold to {pixels:,} pixels: no picture does.",
            "Export the file again.",
        )
    return stream


def cut_off(name: str) -> ImageError:
    """The error for a compressed picture that is not whole."""
    return ImageError(
        f"The compressed picture in {name} is cut off or damaged.",
        "Copy or export the file again: what is missing cannot be made up.",
    )


# --- JPEG and JPEG-LS --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The frame header SOFn: `sampling` are the components' factors by identifier."""

    marker: int
    precision: int
    rows: int
    columns: int
    sampling: dict[int, tuple[int, int]]

    @property
    def lossless(self) -> bool:
        return self.marker in (0xFFC3, 0xFFCB, 0xFFF7)

    @property
    def progressive(self) -> bool:
        return self.marker in (0xFFC2, 0xFFCA)

    def completed(self, scan: bytes) -> set[int]:
        """The coefficients that a scan reads to their last bit, by the end of its header.

        They are all of them, but in progressive pictures (T.81 G.1.1.1).
        """
        if not self.progressive:
            return set(range(64))
        first, last, approximation = scan[:3]
        return set() if approximation & 0xF else set(range(first, last + 1))

    def units(self, components: bytes) -> int:
        """How many units, in which restarts are counted, a scan of these has (T.81 A.2)."""
        side = 1 if self.lossless else 8
        most = [max(factors[i] for factors in self.sampling.values()) for i in (0, 1)]
        count = 1
        for size, largest, i in ((self.columns, most[0], 0), (self.rows, most[1], 1)):
            if len(components) == 1:
                own = math.ceil(size * self.sampling[components[0]][i] / largest)
                count *= math.ceil(own / side)
            else:
                count *= math.ceil(size / (side * largest))
        return count


def _read_jpeg(data: bytes, name: str) -> Codestream:
    """Walk the markers (T.81 B.1, B.2); of JPEG-LS, those of T.87 C."""
    at, interval = 2, 0
    scans: list[tuple[Segment, ...]] = []
    frame: _Frame | None = None
    adobe: int | None = None
    jfif = False
    near = 0  # how far from the truth JPEG-LS may be
    missing: dict[int, set[int]] = {}  # coefficients of each component that were not read in full
    while at < len(data):  # some lack the marker of their end, which proves nothing
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        (marker,) = struct.unpack_from(">H", data, at)
        if marker == 0xFFD9:
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if marker < 0xFFC0 or length < 2 or len(body) != length - 2:
            raise cut_off(name)
        at += 2 + length
        if _is_frame(marker):
            if frame is not None:
                raise ImageError(f"{name} holds a hierarchical JPEG picture.", "Save it as PNG.")
            frame = _read_frame(marker, body, name)
            missing = {component: set(range(64)) for component in frame.sampling}
        elif marker == 0xFFDD and len(body) == 2:
            (interval,) = struct.unpack(">H", body)
        elif marker == 0xFFEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        elif marker == 0xFFE0 and body.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xFFDA:
            if frame is None:
                raise cut_off(name)
            runs, at = _read_scan(data, at, frame.marker == 0xFFF7, name)
            components = body[1 : 1 + 2 * body[0] : 2]
            if not components or not set(components) <= set(frame.sampling):
                raise cut_off(name)
            if frame.marker == 0xFFF7:
                near = body[1 + 2 * len(components)]
            # CharLS checks the intervals of JPEG-LS itself
            units = frame.units(components) if frame.marker != 0xFFF7 else 0
            if units and len(runs) != (math.ceil(units / interval) if interval else 1):
                raise cut_off(name)
            scans.append(tuple(runs))
            for component in components:
                missing[component] -= frame.completed(body[1 + 2 * len(components) :])
    if frame is None or not scans or any(missing.values()):
        raise cut_off(name)
    return Codestream(
        "jpeg-ls" if frame.marker == 0xFFF7 else "jpeg",
        frame.rows,
        frame.columns,
        len(frame.sampling),
        frame.precision,
        lossless=frame.lossless and not near,
        colour=_jpeg_colour(frame, adobe, jfif),
        entropy=tuple(scans),
        ended=at < len(data),
        progressive=frame.progressive,
    )


def _is_frame(marker: int) -> bool:
    return marker == 0xFFF7 or (0xFFC0 <= marker <= 0xFFCF and marker & 0xF not in (4, 8, 12))


def _read_frame(marker: int, body: bytes, name: str) -> _Frame:
    precision, rows, columns, components = struct.unpack_from(">BHHB", body)
    sampling = {
        body[at]: (body[at + 1] >> 4, body[at + 1] & 15) for at in range(6, 6 + 3 * components, 3)
    }
    factors = [factor for pair in sampling.values() for factor in pair]
    if len(body) != 6 + 3 * components or len(sampling) != components or not components:
        raise cut_off(name)
    if not all(1 <= factor <= 4 for factor in factors):
        raise cut_off(name)
    return _Frame(marker, precision, rows, columns, sampling)


def _read_scan(data: bytes, at: int, is_ls: bool, name: str) -> tuple[list[Segment], int]:
    """The runs of entropy-coded data from `at`, and the place of the marker that ends them."""
    pattern = IN_JPEG_LS if is_ls else IN_JPEG
    runs: list[Segment] = []
    while True:
        found = pattern.search(data, at)
        if found is None and is_ls:
            raise cut_off(name)
        if found is None:
            runs.append((at, len(data)))
            return runs, len(data)
        runs.append((at, found.start()))
        marker = data[found.end() - 1]
        if not 0xD0 <= marker <= 0xD7:
            return runs, found.end() - 2
        if marker != 0xD0 + (len(runs) - 1) % 8:
            raise cut_off(name)
        at = found.end()


def _jpeg_colour(frame: _Frame, adobe: int | None, jfif: bool) -> Colour | None:
    """How three components are to be read, where the codestream says so.

    Adobe's marker says it outright and JFIF knows YCbCr only; components called R, G and B are
    those, and none but YCbCr is subsampled. JPEG-LS and lossless JPEG transform no colours.
    """
    if len(frame.sampling) != 3 or frame.lossless:
        return None
    if len(set(frame.sampling.values())) > 1:
        return "ycc"
    if adobe is not None:
        return "ycc" if adobe == 1 else "rgb"
    if bytes(frame.sampling) == b"RGB":
        return "rgb"
    return "ycc" if jfif else None


# --- JPEG 2000 ---------------------------------------------------------------


def _read_jpeg2000(data: bytes, name: str) -> Codestream:
    """The main header (T.800 A.5, A.6), and the tile-parts up to the end."""
    start, colour = _in_boxes(data, name) if data.startswith(JP2) else (0, None)
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = (
        struct.unpack_from(">8IH", data, start + 8)
    )
    first = start + SIZ_DEPTHS
    depths = {data[first + 3 * i] for i in range(components)}
    steps = [data[first + 3 * i + 1 : first + 3 * i + 3] for i in range(components)]
    if not (tile_width and tile_height and right > left and bottom > top and components):
        raise cut_off(name)
    if len(depths) != 1:
        raise ImageError(
            f"{name} holds a JPEG 2000 picture whose colours differ in depth.", "Save it as PNG."
        )
    tiles = math.ceil((right - tile_left) / tile_width) * math.ceil(
        (bottom - tile_top) / tile_height
    )
    colours, lossless, styles, end = _follow_tiles(data, start, tiles, components, name)
    if components == 3 and colour is None:
        colour = "rgb" if colours else "ycc" if len(set(steps)) > 1 else None
    (depth,) = depths
    return Codestream(
        "jpeg 2000",
        bottom - top,
        right - left,
        components,
        (depth & 0x7F) + 1,
        signed=depth >= 0x80,
        lossless=lossless,
        colour=colour,
        start=start,
        end=end,
        styles=styles,
    )


def _in_boxes(data: bytes, name: str) -> tuple[int, Colour | None]:
    """Where a JP2 file's codestream begins, and whether it is said to be YCbCr (T.800 I)."""
    colour: Colour | None = None
    at, ends = 0, [len(data)]
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        if kind == b"jp2c":
            return body, colour
        if kind == b"jp2h":  # a box of boxes
            at, ends = body, [*ends, at + length]
            continue
        if kind == b"colr" and data[body] == 1:
            (space,) = struct.unpack_from(">I", data, body + 3)
            colour = "ycc" if space == SYCC else colour
        if length < 8:
            break
        at += length
    raise cut_off(name)


def _follow_tiles(
    data: bytes, start: int, tiles: int, components: int, name: str
) -> tuple[bool, bool, tuple[int, ...], int]:
    """What COD and COC say of the transforms and the coding, and where the tiles end.

    That is whether colours are transformed, whether values are so reversibly, where the styles of
    code blocks stand, and the tiles' end. Raises `ImageError` where a tile is not there, or not
    whole.
    """
    at, seen = start + 2, set()
    colours = lossless = False
    styles: list[int] = []
    while True:
        marker, length = struct.unpack_from(">HH", data, at)
        if marker == 0xFF90:  # SOT: its tile, the length of the tile-part
            tile, size = struct.unpack_from(">HI", data, at + 4)
            seen.add(tile)
            if size == 0:  # the last one reaches to the end of the codestream
                at = len(data)
                break
            if size < 14 or at + size > len(data):
                raise cut_off(name)
            at += size
            if at + 2 > len(data) or data[at : at + 2] == b"\xff\xd9":
                break
        elif marker == 0xFFD9 or length < 2 or marker < 0xFF00:
            raise cut_off(name)
        else:
            if marker == 0xFF52:  # COD: colour transform, and 1 for the reversible wavelet
                colours, lossless = data[at + 8] == 1, data[at + 13] == 1
                styles.append(at + 12 - start)
            elif marker == 0xFF53:  # COC, the same of one component
                styles.append(at + (9 if components < 257 else 10) - start)
            at += 2 + length
    if len(seen) != tiles:
        raise cut_off(name)
    return colours, lossless, tuple(styles), at


# --- Decoding ----------------------------------------------------------------


def decode(
    data: bytes, stream: Codestream, colour: str | None, exact: bool, name: str, say: Say
) -> npt.NDArray[Any]:
    """Decode a codestream, of which `stream` is what `read_codestream` says.

    `colour` is how the file's header has three components read, `ycc` or `rgb`, where the
    codestream does not say; with `exact` the file's transfer syntax allows no loss.

    Returns integers [H, W] or [H, W, C]; three components of a JPEG or JPEG 2000 picture are RGB,
    and those of JPEG-LS and lossless JPEG as they are. Raises `ImageError` where it is not whole,
    or of a kind that is not read, and `MissingDependencyError` where the decoders are not
    installed.
    """
    codecs = _codecs()
    try:
        if stream.kind == "jpeg-ls":
            return np.asarray(codecs.jpegls_decode(data))
        if stream.kind == "jpeg 2000":
            return _decode_jpeg2000(codecs, data, stream, exact, say)
        return _decode_jpeg(codecs, data, stream, colour, name, say)
    except (codecs.JpeglsError, codecs.Jpeg2kError, codecs.Jpeg8Error):
        raise cut_off(name) from None
    except NotImplementedError:
        raise ImageError(
            f"The compressed picture in {name} is of a variant that is not read.",
            "Export the file again uncompressed, or save the picture as PNG.",
        ) from None


def _codecs() -> Any:
    try:
        import imagecodecs
    except ImportError:
        raise MissingDependencyError("imagecodecs", "images") from None
    return imagecodecs


def _decode_jpeg(
    codecs: Any, data: bytes, stream: Codestream, colour: str | None, name: str, say: Say
) -> npt.NDArray[Any]:
    """Decode a JPEG picture, and see that it needs all of its data and nothing beyond."""
    options = {}
    if stream.components == 3:
        is_ycc = (stream.colour or colour) == "ycc" and not stream.lossless
        space = "YCBCR" if is_ycc else "RGB"
        options = {"colorspace": space, "outcolorspace": "RGB"}

    def decoded(pad: bytes, unused: int = 0) -> npt.NDArray[Any]:
        return np.asarray(codecs.jpeg8_decode(_padded(data, stream, pad, unused), **options))

    if not stream.ended:
        say("may_be_damaged", "The compressed picture lacks its end: it may be damaged.")
    picture = decoded(PADS[0])
    if not np.array_equal(picture, decoded(PADS[1])):
        raise cut_off(name)
    if int(picture.max()) >> stream.precision:  # a wrong difference, carried on
        raise cut_off(name)
    if stream.progressive or picture.min() == picture.max():  # where any data may look the same
        return picture
    if all(np.array_equal(picture, decoded(pad, 1)) for pad in PADS[1:]):
        say(
            "may_be_damaged",
            "The compressed picture ends before its data does: it may be damaged.",
        )
    return picture


def _padded(data: bytes, stream: Codestream, pad: bytes, unused: int) -> bytes:
    """The codestream with bytes put behind all entropy-coded data, without so many at its end."""
    parts, at = [], 0
    runs = [run for scan in stream.entropy for run in scan]
    for start, end in runs:
        stop = end - unused if (start, end) == runs[-1] else end
        if stop < end and data[stop - 1 : stop] == b"\xff":  # not between 0xFF and its zero
            stop -= 1
        parts += [data[at : max(start, stop)], pad]
        at = end
    return b"".join([*parts, data[at:], END_OF_IMAGE])


def _decode_jpeg2000(
    codecs: Any, data: bytes, stream: Codestream, exact: bool, say: Say
) -> npt.NDArray[Any]:
    """Decode a JPEG 2000 picture, and see that code blocks and values end where they should.

    The codestream is made to say that code blocks end predictably (T.800 D.4.2), which changes
    nothing but that OpenJPEG looks whether they do: a block that was damaged does not, and other
    encoders' blocks do within a few bytes.

    OpenJPEG also cuts off what leaves the range of values. So a codestream without loss is made to
    say that its values are signed and have more bits: then nothing is cut off, nor is the middle of
    the range added (T.800 G.1). What is lossy leaves its range by up to a half where there is text,
    and tells nothing by it.
    """
    patched = bytearray(data[stream.start : stream.end] + END_OF_CODESTREAM)  # which some lack
    for at in stream.styles:
        if not patched[at] & HIGH_THROUGHPUT:
            patched[at] |= PREDICTABLE_TERMINATION
    exact = exact and stream.lossless
    for component in range(stream.components if exact else 0):
        patched[SIZ_DEPTHS + 3 * component] = 0x80 | max(15, stream.precision + 3)
    complaints = _Complaints()
    logger = logging.getLogger("imagecodecs")
    logger.addFilter(complaints)
    try:
        values = np.asarray(codecs.jpeg2k_decode(bytes(patched), planar=False, verbose=2))
    finally:
        logger.removeFilter(complaints)
    if complaints.serious:
        say("may_be_damaged", "Parts of the compressed picture end too early or too late.")
    if not exact:
        return values
    half = 1 << stream.precision - 1
    if int(values.min()) < -half or int(values.max()) >= half:
        say(
            "may_be_damaged",
            "The compressed picture leaves its range of values: it may be damaged.",
        )
    values = np.clip(values, -half, half - 1)
    if stream.signed:
        return np.asarray(values, np.int16 if stream.precision <= 16 else None)
    return np.asarray(values + half, np.min_scalar_type(2 * half - 1))


class _Complaints(logging.Filter):
    """Takes OpenJPEG's warnings out of the log, and remembers whether any of them is serious."""

    serious = False

    def filter(self, record: logging.LogRecord) -> bool:
        found = TERMINATION.search(record.getMessage())
        if found:
            limit = MOST_LEFT if found[2] == "remaining" else MOST_MADE_UP
            self.serious |= int(found[1]) > limit
        return False
