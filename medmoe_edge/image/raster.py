"""PNG, JPEG, TIFF, WebP, BMP and GIF: one page, checked before it is decoded.

`raster_display` makes it visible. Everything here is by Pillow, but for what Pillow does not check:
the sums of a PNG's chunks, the size of a TIFF's tiles, and pages without end.
"""

import contextlib
import ctypes
import functools
import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image as Pillow
from PIL import (
    ImageOps,
    ImagePalette,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    _imaging,
)

from medmoe_edge.errors import ImageError, Notice
from medmoe_edge.image.pixels import (
    MAX_PIXELS,
    Image,
    check_size,
    pick_frame,
    shown_name,
    square_pixels,
    too_large,
)
from medmoe_edge.image.raster_display import ORIENTATION, show, stated_ratio

if TYPE_CHECKING:
    from medmoe_edge.image.codestreams import Codestream

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
MAX_PAGES = 10_000
MAX_ENTRIES = 4096  # of a TIFF's directory
CUT_OFF = "Copy it again from where it came, whole."
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange rows and columns

# TIFF's tags and values, TIFF 6.0 and its supplements
NEW_SUBFILE_TYPE, DESCRIPTION, IMAGE_DEPTH = 254, 270, 32997
THUMBNAIL_OR_MASK = 0b101  # bits of it: of another page's, at a lower resolution; a mask
STRIP_OFFSETS, STRIP_SIZES = 273, 279
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_SIZES = 322, 323, 324, 325
DEFLATED, FILL_ORDER = (8, 32946), 266
PHOTOMETRIC, FAX = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, (2, 3, 4, 32771)
PHOTOMETRIC_NAMES = {
    **{0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "Lab"},
    **{9: "ICC Lab", 10: "ITU Lab", 32803: "raw camera", 32844: "LogL", 32845: "LogLuv"},
}
SAMPLE_NAMES = {1: "unsigned", 2: "signed", 3: "float", 4: "untyped", 5: "complex", 6: "complex"}
NATIVE = {  # Pillow's names of how samples lie
    **dict.fromkeys(("F;32F", "F;32BF"), "F;32NF"),
    **dict.fromkeys(("I;32S", "I;32BS"), "I;32NS"),
    **dict.fromkeys(("I;16S", "I;16BS"), "I;16NS"),
}
JPEG_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
SCAN, PROGRESSIVE, NO_FRAME = 0xDA, (0xC2, 0xCA), (0xC4, 0xC8, 0xCC)  # of markers from 0xC0 on
ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a segment
JPEG_PAD = b"\x5a\x35" * 64  # neither markers nor stuffing; any codes
ADAM7 = (  # the passes of an interlaced PNG: first column and row, and steps to the next
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)),
    (0, 1, 1, 2),
)
PIECE = 2**20  # bytes that are unpacked at once
PNG_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


def read_raster(path: Path, frame: int | None, most_pixels: int = MAX_PIXELS) -> Image:
    """Read one page; of an animation, its first picture.

    Pages count without thumbnails and masks that a TIFF says to be such. The errors of
    `load_image`, and whatever Pillow raises.
    """
    name = shown_name(path)
    _prepare_libtiff()
    with _explained(name), _open(path, name, most_pixels) as picture:
        notices: tuple[Notice, ...] = ()
        pages = [0]
        if isinstance(picture, TiffImagePlugin.TiffImageFile):
            pages = _pages(path, name)
            notices = _unlisted(picture.tag_v2, len(pages))
        elif picture.format in ("PNG", "WEBP", "GIF") and getattr(picture, "is_animated", False):
            notices = (Notice("animation", "The file is an animation: its first picture is read."),)
        picture.seek(pages[pick_frame(name, frame, len(pages))])
        check_size(name, picture.height, picture.width, most_pixels)
        _check_tiles(picture, name, most_pixels)
        if picture.format == "PNG":
            _check_png(path)
        ratio = stated_ratio(picture)
        turned = picture.getexif().get(ORIENTATION)
        if isinstance(picture, TiffImagePlugin.TiffImageFile):
            _correct_reading(picture)
            notices += _load_tiff(picture, path)
        else:
            picture.load()
            if picture.format in ("JPEG", "MPO"):
                notices += _check_scans(path)
                if picture.info.get("progressive"):
                    _check_jpeg(path, 1)
                elif _ends_flat(picture):
                    _check_jpeg(path, 8)
            elif picture.format == "PNG" and _ends_blank(picture):
                _check_rows(path)
            for key in ("exif", "Raw profile type exif"):  # Pillow would write odd tags anew
                picture.info.pop(key, None)
            ImageOps.exif_transpose(picture, in_place=True)
        shown = show(picture)
    image = Image(shown.pixels, None, shown.window, None, len(pages), notices + shown.notices)
    return square_pixels(image, 1 / ratio if turned in SIDEWAYS else ratio, most_pixels)


