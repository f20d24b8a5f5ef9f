"""Stored values: one frame's cells or codestream, brought to the values that a header describes.

PS3.3 C.7.6.3 and PS3.5 8 and annex A. Only the wanted frame is read. Uncompressed cells are taken
apart by bits allocated, bits stored, high bit and sign, so that whatever lies in unused bits
(overlays, mostly) never reaches a value. Of compressed frames the codestream decides: its size must
be the header's, while its depth, its components and its colours are believed over it.
"""

import dataclasses
import io
import math
import zlib
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydicom import uid

from medmoe_edge.errors import ImageError
from medmoe_edge.image.codestreams import (
    MAX_COMPONENTS,
    Codestream,
    cut_off,
    decode,
    is_codestream,
    read_codestream,
)
from medmoe_edge.image.dicom_container import (
    GE_BIG_ENDIAN_PIXELS,
    PixelElement,
    read_at,
    read_codestream_of,
    read_rle,
)
from medmoe_edge.image.dicom_tables import Header, Say
from medmoe_edge.image.pixels import check_size

Values = npt.NDArray[Any]
Colour = Literal["grey", "palette", "rgb"]
GREY = ("MONOCHROME1", "MONOCHROME2")
YBR = ("YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "YBR_PARTIAL_420", "YBR_PARTIAL_422")
MAX_FRAMES = 10_000_000
OVERSHOOT = 1.0625  # what a lossy codestream may exceed its range by
MAX_FRAME_BYTES = 2**30  # of one frame, decoded
EXACT = (uid.JPEG2000Lossless, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL)
CODESTREAMS = {  # compressions that `codestreams` reads
    *(uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1),
    *(uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000),
    *(uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
}
DEFLATED_FRAMES, UNCOMPRESSED_FRAMES = "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.1.98"
VIDEO = ("1.2.840.10008.1.2.4.10",)  # and MPEG2, MPEG-4, HEVC: their UIDs begin alike


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the header says of a frame's cells."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    photometric: str
    planar: bool
    frames: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """One frame: integers or floats [H, W], or colours [H, W, 3] of `bits` bits."""

    values: Values
    bits: int
    signed: bool
    colour: Colour

    @property
    def is_whole(self) -> bool:
        """Whether these are integers of at most 16 bits."""
        return self.values.dtype.kind in "iub" and self.bits <= 16

    @property
    def domain(self) -> tuple[int, int]:
        """The least and the greatest value that so many bits hold."""
        half = 1 << self.bits - 1
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)


def read_layout(header: Header, kind: str, name: str, most_pixels: int, say: Say) -> Layout:
    """What the header says of its frames; what it does not say follows from the rest.

    Raises:
        ImageError: It says too little or contradicts itself.
    """
    rows, columns = header.whole("Rows") or 0, header.whole("Columns") or 0
    check_size(name, rows, columns, most_pixels)
    samples = header.whole("SamplesPerPixel") or 1
    photometric = header.text("PhotometricInterpretation").replace(" ", "_")
    if not photometric:
        photometric = "MONOCHROME2" if samples == 1 else "RGB"
        say("header", "The file does not say how its values are shown: read as grey or as RGB.")
    if photometric.startswith("PALETTE"):
        photometric = "PALETTE COLOR"
    elif photometric.startswith("MONOCHROME"):
        photometric = f"MONOCHROME{photometric[-1]}"
    floats = {"float32": 32, "float64": 64}.get(kind)
    allocated = floats or header.whole("BitsAllocated") or 0
    stored = floats or header.whole("BitsStored") or allocated
    high = header.whole("HighBit")
    if not 1 <= samples <= MAX_COMPONENTS or not 1 <= allocated <= 64:
        raise ImageError(
            f"The header of {name} does not say how its pixels are stored.",
            "Export the file again, or save the picture as PNG.",
        )
    if stored > allocated:
        say("header", "The file states more bits than it allocates: read at those allocated.")
        stored = allocated
    signed = header.whole("PixelRepresentation") == 1
    if signed and samples > 1:
        say("header", "The file states signed colours: they are read as colours are, unsigned.")
    if high is None or not stored - 1 <= high < allocated or floats:
        if high is not None and not floats and high != (header.whole("BitsStored") or 0) - 1:
            say("header", "The file states a high bit that cannot be: read at the lowest bits.")
        high = stored - 1
    return Layout(
        rows,
        columns,
        samples,
        allocated,
        stored,
        high,
        signed=signed and samples == 1,
        photometric=photometric,
        planar=header.whole("PlanarConfiguration") == 1,
        frames=min(max(header.whole("NumberOfFrames") or 1, 1), MAX_FRAMES),
    )


def read_frame(element: PixelElement, syntax: uid.UID | None, layout: Layout, index: int) -> Stored:
    """The stored values of one frame, from 0, of the pixels that `layout` describes.

    Raises `ImageError` where the frame is not whole, or of a kind that is not read.
    """
    name, say = element.name, element.say
    if layout.rows * layout.columns * layout.samples * layout.allocated > 8 * MAX_FRAME_BYTES:
        raise ImageError(
            f"One frame of {name} takes more than the limit of {MAX_FRAME_BYTES:,} bytes.",
            "Shrink it or crop it first.",
        )
    if element.length is not None and not element.is_encapsulated():
        if syntax is not None and not (syntax.is_transfer_syntax or syntax == GE_BIG_ENDIAN_PIXELS):
            say("transfer_syntax", "The file states no known transfer syntax: read as it looks.")
        elif syntax is not None and syntax != GE_BIG_ENDIAN_PIXELS and syntax.is_encapsulated:
            say("transfer_syntax", "The file states a compression that its pixels do not have.")
        return _read_cells(element, layout, index)
    data = read_codestream_of(element, layout.frames, index)
    if is_codestream(data):
        return _decode_frame(data, layout, syntax in EXACT, name, say)
    if syntax == uid.RLELossless:
        planes = read_rle(data, layout.rows * layout.columns, layout.samples, name, say)
        return _of_planes(planes, layout, name)
    if syntax == DEFLATED_FRAMES:
        return _inflate_frame(data, element, layout)
    if syntax == UNCOMPRESSED_FRAMES:
        return _read_plain_frame(data, element, layout)
    raise _unknown_compression(syntax, name)


def can_decode(syntax: uid.UID) -> bool:
    """Whether frames of a compression are decoded here: all but RLE need the extra `images`."""
    return syntax == uid.RLELossless or (syntax in CODESTREAMS and bool(find_spec("imagecodecs")))


def _unknown_compression(syntax: uid.UID | None, name: str) -> ImageError:
    if syntax is not None and syntax.startswith(VIDEO):
        return ImageError(f"{name} is a video.", "Export the wanted frame as a picture.")
    if syntax in (
        *(*uid.JPEGTransferSyntaxes, *uid.JPEG2000TransferSyntaxes),
        *uid.JPEGLSTransferSyntaxes,
    ):
        return cut_off(name)
    return ImageError(
        f"{name} is compressed in an unsupported way.", "Save it uncompressed or as PNG."
    )


# --- Uncompressed ------------------------------------------------------------


def _read_cells(element: PixelElement, layout: Layout, index: int) -> Stored:
    """Read one frame's cells, and take the values out of them (PS3.5 8.1)."""
    pixels = layout.rows * layout.columns
    subsampled = layout.photometric in ("YBR_FULL_422", "YBR_PARTIAL_422") and layout.samples == 3
    bits = pixels * layout.samples * layout.allocated
    length = element.length or 0
    if subsampled and length < math.ceil(bits * layout.frames / 8):
        bits = pixels * 2 * layout.allocated
    elif subsampled:
        element.say("header", "The file states shared colours, and holds those of every pixel.")
        subsampled = False
    whole = math.ceil(bits * layout.frames / 8)
    first, last = bits * index // 8, math.ceil(bits * (index + 1) / 8)
    if length > whole + 1:
        element.say("unused_data", "The file holds more pixel data than its frames need.")
    swapped = element.words and not element.little and layout.allocated <= 8
    data = (_read_swapped if swapped else _read_plain)(element, first, last)
    # what is left of colours that were not shared: at least a row of them, and seldom zeros
    is_cut_off = subsampled and 8 * (length - whole) >= bits // layout.rows
    if is_cut_off:
        more = read_at(element.file, element.start + whole, min(length - whole, bits // 8))
        is_cut_off = any(more)
    if is_cut_off or length < whole or len(data) < last - first:
        raise ImageError(
            f"{element.name} holds fewer pixels than its header states.",
            "It was probably cut off: copy or export the file again.",
        )
    cells = _cells(data, bits * index % 8, bits, element.kind, layout, element.little)
    if subsampled:
        cells = _upsampled(cells, layout)
    elif layout.samples > 1:
        shape = (layout.samples, layout.rows, layout.columns)
        cells = (
            cells.reshape(shape).transpose(1, 2, 0)
            if layout.planar
            else cells.reshape(*shape[1:], layout.samples)
        )
    else:
        cells = cells.reshape(layout.rows, layout.columns)
    if element.kind != "integer":
        return Stored(cells, layout.allocated, True, "grey")
    values = _values(cells, layout.stored, layout.high, layout.signed)
    return _coloured(values, layout.stored, layout.signed, layout, element.name)


def _read_plain(element: PixelElement, first: int, last: int) -> bytes:
    return read_at(element.file, element.start + first, last - first)


def _read_swapped(element: PixelElement, first: int, last: int) -> bytes:
    """8-bit values in big-endian words: the second of each pair comes first."""
    start, stop = first // 2 * 2, math.ceil(last / 2) * 2
    data = _read_plain(element, start, stop)
    pairs = np.frombuffer(data[: len(data) // 2 * 2], np.uint16).byteswap().tobytes()
    return pairs[first - start : last - start]


def _cells(data: bytes, skipped: int, bits: int, kind: str, layout: Layout, little: bool) -> Values:
    """The cells of so many bits; those of a whole number of bytes are a numpy type."""
    order = "<" if little else ">"
    if kind != "integer":
        return np.frombuffer(data, f"{order}f{layout.allocated // 8}")
    if layout.allocated in (8, 16, 32, 64):
        return np.frombuffer(data, f"{order}u{layout.allocated // 8}")
    if not little:  # packed into words whose low bits come first
        data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()
    packed = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[skipped:][:bits]
    if layout.allocated == 1:
        return packed
    if layout.allocated > 32:
        raise ImageError("Cells of more than 32 bits are not read.", "Save the picture as PNG.")
    weights = 1 << np.arange(layout.allocated, dtype=np.uint32)
    return packed.reshape(-1, layout.allocated) @ weights


def _values(cells: Values, stored: int, high: int, signed: bool) -> Values:
    """The `stored` bits below and including bit `high`, as integers."""
    width = 8 * cells.dtype.itemsize
    cells = cells.astype(cells.dtype.newbyteorder("="), copy=False)
    above = width - 1 - high
    if not signed:
        shift = high + 1 - stored
        if not above and not shift:
            return cells
        return np.asarray((cells >> shift) & cells.dtype.type((1 << stored) - 1))
    kind = np.dtype(f"i{cells.dtype.itemsize}")
    return np.asarray((cells << cells.dtype.type(above)).view(kind) >> kind.type(width - stored))


def _upsampled(cells: Values, layout: Layout) -> Values:
    """YBR_FULL_422 (PS3.3 C.7.6.3.1.2): two luminances, then the blue and red that they share."""
    if layout.columns % 2:
        raise ImageError("An odd number of columns cannot share colours.", "Save it as RGB.")
    groups = cells.reshape(layout.rows, layout.columns // 2, 4)
    full = np.empty((layout.rows, layout.columns, 3), cells.dtype)
    full[..., 0] = groups[..., :2].reshape(layout.rows, layout.columns)
    full[..., 1:] = np.repeat(groups[..., 2:], 2, axis=1)
    return full


# --- Compressed --------------------------------------------------------------


def _decode_frame(data: bytes, layout: Layout, exact: bool, name: str, say: Say) -> Stored:
    """Decode a codestream, and read its values by its own depth, sign and colours."""
    stream = read_codestream(data, name)
    if (stream.rows, stream.columns) != (layout.rows, layout.columns):
        raise ImageError(
            f"{name} holds a compressed picture of another size than it says.",
            "Export the file again.",
        )
    if stream.components not in (1, 3) or (stream.components == 3 and stream.signed):
        raise ImageError(
            f"{name} holds a compressed picture of {stream.components} "
            f"{'signed ' * stream.signed}colours.",
            "Save it as RGB.",
        )
    if stream.components != layout.samples:
        say("header", "The file states another number of colours than its compressed picture has.")
    stated = "ycc" if layout.photometric in YBR else "rgb"
    if stream.kind == "jpeg 2000" and layout.photometric in ("YBR_RCT", "YBR_ICT"):
        stated = "rgb"  # those are names of transforms which the decoder undoes, if they are there
    values = decode(data, stream, stated, exact, name, say)
    if stream.components == 3:
        fits = layout.stored < stream.precision and int(values.max()) < 1 << layout.stored
        bits = layout.stored if fits else stream.precision
        # libjpeg has converted the components of lossy JPEG; others are YCbCr still
        is_converted = stream.kind == "jpeg" and not stream.lossless
        if not is_converted and (stream.colour or stated) == "ycc":
            values = _from_ybr(values, bits, "YBR_FULL")
        return Stored(values, bits, False, "rgb")
    values, bits, signed = _of_depth(values, stream, layout, say)
    is_palette = layout.photometric == "PALETTE COLOR"
    return Stored(values, bits, signed, "palette" if is_palette else "grey")


def _of_depth(
    values: Values, stream: Codestream, layout: Layout, say: Say
) -> tuple[Values, int, bool]:
    """Grey values, their bits and sign.

    A codestream of as many bits as are stored, or of fewer, holds values; one of more may hold
    whole cells, with overlays beside the values, and does if the header leaves room for them. One
    of fewer has no bit for the sign that the header states of those stored.
    """
    precision, stored = stream.precision, layout.stored
    if stream.signed or values.dtype.kind == "i":
        if not layout.signed:
            say("header", "The compressed picture has signed values: the file states unsigned.")
        return values, precision, True
    if precision > stored:
        if layout.high + 1 > stored and layout.high < precision:
            values = _values(values, stored, layout.high, layout.signed)
            return values, stored, layout.signed
        if not stream.lossless and int(values.max()) < (1 << stored) * OVERSHOOT:
            values = np.minimum(values, (1 << stored) - 1)  # else a loss would look like depth
        if int(values.max()) < 1 << stored or _is_sign_extended(values, precision, stored):
            precision = stored
        else:
            say("header", "The compressed picture has more bits than the file states.")
    if layout.signed and precision >= stored:
        return _values(values, precision, precision - 1, True), precision, True
    return values, precision, False


def _is_sign_extended(values: Values, precision: int, stored: int) -> bool:
    """Whether the bits above those stored repeat the sign everywhere."""
    above = values >> (stored - 1)
    return bool(((above == 0) | (above == (1 << precision - stored + 1) - 1)).all())


def _of_planes(planes: Values, layout: Layout, name: str) -> Stored:
    """Values of byte planes; how many there are decides over the bits allocated."""
    each = len(planes) // layout.samples
    if each > 4:
        raise cut_off(name)
    width = {1: 1, 2: 2, 3: 4, 4: 4}[each]
    shape = (layout.samples, each, layout.rows, layout.columns)
    cells = np.zeros((layout.rows, layout.columns, layout.samples, width), np.uint8)
    cells[..., width - each :] = planes.reshape(shape).transpose(2, 3, 0, 1)
    values = cells.view(f">u{width}")[..., 0]
    stored, high = min(layout.stored, 8 * each), min(layout.high, 8 * each - 1)
    signed = layout.signed and stored == layout.stored  # fewer bits have none for the sign
    values = _values(values, stored, high, signed)
    return _coloured(
        values[..., 0] if layout.samples == 1 else values, stored, signed, layout, name
    )


def _inflate_frame(data: bytes, element: PixelElement, layout: Layout) -> Stored:
    """A frame of Deflated Image Frame Compression (PS3.5 A.4.12), inflated to its size only."""
    bits = layout.rows * layout.columns * layout.samples * layout.allocated
    plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, math.ceil(bits / 8))
    return _read_plain_frame(plain, element, layout)


def _read_plain_frame(data: bytes, element: PixelElement, layout: Layout) -> Stored:
    """A frame whose cells came in a fragment of their own."""
    alone = dataclasses.replace(
        element, file=io.BytesIO(data), start=0, length=len(data), words=False
    )
    return _read_cells(alone, dataclasses.replace(layout, frames=1), 0)


def _coloured(values: Values, bits: int, signed: bool, layout: Layout, name: str) -> Stored:
    """Values of uncompressed or run-length coded pixels, and their colours as RGB."""
    if layout.samples == 1:
        if layout.photometric == "PALETTE COLOR":
            return Stored(values, bits, signed, "palette")
        if layout.photometric in GREY:
            return Stored(values, bits, signed, "grey")
    elif layout.samples == 3:
        if layout.photometric in ("RGB", "YBR_RCT", "YBR_ICT"):  # their decoders leave RGB
            return Stored(values, bits, False, "rgb")
        if layout.photometric in YBR:
            return Stored(_from_ybr(values, bits, layout.photometric), bits, False, "rgb")
    raise ImageError(f"{name} has colours of an unsupported kind.", "Save it as RGB or PNG.")


def _from_ybr(values: Values, bits: int, photometric: str) -> Values:
    """RGB of luminance and two colour differences (PS3.3 C.7.6.3.1.2, ITU-R BT.601)."""
    scale = 1 << bits
    y, blue, red = (values[..., i].astype(np.float32) for i in range(3))
    blue -= scale / 2
    red -= scale / 2
    if photometric.startswith("YBR_PARTIAL"):  # 16 to 235 and 16 to 240, of 8 bits
        y = (y - scale / 16) * (255 / 219)
        blue *= 255 / 224
        red *= 255 / 224
    colours = (y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue)
    rgb = np.empty(values.shape, values.dtype.newbyteorder("="))
    for channel, colour in enumerate(colours):
        rgb[..., channel] = np.clip(np.rint(colour), 0, scale - 1)
    return rgb
