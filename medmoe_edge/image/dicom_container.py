"""The container: where a DICOM file's attributes and its pixels lie, whatever the file's beginning.

PS3.10 wants 128 bytes, `DICM` and a group 2 that names the transfer syntax. Files come without any
of them, and with a group 2 that is wrong: how the first element is written decides over what group
2 says. Attributes are read up to the pixels, the pixels themselves not at all: `PixelElement` says
where they are, and a single frame is read from there.
"""

import contextlib
import dataclasses
import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from pydicom import dcmread, uid
from pydicom.datadict import dictionary_has_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.valuerep import VR

from medmoe_edge.errors import ImageError
from medmoe_edge.image.codestreams import END_OF_IMAGE, cut_off, is_codestream
from medmoe_edge.image.dicom_tables import Header, Say
from medmoe_edge.image.pixels import HEAD_BYTES, MAX_BYTES, is_dicom, shown_name

MAX_HEADER = 2**28  # bytes of all attributes but the pixels
MAX_INFLATED = 2**30  # bytes that are inflated on the way to a frame
STEP = 2**20
PIXEL_TAGS = {0x7FE00008: "float32", 0x7FE00009: "float64", 0x7FE00010: "integer"}

LONG_FORM = {vr.value.encode() for vr in VR} - {  # VR with two spare bytes and a length of four
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO",
    b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
}  # fmt: skip

KNOWN_VRS = {vr.value.encode() for vr in VR if len(vr.value) == 2}
UNDEFINED = 0xFFFFFFFF
ITEM_LITTLE = b"\xfe\xff\x00\xe0"
GE_BIG_ENDIAN_PIXELS = "1.2.840.113619.5.2"  # of a data set in implicit little endian


@dataclasses.dataclass(frozen=True)
class PixelElement:
    """Where the pixels lie in `file`: `length` bytes from `start`; None, if it is undefined.

    `name` is how messages call the file, and `say` takes what should be known of the picture.
    """

    file: BinaryIO
    start: int
    length: int | None
    kind: str
    words: bool  # OW: the file's byte order applies to units of 16 bits, even of 8-bit values
    little: bool
    name: str
    say: Say

    def is_encapsulated(self) -> bool:
        """Whether it begins with an item, as compressed pixels do; their length is undefined.

        Some writers state one all the same. As pixels, these bytes are improbable but possible:
        the table of offsets, which comes first, has to fit in, and another item to follow it.
        """
        if self.length is None:
            return True
        head = read_at(self.file, self.start, min(self.length, 8))
        size = int.from_bytes(head[4:8], "little")
        if head[:4] != ITEM_LITTLE or size % 4 or size + 16 > self.length:
            return False
        return read_at(self.file, self.start + 8 + size, 4) == ITEM_LITTLE


@dataclasses.dataclass(frozen=True)
class Container:
    """An open DICOM file; its `syntax` and storage class `kind` are None where none is named."""

    header: Header
    syntax: uid.UID | None
    kind: uid.UID | None
    pixels: PixelElement | None


@contextlib.contextmanager
def open_container(
    path: Path, name: str | None = None, say: Say = lambda *_: None
) -> Iterator[Container]:
    """Open a DICOM file, for as long as the block runs, and read its attributes up to the pixels.

    Messages call it `name`, by default its own; `say` takes what should be known of it.
    Raises `ImageError` where these are too many, and whatever pydicom raises where they are
    damaged.
    """
    name = name or shown_name(path)
    with path.open("rb") as file:
        meta = _read_meta(file)
        syntax = _uid(meta, "TransferSyntaxUID")
        data: IO[bytes] = file
        if syntax == uid.DeflatedExplicitVRLittleEndian and not _starts_plainly(file):
            data = cast(IO[bytes], _Inflated(file, name))
        container = _read(cast(BinaryIO, data), syntax, name, say)
        kind = _uid(container.header, "SOPClassUID") or _uid(meta, "MediaStorageSOPClassUID")
        yield dataclasses.replace(container, kind=kind)