def _open(path: Path, name: str, most_pixels: int) -> Pillow.Image:
    try:
        return Pillow.open(path, formats=FORMATS)
    except Pillow.DecompressionBombError:  # Pillow's own limit is higher
        raise too_large(name, most_pixels) from None
    except UnidentifiedImageError:
        with path.open("rb") as file:
            raise _unopened(file, name) from None


def _unopened(file: BinaryIO, name: str) -> Exception:
    """Why Pillow does not open a file whose first bytes it knows."""
    head = file.read(8)
    if head.startswith((b"II", b"MM")):
        return _unread_tiff(file, head, name)
    file.seek(0)
    if head.startswith(b"\x89PNG"):
        try:
            PngImagePlugin.PngImageFile(file)
        except Exception as error:  # what `Pillow.open` keeps to itself
            return error
    if head.startswith(b"\xff\xd8"):
        from medmoe_edge.image.codestreams import read_codestream

        found = read_codestream(file.read(), name)
        if not _is_ordinary(found):
            what = f"{found.kind.upper()} picture of {found.components} x {found.precision} bits"
            remedy = "Save it as PNG of 8 or 16 bits."
            return ImageError(f"{name} is a {what}, which is not read.", remedy)
    return ImageError(
        f"{name} begins like an image, but its header is damaged or cut off.",
        "Copy it again, or export it again as PNG.",
    )


def _is_ordinary(found: "Codestream") -> bool:
    """Whether any Pillow reads such JPEG pictures, so that this one must be damaged."""
    plain = found.kind == "jpeg" and not found.lossless
    return plain and found.precision == 8 and found.components in (1, 3, 4)


