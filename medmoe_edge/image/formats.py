"""What a file is, by its first bytes; and what a person can do with one that is not read."""

import re
import struct

from medmoe_edge.errors import ImageError

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