def add_misplaced(container: Container) -> None:
    """Add to the attributes what stands behind the pixels although it belongs before them.

    PS3.5 7.1. What was stated in its place stays. Padding and signatures, which do belong there,
    bytes that are no attributes, and the end of a deflated file are not read.
    """
    pixels, dataset = container.pixels, container.header.dataset
    if pixels is None or isinstance(pixels.file, _Inflated):
        return
    file, end = pixels.file, pixels.start + (pixels.length or 0)
    if pixels.length is None:
        with contextlib.suppress(ImageError):  # told of when a frame is read
            end = sum(_walk(pixels)[1][-1])
        end += 8 * (read_at(file, end, 4) == b"\xfe\xff\xdd\xe0")  # a delimiter
    if not 8 <= file.seek(0, io.SEEK_END) - end <= MAX_HEADER:
        return
    file.seek(end)
    with contextlib.suppress(Exception):  # pydicom raises nearly anything on other bytes
        found = read_dataset(file, *dataset.original_encoding)
        tags = list(found.keys())
        late = [tag for tag in tags if tag < min(PIXEL_TAGS)]
        if late and tags == sorted(tags) and all(map(_is_sound, map(found.get_item, tags))):
            what = "The file has attributes behind its pixels, where they do not belong."
            pixels.say("misplaced", what)
            for tag in set(late) - set(dataset.keys()):
                dataset[tag] = found.get_item(tag)


def _is_sound(element: DataElement | RawDataElement) -> bool:
    """Whether an element is one that the standard knows, and whole."""
    known = element.tag.is_private or dictionary_has_tag(element.tag)
    if isinstance(element, RawDataElement) and len(element.value or b"") != element.length:
        return False
    return known and element.tag.group >= 8


def read_whole(path: Path, name: str) -> Dataset:
    """All of a file; raises `ImageError`, and whatever pydicom raises."""
    with path.open("rb") as file:
        if not is_dicom(file.read(HEAD_BYTES)):
            raise ImageError(f"{name} is no DICOM file.", "Give a DICOM image.")
        file.seek(0)
        meta = deflated_meta(file)
        if meta is not None:
            return _inflated(file, meta, name)
    dataset = dcmread(path, force=True)  # old files lack the preamble
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        native = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else native
    return dataset


def deflated_meta(file: IO[bytes]) -> Dataset | None:
    """Group 2 of a deflated file, which then stands behind it; None of any other, at its beginning.

    pydicom inflates such a file whole as it opens it, without a limit.
    """
    meta = _read_meta(cast(BinaryIO, file)).dataset
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        return meta
    file.seek(0)
    return None


def _inflated(file: IO[bytes], meta: Dataset, name: str) -> Dataset:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(file.read(), MAX_BYTES)
    if inflater.unconsumed_tail:
        raise ImageError(f"{name} inflates to more than {MAX_BYTES:,} bytes.", "Split the series.")
    dataset = read_dataset(io.BytesIO(data), False, True)
    dataset.set_original_encoding(False, True)
    dataset.file_meta = FileMetaDataset(meta)
    return dataset


def _uid(header: Header, keyword: str) -> uid.UID | None:
    value = header.value(keyword)
    return uid.UID(str(value).strip(" \0")) if value else None


def _read_meta(file: BinaryIO) -> Header:
    """Read group 2, where there is one, and leave the file at the first element after it."""
    head = file.read(132)
    start = 132 if head[128:] == b"DICM" else 4 if head[:4] == b"DICM" else 0
    file.seek(start)
    if file.read(2) not in (b"\x02\0", b"\0\x02"):
        file.seek(start)
        return Header(Dataset())
    file.seek(start)
    return Header(read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2))


def _starts_plainly(file: BinaryIO) -> bool:
    """Whether what is said to be deflated is not."""
    at = file.tell()
    head = file.read(6)
    file.seek(at)
    return head[:4] in (b"\x08\0\x05\0", b"\x08\0\x16\0", b"\x08\0\x08\0") and head[4:] in KNOWN_VRS


def _read(file: BinaryIO, syntax: uid.UID | None, name: str, say: Say) -> Container:
    at = file.tell()
    head = file.read(8)
    file.seek(at)
    little = not (head[:1] == b"\0" and head[1:2] != b"\0")  # first come groups below 256
    implicit = head[4:6] not in KNOWN_VRS
    stated = syntax != uid.ExplicitVRBigEndian, syntax == uid.ImplicitVRLittleEndian
    is_stated = syntax is not None and not syntax.is_private
    if is_stated and len(head) == 8 and stated != (little, implicit):
        say("transfer_syntax", "The file is not written in the way that it states.")
    dataset = read_dataset(file, implicit, little, stop_when=lambda tag, *_: int(tag) in PIXEL_TAGS)
    dataset.set_original_encoding(implicit, little)
    dataset.file_meta = FileMetaDataset()
    if syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
    pixels = _find_pixels(file, implicit, little, name, say)
    if pixels is not None and syntax == GE_BIG_ENDIAN_PIXELS:
        pixels = dataclasses.replace(pixels, little=False)
    return Container(Header(dataset, little=little), syntax, None, pixels)