def _unread_tiff(file: BinaryIO, head: bytes, name: str) -> ImageError:
    """Name what a TIFF's first page holds."""
    remedy = "Save it as 8 or 16 bit TIFF without compression, or as PNG."
    if head.startswith(b"MM\0+"):
        return ImageError(f"{name} is a big-endian BigTIFF, which is not read.", remedy)
    try:
        file.seek(0)
        head = file.read(16 if head[2] == 43 else 8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        kind = SAMPLE_NAMES.get(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0], "unknown")
        colours = PHOTOMETRIC_NAMES.get(tags.get(PHOTOMETRIC, 0), "unknown")
        packing = tags.get(TiffImagePlugin.COMPRESSION, 1)
        if not tags.get(TiffImagePlugin.IMAGEWIDTH) or not tags.get(TiffImagePlugin.IMAGELENGTH):
            raise ValueError
    except Exception:  # the directory itself
        return ImageError(
            f"{name} is a TIFF without a readable directory: damaged or cut off.",
            "Copy it again, or export it again.",
        )
    if packing not in TiffImagePlugin.COMPRESSION_INFO:
        what = f"{name} is a TIFF whose compression, number {packing}, is not read."
        return ImageError(what, remedy)
    samples = f"{' + '.join(map(str, bits[:8]))} bits, {kind}"
    return ImageError(f"{name} is a TIFF of a kind that is not read: {colours}, {samples}.", remedy)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say what is wrong with a file where Pillow's error is of a known kind."""
    try:
        yield
    except MemoryError:
        raise
    except (KeyError, TypeError, AssertionError) as error:  # of which something is missing
        raise ImageError(
            f"{name} is damaged where it says what it holds ({type(error).__name__}).",
            "Copy it again from where it came.",
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as error:
        text = str(error).lower()
        if "max_text" in text:
            raise ImageError(
                f"{name} holds texts or a colour profile that unpack to more than is allowed.",
                "Save the picture without metadata.",
            ) from None
        if "truncated" in text or "end of file" in text or "not enough" in text:
            raise ImageError(
                f"{name} is cut off: its data end before the picture does.",
                CUT_OFF,
            ) from None
        if isinstance(error, (SyntaxError, zlib.error)) or any(
            word in text for word in ("broken", "decode", "corrupt", "invalid", "failed to read")
        ):
            raise ImageError(
                f"{name} is damaged: its compressed data contradict themselves.",
                "Copy it again from where it came.",
            ) from None
        raise


@functools.cache
def _prepare_libtiff() -> None:
    """Have it read every TIFF, and keep its own complaints off the screen.

    Without it Pillow reads uncompressed ones itself, and mixes up planes of more than a byte. The
    complaints go to file descriptor 2; to turn that away for a moment would swallow what other
    threads write meanwhile.
    """
    TiffImagePlugin.READ_LIBTIFF = True
    library = ctypes.CDLL(_imaging.__file__)  # which finds what Pillow itself was linked with
    for handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(AttributeError):  # linked in, so that its names are not shown
            getattr(library, handler)(None)


def _pages(path: Path, name: str) -> list[int]:
    """The pages of a TIFF that are pictures of their own, or all where none says to be.

    Its directories are followed here (TIFF 6.0, section 2): Pillow takes a chain that leads out of
    the file for its end, and counts for hours on a hostile one of a million pages.
    """
    with path.open("rb") as file:
        head = file.read(16)
        order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
        big = int.from_bytes(head[2:4], order) == 43
        width, of_count, of_entry = (8, 8, 20) if big else (4, 2, 12)
        at = int.from_bytes(head[width : 2 * width], order)
        seen: set[int] = set()
        whole = []
        while at and at not in seen:
            if len(seen) == MAX_PAGES:
                raise ImageError(f"{name} has more than {MAX_PAGES:,} pages.", "Split it.")
            file.seek(at)
            count = int.from_bytes(file.read(of_count), order)
            entries = file.read(min(count, MAX_ENTRIES) * of_entry)
            following = file.read(width)
            if not count or count > MAX_ENTRIES or len(following) < width:
                raise ImageError(f"{name} is cut off: not all of its pages are there.", CUT_OFF)
            tags = {entries[i : i + 2]: i for i in range(0, len(entries), of_entry)}
            place = tags.get(NEW_SUBFILE_TYPE.to_bytes(2, order))
            start = 0 if place is None else place + of_entry - width
            kind = 0 if place is None else int.from_bytes(entries[start : start + width], order)
            if not kind & THUMBNAIL_OR_MASK:
                whole.append(len(seen))
            seen.add(at)
            at = int.from_bytes(following, order)
    return whole or list(range(len(seen)))


def _unlisted(tags: TiffImagePlugin.ImageFileDirectory_v2, listed: int) -> tuple[Notice, ...]:
    """What to say of pictures that have no page: of ImageJ's large stacks, and SGI's volumes."""
    text = str(tags.get(DESCRIPTION, ""))
    stack = re.search(r"^images=(\d{1,9})$", text, re.M) if text.startswith("ImageJ=") else None
    stated = max(int(stack[1]) if stack else 1, int(tags.get(IMAGE_DEPTH, 1)))
    if stated <= listed:
        return ()
    what = f"The file says that it holds {stated} pictures, and lists {listed} as pages: the others"
    return (Notice("unlisted_pages", f"{what} cannot be seen."),)


def _correct_reading(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Have Pillow read what libtiff unpacks as libtiff itself would.

    In the machine's byte order, in which it comes: Pillow reads it in the file's, so that
    compressed big-endian samples of more than a byte, other than unsigned ones of 16 bits, would
    turn into noise. Grey as black at 0 where the file does not say, unless it is a fax. Tables of
    colours that state 16 bits and hold 8 as those of 8.
    """
    tags = picture.tag_v2
    is_unsaid = PHOTOMETRIC not in tags and tags.get(TiffImagePlugin.COMPRESSION, 1) not in FAX

    def named(packed: str) -> str:
        upright = packed.removesuffix("I").removesuffix(";")
        return upright if is_unsaid and packed.endswith("I") else NATIVE.get(packed, packed)

    picture.tile = [
        tile._replace(args=(named(tile.args[0]), *tile.args[1:]))
        if tile.codec_name == "libtiff" and isinstance(tile.args, tuple)
        else tile
        for tile in picture.tile
    ]
    colours = tags.get(TiffImagePlugin.COLORMAP, ())
    if picture.mode == "P" and colours and max(colours) < 256:
        picture.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _load_tiff(picture: TiffImagePlugin.TiffImageFile, path: Path) -> tuple[Notice, ...]:
    """Decode a page, which also turns it upright; says where deflated data have no end.

    Raises `OSError` "truncated" where its strips or tiles lead out of the file, `zlib.error` where
    deflated ones do not match their sums, which libtiff does not look at.
    """
    tags = picture.tag_v2
    tiles = TILE_OFFSETS in tags
    starts, sizes = (
        tags.get(tag, ())
        for tag in ((TILE_OFFSETS, TILE_SIZES) if tiles else (STRIP_OFFSETS, STRIP_SIZES))
    )
    try:
        picture.load()
    except OSError:
        ends = (start + size for start, size in zip(starts, sizes, strict=False))
        if max(ends, default=0) > path.stat().st_size:
            raise OSError("truncated") from None
        raise
    if tags.get(TiffImagePlugin.COMPRESSION) not in DEFLATED or tags.get(FILL_ORDER, 1) != 1:
        return ()
    with path.open("rb") as file:
        ended = [_ends_in_sum(file, *strip) for strip in zip(starts, sizes, strict=False)]
    endless = "Compressed data of the picture have no end: it may be damaged."
    return () if all(ended) else (Notice("may_be_damaged", endless),)


def _ends_in_sum(file: BinaryIO, start: int, size: int) -> bool:
    """Whether deflated data end, as damaged ones may not: they go on after the picture is full.

    Raises `zlib.error` where they are not what their Adler-32 says (RFC 1950).
    """
    file.seek(start)
    data, inflater = file.read(size), zlib.decompressobj()
    while data and not inflater.eof:
        inflater.decompress(data, PIECE)
        data = inflater.unconsumed_tail
    return inflater.eof


def _check_tiles(picture: Pillow.Image, name: str, most_pixels: int) -> None:
    """Refuse tiles that would take more memory than the largest picture may."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        tags = picture.tag_v2
        width, length = (int(tags.get(tag, 1)) for tag in (TILE_WIDTH, TILE_LENGTH))
        if width * length > most_pixels:
            raise too_large(name, most_pixels)


def _ends_flat(picture: Pillow.Image) -> bool:
    """Whether the last block of a JPEG is of one shade, as those are that a decoder makes up.

    Half of it is looked at: into the other, colours may run over from the block before.
    """
    width, height = picture.size
    corner = picture.crop((max(0, width - 4), max(0, height - 4), width, height))
    values = np.asarray(corner)
    return bool((values == values[-1, -1]).all())


def _check_scans(path: Path) -> tuple[Notice, ...]:
    """Raise `OSError` where a JPEG lacks a scan that libjpeg shows it blurred or grey without.

    Markers are found as libjpeg does it: behind segments, of which one may hold a thumbnail, stray
    bytes and restarts. The last bit of a progressive picture's coefficients may be left out.
    """
    data, at = path.read_bytes(), 2
    lacking: dict[int, list[int]] = {}  # how many bits, of each component's 64 coefficients
    is_progressive = False
    while (found := JPEG_MARKER.search(data, at)) and found[1] != b"\xd9":
        marker, at = found[1][0], found.end()
        if marker in ALONE:
            continue
        size = max(2, int.from_bytes(data[at : at + 2]))
        body, at = data[at + 2 : at + size], at + size
        if 0xC0 <= marker <= 0xCF and marker not in NO_FRAME:
            is_progressive = marker in PROGRESSIVE
            lacking = {component: [16] * 64 for component in body[6::3]}
        elif marker == SCAN:
            end = 1 + 2 * body[0]
            first, last, bits = body[end : end + 3] if is_progressive else (0, 63, 0)
            for component in body[1:end:2]:
                lacking[component][first : last + 1] = [bits & 15] * (last + 1 - first)
            if not is_progressive and not any(map(any, lacking.values())):
                break
    worst = max(map(max, lacking.values()), default=16)
    if worst > 1:
        raise OSError("truncated")
    unrefined = "The picture lacks the last bit of its details: it may be damaged."
    return (Notice("may_be_damaged", unrefined),) if worst else ()


def _check_jpeg(path: Path, scale: Literal[1, 8]) -> None:
    """Raise `OSError` where a JPEG's data end before its picture, although it is closed properly.

    libjpeg goes on with zeros then. So the picture must not depend on what follows the data; at an
    eighth, which is quicker, where all of a block comes at once. Nor need it be looked at where the
    same codes are repeated until the end: the shade is then the picture's own.
    """
    data = path.read_bytes()
    end = data.rfind(b"\xff\xd9")
    tail = data[max(0, end - 26) : max(0, end - 2)]  # but for the last bits and what fills them up
    if scale == 8 and any(tail[period:] == tail[:-period] for period in range(1, 13)):
        return
    seen = []
    for pad in (b"", JPEG_PAD):
        with Pillow.open(io.BytesIO(data[:end] + pad + data[end:]), formats=("JPEG",)) as picture:
            if scale == 8:
                picture.draft(None, (1, 1))
            seen.append(picture.tobytes())
    if seen[0] != seen[1]:
        raise OSError("truncated")


def _check_png(path: Path) -> None:
    """Raise `zlib.error` where a chunk that makes up the picture does not match its sum.

    Pillow does not look at those of the pixels.
    """
    kind = b""
    for kind, chunk, stated in _chunks(path):
        is_looked_at = kind in PNG_CRITICAL and len(stated) == 4
        if is_looked_at and zlib.crc32(chunk, zlib.crc32(kind)) != int.from_bytes(stated):
            raise zlib.error("a chunk does not match its sum")
    if kind != b"IEND":
        raise OSError("truncated")


def _chunks(path: Path) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """A PNG's chunks up to its end: type, data, and the CRC-32 of both (PNG 5.3)."""
    data = memoryview(path.read_bytes())
    at, kind = 8, b""
    while kind != b"IEND" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        kind = bytes(data[at + 4 : at + 8])
        yield kind, data[at + 8 : end], data[end : end + 4]
        at = end + 4


def _ends_blank(picture: Pillow.Image) -> bool:
    """Whether one of the last two rows, with which PNGs end, is all zeros, as missing ones are."""
    return not all(
        picture.crop((0, row, picture.width, row + 1)).im.getbbox()
        for row in range(max(0, picture.height - 2), picture.height)
    )


def _check_rows(path: Path) -> None:
    """Raise `OSError` where a PNG's data unpack to fewer rows than it states: Pillow fills up."""
    inflater, found, expected = zlib.decompressobj(), 0, 0
    for kind, chunk, _ in _chunks(path):
        if kind == b"IHDR":
            width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", chunk)
            bits = depth * {2: 3, 4: 2, 6: 4}.get(colours, 1)
            for x, y, right, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
                columns, rows = -(-(width - x) // right), -(-(height - y) // down)
                expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 < rows else 0
        elif kind == b"IDAT":
            data = bytes(chunk)
            while data and not inflater.eof and found < expected:
                found += len(inflater.decompress(data, PIECE))
                data = inflater.unconsumed_tail
    if found < expected:
        raise OSError("truncated")
