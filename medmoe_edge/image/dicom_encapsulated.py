"""Encapsulated pixel data (PS3.5 A.4, annex G): which fragments are a frame's, and run lengths.

Fragments, the number of frames and the codestreams in them must agree. Where they do not, the file
is refused, or what it holds too much of is named.
"""

import io
import itertools
import struct

import numpy as np
import numpy.typing as npt

from medmoe_edge.errors import ImageError
from medmoe_edge.image.codestreams import END_OF_IMAGE, cut_off, is_codestream
from medmoe_edge.image.dicom_container import PixelElement
from medmoe_edge.image.dicom_header import Say

MAX_FRAGMENTS = 10_000_000
ITEM, DELIMITER = 0xFFFEE000, 0xFFFEE0DD


def read_codestream_of(
    element: PixelElement, little: bool, frames: int, index: int, name: str, say: Say
) -> bytes:
    """The codestream of one frame (PS3.5 A.4).

    Offset tables are often wrong, and are used only where nothing else tells frames apart: a
    fragment that begins like a codestream begins a frame, and one fragment a frame is the rule.
    """
    table, fragments = _walk(element, little, name, say)
    starts = [i for i, (at, size) in enumerate(fragments) if _begins(element, at, size)]
    if len(starts) > frames:  # a header may hold what looks like another's beginning
        starts = [i for i in starts if i == 0 or _ends(element, *fragments[i - 1])]
    if starts and starts[0] == 0 and len(starts) >= frames:
        if len(starts) > frames:
            say(
                "frames",
                f"The file holds {len(starts)} compressed pictures and states {frames}.",
            )
        bounds = [*starts, len(fragments)]
    elif len(fragments) == frames or (frames == 1 and not starts):
        bounds = [*range(frames), len(fragments)]
    elif not starts and (found := _by_table(table, fragments, frames)):
        bounds = found
    else:
        raise ImageError(
            f"{name} states {frames} frames and holds {len(starts) or len(fragments)} compressed "
            "pictures.",
            "It was probably cut off or put together wrongly: export the series again.",
        )
    parts = []
    for at, size in fragments[bounds[index] : bounds[index + 1]]:
        element.file.seek(at)
        parts.append(element.file.read(size))
    return b"".join(parts)


def _walk(
    element: PixelElement, little: bool, name: str, say: Say
) -> tuple[bytes, list[tuple[int, int]]]:
    """The basic offset table, and where each fragment lies: place and length."""
    file, order = element.file, "<HHI" if little else ">HHI"
    found: list[tuple[int, int]] = []
    at, end = element.start, file.seek(0, io.SEEK_END)
    if element.length is not None:
        end = min(end, at + element.length)
    while element.length is None or at < end:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            say("fragments", "The end of the compressed pictures is not marked.")
            break
        group, number, size = struct.unpack(order, head)
        tag = group << 16 | number
        if tag == DELIMITER:
            break
        if tag != ITEM or size == 0xFFFFFFFF or len(found) > MAX_FRAGMENTS:
            raise cut_off(name)
        if at + 8 + size > end:
            raise cut_off(name)
        found.append((at + 8, size))
        at += 8 + size
    if not found:
        raise cut_off(name)
    start, size = found[0]
    if _begins(element, start, size):  # the table, even an empty one, was left out
        return b"", found
    file.seek(start)
    fragments = [fragment for fragment in found[1:] if fragment[1]]
    if not fragments:
        raise cut_off(name)
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