def _find_pixels(
    file: BinaryIO, implicit: bool, little: bool, name: str, say: Say
) -> PixelElement | None:
    """The element at which reading stopped (PS3.5 7.1)."""
    head = file.read(12)
    if len(head) < 8:
        return None
    order = "little" if little else "big"
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)  # type: ignore[arg-type]
    kind = PIXEL_TAGS.get(tag)
    if kind is None:
        return None
    vr = head[4:6]
    if implicit or vr not in KNOWN_VRS:
        vr, length, start = b"OW", head[4:8], file.tell() - len(head) + 8
    elif vr in LONG_FORM:
        length, start = head[8:12], file.tell() - len(head) + 12
    else:
        length, start = head[6:8], file.tell() - len(head) + 8
    count = int.from_bytes(length, order)  # type: ignore[arg-type]
    known = None if count == UNDEFINED else count
    return PixelElement(file, start, known, kind, vr != b"OB", little, name, say)


def read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """So many bytes of the file, or fewer if it ends before."""
    file.seek(start)
    if not isinstance(file, _Inflated):
        return file.read(size)
    parts = []
    while size > 0:
        file.forget()
        part = file.read(min(size, STEP))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Inflated:
    """A deflated data set, read as a file: inflated as far as it is read, and no further.

    The attributes are kept, since pydicom goes back in them; what lies before a frame is not.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        head = file.read(2)
        file.seek(-len(head), io.SEEK_CUR)
        zlib_header = len(head) == 2 and head[0] == 0x78 and int.from_bytes(head, "big") % 31 == 0
        self._bits = zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS
        self._start = file.tell()
        self._restart()

    def _restart(self) -> None:
        self._file.seek(self._start)
        self._inflater = zlib.decompressobj(self._bits)
        self._kept, self._base, self._at = bytearray(), 0, 0

    def tell(self) -> int:
        return self._at

    def forget(self) -> None:
        """Let go of what was read."""
        del self._kept[: self._at - self._base]
        self._base = self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("its end is not known")
        if target < self._base:  # back to a frame, once it was seen that all of them are there
            self._restart()
        end = self._base + len(self._kept)
        while end < target:  # what lies between is let go of
            more = self._more()
            if not more:
                target = end
                break
            self._base, self._kept = end, more
            end += len(more)
        self._at = target
        return target

    def read(self, size: int = -1) -> bytes:
        first = self._at - self._base
        while size < 0 or len(self._kept) < first + size:
            if len(self._kept) > MAX_HEADER:
                raise _too_much(self._name, MAX_HEADER)
            more = self._more()
            if not more:
                break
            self._kept += more
        data = bytes(self._kept[first:] if size < 0 else self._kept[first : first + size])
        self._at += len(data)
        return data

    def _more(self) -> bytearray:
        if self._base + len(self._kept) > MAX_INFLATED:
            raise _too_much(self._name, MAX_INFLATED)
        while not self._inflater.eof:
            data = self._inflater.unconsumed_tail or self._file.read(STEP)
            if not data:
                raise ImageError(
                    f"{self._name} is cut off: its deflated data has no end.",
                    "Copy or export the file again.",
                )
            more = self._inflater.decompress(data, STEP)
            if more:
                return bytearray(more)
        return bytearray()


def _too_much(name: str, limit: int) -> ImageError:
    return ImageError(
        f"{name} inflates to more than {limit:,} bytes before its picture ends.",
        "Save the wanted frame uncompressed.",
    )


MAX_FRAGMENTS = 10_000_000
ITEM, DELIMITER = 0xFFFEE000, 0xFFFEE0DD


def read_codestream_of(element: PixelElement, frames: int, index: int) -> bytes:
    """The codestream of one frame, of so many (PS3.5 A.4).

    Raises `ImageError` where frames cannot be told apart.
    """
    fragments, bounds = _tell_apart(element, frames)
    return _joined(element, fragments[bounds[index] : bounds[index + 1]])


def read_codestreams(element: PixelElement, frames: int) -> list[bytes]:
    """All codestreams, which may be more than the frames stated; raises `ImageError` likewise."""
    fragments, bounds = _tell_apart(element, frames)
    return [_joined(element, fragments[i:j]) for i, j in itertools.pairwise(bounds)]


def _joined(element: PixelElement, fragments: list[tuple[int, int]]) -> bytes:
    return b"".join(read_at(element.file, at, size) for at, size in fragments)


def _tell_apart(element: PixelElement, frames: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Where fragments lie, and the first of each frame among them, with their number at the end.

    Offset tables are often wrong, and are used only where nothing else tells frames apart: a
    fragment that begins like a codestream begins a frame, and one fragment a frame is the rule.
    """
    table, fragments = _walk(element)
    starts = [i for i, (at, size) in enumerate(fragments) if _begins(element, at, size)]
    if len(starts) > frames:  # a header may hold what looks like another's beginning
        starts = [i for i in starts if i == 0 or _ends(element, *fragments[i - 1])]
    if starts and starts[0] == 0 and len(starts) >= frames:
        if len(starts) > frames:
            what = f"The file holds {len(starts)} compressed pictures and states {frames}."
            element.say("frames", what)
        bounds = [*starts, len(fragments)]
    elif len(fragments) == frames or (frames == 1 and not starts):
        bounds = [*range(frames), len(fragments)]
    elif not starts and (found := _by_table(table, fragments, frames)):
        bounds = found
    else:
        raise ImageError(
            f"{element.name} states {frames} frames and holds {len(starts) or len(fragments)} "
            "compressed pictures.",
            "It was probably cut off or put together wrongly: export the series again.",
        )
    return fragments, bounds


