"""Decompression bombs: small files that unpack to gigabytes, each made in a moment."""

import contextlib
import gzip
import io
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

from PIL import Image as Pillow
from pydicom import Dataset, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

SIDE = 10_000  # of the largest picture that is allowed
MIB = 2**20


def _deflated(before: bytes, count: int) -> bytes:
    """`before` and so many zeros in raw deflate, a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = packer.compress(before) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)  # always the same
    return head + block * (count // MIB) + packer.compress(bytes(count % MIB)) + packer.flush()


def zeros(count: int) -> bytes:
    """So many zeros as zlib packs them (RFC 1950)."""
    adler = count % 65521 << 16 | 1
    return b"\x78\xda" + _deflated(b"", count) + struct.pack(">I", adler)


def gzipped(before: bytes, count: int) -> bytes:
    """`before` and so many zeros as gzip packs them (RFC 1952)."""
    crc, block = zlib.crc32(before), bytes(MIB)
    for _ in range(count // MIB):
        crc = zlib.crc32(block, crc)
    crc = zlib.crc32(bytes(count % MIB), crc)
    head = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    size = (len(before) + count) % 2**32
    return head + _deflated(before, count) + struct.pack("<II", crc, size)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, *more: bytes) -> bytes:
    """A PNG of zeros; `more` are chunks before its pixels."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    row = 1 + (width * depth * samples + 7) // 8
    chunks = (chunk(b"IHDR", head), *more, chunk(b"IDAT", zeros(row * height)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def small_png(*more: bytes) -> bytes:
    """A PNG of few pixels, and much else."""
    return png(8, 8, 8, 0, *more)


def tiff(width: int, height: int, strips: int, **tags: int) -> bytes:
    """A TIFF of deflated zeros, all of whose strips are one and the same."""
    rows = -(-height // strips)
    bits, samples = tags.get("bits", 8), tags.get("samples", 3)
    data = zeros(width * rows * samples * bits // 8)
    entries: list[tuple[int, int, list[int]]] = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * samples),
        (259, 3, [8]),
        (262, 3, [2 if samples > 2 else 1]),
        (277, 3, [samples]),
        (339, 3, [tags.get("format", 1)] * samples),
    ]
    if "tile" in tags:
        side = tags["tile"]
        entries += [(322, 4, [side]), (323, 4, [side]), (324, 4, [8]), (325, 4, [len(data)])]
    else:
        entries += [(273, 4, [8] * strips), (278, 4, [rows]), (279, 4, [len(data)] * strips)]
    if samples == 4:
        entries.append((338, 3, [2]))
    entries.sort()
    start = 8 + len(data) + len(data) % 2
    after = start + 2 + 12 * len(entries) + 4
    directory, values = struct.pack("<H", len(entries)), b""
    for tag, kind, numbers in entries:
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            place = struct.pack("<I", after + len(values))
            values += packed + bytes(len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(numbers)) + place
    head = b"II*\0" + struct.pack("<I", start)
    return head + data + bytes(len(data) % 2) + directory + bytes(4) + values


def looped_tiff() -> bytes:
    """A TIFF whose second page is followed by its first."""
    page = tiff(8, 8, 1, samples=1)
    at = struct.unpack_from("<I", page, 4)[0]
    count = struct.unpack_from("<H", page, at)[0]
    place = at + 2 + 12 * count
    second = len(page)
    return (
        page[:place]
        + struct.pack("<I", second)
        + page[place + 4 :]
        + page[at:place]
        + struct.pack("<I", at)
    )


def jpeg2000(
    width: int, height: int, components: int, tile: tuple[int, int] | None = None
) -> bytes:
    """The codestream of an empty picture, for which decoders make room all the same.

    T.800 annex A: SOC, SIZ, COD, QCD, one SOT without a packet, EOC.
    """
    across, down = tile or (width, height)
    parts = b"\x07\1\1" * components
    size = struct.pack(
        ">HHIIIIIIIIH",
        *(38 + len(parts), 0, width, height, 0, 0, across, down, 0, 0),
        components,
    )
    cod = b"\xff\x52\0\x0c\0\0\0\1\0\5\4\4\0\1"
    qcd = b"\xff\x5c\0\x13\x40" + bytes((0x40,)) * 16
    sot = b"\xff\x90\0\x0a\0\0" + struct.pack(">I", 14) + b"\0\1" + b"\xff\x93"
    return b"\xff\x4f\xff\x51" + size + parts + cod + qcd + sot + b"\xff\xd9"


def encoded_jpeg2000(width: int, height: int, mode: str) -> bytes:
    """A whole JPEG 2000 picture of one shade."""
    file = io.BytesIO()
    Pillow.new(mode, (width, height)).save(file, "JPEG2000", no_jp2=True, num_resolutions=6)
    return file.getvalue()


def dicom(syntax: UID, rows: int, columns: int, data: bytes, **attributes: object) -> bytes:
    """A DICOM file around a codestream."""
    dataset = _header(rows, columns, **attributes)
    dataset.PixelData = encapsulate([data]) if syntax.is_compressed and data else data
    return _written(dataset, syntax)


def deflated_dicom(rows: int, columns: int, frames: int, tail: int = 0) -> bytes:
    """A deflated DICOM file of zeros, made without them lying in memory."""
    dataset = _header(rows, columns, NumberOfFrames=frames)
    dataset.PixelData = b""
    whole = _written(dataset, uid.DeflatedExplicitVRLittleEndian)
    meta = 132 + 12 + struct.unpack_from("<I", whole, 140)[0]
    plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(whole[meta:])
    start = plain.rindex(b"\xe0\x7f\x10\0OW\0\0")
    length = rows * columns * 2 * frames
    head = plain[: start + 8] + struct.pack("<I", length)
    return whole[:meta] + _deflated(head, length + tail)


def _header(rows: int, columns: int, **attributes: object) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    dataset.SOPInstanceUID = uid.generate_uid(entropy_srcs=["bomb"])
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def _written(dataset: Dataset, syntax: UID) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def nifti(shape: tuple[int, int, int], datatype: int, bits: int, most: int = 2**33) -> bytes:
    """A NIfTI volume of zeros, at most so many bytes of them, in gzip."""
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<hh", head, 70, datatype, bits)
    struct.pack_into("<8f", head, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<f", head, 108, 352)
    head[344:348] = b"n+1\0"
    return gzipped(bytes(head), min(shape[0] * shape[1] * shape[2] * bits // 8, most))


def animation(kind: str, side: int, frames: int) -> bytes:
    """A large picture of one shade, again and again."""
    file = io.BytesIO()
    pages = [Pillow.new("P" if kind == "GIF" else "RGB", (side, side), n) for n in range(frames)]
    pages[0].save(file, kind, save_all=True, append_images=pages[1:])
    return file.getvalue()


# What makes each; those of the second list take seconds to be made, or as long as they may.
BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 400 megapixels": lambda: png(2 * SIDE, 2 * SIDE, 1, 0),
    "png with a large zTXt": lambda: small_png(chunk(b"zTXt", b"a\0\0" + zeros(64 * MIB))),
    "png with many zTXt": lambda: small_png(*[chunk(b"zTXt", b"a\0\0" + zeros(MIB))] * 2000),
    "png with a large iCCP": lambda: small_png(chunk(b"iCCP", b"a\0\0" + zeros(64 * MIB))),
    "png with a large iTXt": lambda: small_png(chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(64 * MIB))),
    "tiff of 100 megapixels": lambda: tiff(SIDE, SIDE, 100),
    "tiff of 100 megapixels, 16 bits": lambda: tiff(SIDE, SIDE, 100, bits=16, samples=4),
    "tiff of 100 megapixels, float": lambda: tiff(SIDE, SIDE, 100, bits=32, samples=1, format=3),
    "tiff with a huge tile": lambda: tiff(64, 64, 1, tile=64_000, samples=1),
    "jpeg 2000 with huge tiles": lambda: dicom(
        uid.JPEG2000Lossless, SIDE, SIDE, jpeg2000(SIDE, SIDE, 1, (2**31 - 1, 2**31 - 1))
    ),
    "jpeg 2000 with tiny tiles": lambda: dicom(
        uid.JPEG2000Lossless, SIDE, SIDE, jpeg2000(SIDE, SIDE, 1, (1, 1))
    ),
    "jpeg 2000 with many components": lambda: dicom(
        uid.JPEG2000Lossless, 1000, 1000, jpeg2000(1000, 1000, 16000)
    ),
    "deflated dicom with a large frame": lambda: deflated_dicom(SIDE, SIDE, 1),
    "nifti that states too much": lambda: nifti((SIDE, SIDE, 32_000), 16, 32, MIB),
    "bmp that states too much": lambda: (
        b"BM"
        + struct.pack(
            "<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 1, 1, 0, 0
        )
    ),
}
SLOW_BOMBS: dict[str, Callable[[], bytes]] = {
    "tiff of a million strips": lambda: tiff(100, 1_000_000, 1_000_000, samples=1),
    "png of 100 megapixels": lambda: png(SIDE, SIDE, 8, 0),
    "png of 100 megapixels, 16 bits, rgba": lambda: png(SIDE, SIDE, 16, 6),
    "png of 100 megapixels, 16 bits": lambda: png(SIDE, SIDE, 16, 0),
    "png with a zTXt of a gigabyte": lambda: small_png(chunk(b"zTXt", b"a\0\0" + zeros(2**30))),
    "tiff of one strip": lambda: tiff(SIDE, SIDE, 1),
    "jpeg 2000 of 100 megapixels": lambda: dicom(
        uid.JPEG2000Lossless,
        *(SIDE, SIDE, encoded_jpeg2000(SIDE, SIDE, "L")),
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
    ),
    "jpeg 2000 that states little": lambda: dicom(
        uid.JPEG2000Lossless, 64, 64, encoded_jpeg2000(SIDE, SIDE, "L")
    ),
    "deflated dicom of 4 gigabytes": lambda: deflated_dicom(2000, 2000, 536),
    "deflated dicom with a tail": lambda: deflated_dicom(64, 64, 1, 2 << 30),
    "nifti of 4 gigabytes": lambda: nifti((1000, 1000, 1074), 16, 32),
    "nifti of one large slice": lambda: nifti((SIDE, SIDE, 1), 64, 64),
    "gzip in gzip": lambda: gzip.compress(gzip.compress(bytes(1 << 28))),
    "gif of large frames": lambda: animation("GIF", 4000, 12),
    "webp of large frames": lambda: animation("WEBP", 8000, 3),
}


class Watch(threading.Thread):
    """Follows how much memory the processes that decode have held at most, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._look()

    def run(self) -> None:
        """Look every few milliseconds; processes come and go."""
        while not self._ended.wait(0.005):
            self._look()

    def _look(self) -> None:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if b"medmoe_edge.image.worker" not in (folder / "cmdline").read_bytes():
                    continue
                status = (folder / "status").read_text("ascii")
                if int(status.split("PPid:")[1].split()[0]) == os.getpid():
                    held = int(status.split("VmHWM:")[1].split()[0])
                    self.peak = max(self.peak, held // 1024)