def _walk(element: PixelElement) -> tuple[bytes, list[tuple[int, int]]]:
    """The basic offset table, and where each fragment lies: place and length."""
    file, order = element.file, "<HHI" if element.little else ">HHI"
    found: list[tuple[int, int]] = []
    at, end = element.start, file.seek(0, io.SEEK_END)
    if element.length is not None:
        end = min(end, at + element.length)
    while element.length is None or at < end:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            element.say("fragments", "The end of the compressed pictures is not marked.")
            break
        group, number, size = struct.unpack(order, head)
        tag = group << 16 | number
        if tag == DELIMITER:
            break
        is_item = tag == ITEM and size != UNDEFINED and len(found) <= MAX_FRAGMENTS
        if not is_item or at + 8 + size > end:
            raise cut_off(element.name)
        found.append((at + 8, size))
        at += 8 + size
    if not found:
        raise cut_off(element.name)
    start, size = found[0]
    if _begins(element, start, size):  # the table, even an empty one, was left out
        return b"", found
    file.seek(start)
    fragments = [fragment for fragment in found[1:] if fragment[1]]
    if not fragments:
        raise cut_off(element.name)
    return file.read(size), fragments


def _begins(element: PixelElement, at: int, size: int) -> bool:
    element.file.seek(at)
    return is_codestream(element.file.read(min(size, 12)))


def _ends(element: PixelElement, at: int, size: int) -> bool:
    """Whether a fragment ends as codestreams do: the last marker, and a zero to an even length."""
    last = min(size, 3)
    element.file.seek(at + size - last)
    return END_OF_IMAGE in element.file.read(last)


def _by_table(table: bytes, fragments: list[tuple[int, int]], frames: int) -> list[int] | None:
    """Where frames begin among the fragments by the offset table, if it fits them."""
    first = fragments[0][0]
    places = {at - first: i for i, (at, _) in enumerate(fragments)}
    offsets = struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
    if len(offsets) != frames or not all(offset in places for offset in offsets):
        return None
    bounds = [places[offset] for offset in offsets]
    return [*bounds, len(fragments)] if bounds == sorted(set(bounds)) and not bounds[0] else None


def read_rle(data: bytes, size: int, samples: int, name: str, say: Say) -> npt.NDArray[np.uint8]:
    """Planes of `size` bytes [N, size], the most significant of each sample first (PS3.5 G)."""
    if len(data) < 64:
        raise cut_off(name)
    count, *offsets = struct.unpack_from("<16I", data)
    bounds = [*offsets[:count], len(data)]
    ordered = all(low < high for low, high in itertools.pairwise(bounds))
    if not 1 <= count <= 15 or bounds[0] < 64 or not ordered or count % samples:
        raise cut_off(name)
    planes = np.empty((count, size), np.uint8)
    for plane, start, stop in zip(planes, bounds, bounds[1:], strict=False):
        unpacked, used = _unpack_bits(data[start:stop], size)
        if len(unpacked) != size:
            raise cut_off(name)
        if len(data[start:stop]) - used > 1:
            say("unused_data", "The compressed picture ends before its data does.")
        plane[:] = np.frombuffer(unpacked, np.uint8)
    return planes


def _unpack_bits(data: bytes, size: int) -> tuple[bytearray, int]:
    """Up to `size` bytes and a run, and how much of the data they took (PS3.5 G.3.2)."""
    unpacked = bytearray()
    at, end = 0, len(data)
    while at < end and len(unpacked) < size:
        count = data[at]
        if count < 128:
            unpacked += data[at + 1 : at + 2 + count]
            at += 2 + count
        else:
            if count > 128:
                unpacked += data[at + 1 : at + 2] * (257 - count)
            at += 2 if count > 128 else 1
    return unpacked, at
