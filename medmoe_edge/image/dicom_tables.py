"""Lookup tables as they truly are: modality, VOI, presentation and palette (PS3.3 C.11, C.7.9).

A descriptor has three numbers: how many entries (0 means 65,536), the first value mapped, and the
bits of an entry. Each of them is written wrongly by real devices, and the data is packed in more
than one way. So the data decides: how many entries it holds, and how many bits they need; and of
the two ways to read the first value, signed and unsigned, the one that meets the image's values.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from medmoe_edge.errors import ImageError

Say = Callable[[str, str], None]  # a notice's code and message


class Header:
    """A data set whose attributes are read by keyword, and never raise."""

    def __init__(self, dataset: Dataset, *, little: bool = True) -> None:
        self.dataset = dataset
        self.little = little

    def value(self, keyword: str) -> Any:
        """The attribute as pydicom reads it; None where it is absent, empty or unreadable."""
        try:
            value = self.dataset.get(keyword)
        except Exception:  # of a wrong length, no number, an unknown representation ...
            return None
        if value is None or (hasattr(value, "__len__") and len(value) == 0):
            return None
        return value

    def each(self, keyword: str) -> list[float | None]:
        """All values as finite numbers, each that is none as None; empty where none is stated."""
        return [_number(item) for item in self._listed(keyword)]

    def numbers(self, keyword: str) -> list[float]:
        """All values as finite numbers; empty where any of them is none."""
        numbers = [number for number in self.each(keyword) if number is not None]
        return numbers if len(numbers) == len(self._listed(keyword)) else []

    def number(self, keyword: str) -> float | None:
        """The first value as a finite number."""
        return next(iter(self.each(keyword)), None)

    def is_odd(self, keyword: str) -> bool:
        """Whether any value is stated and is no finite number."""
        return any(
            _number(item) is None and str(item).strip(" \0") for item in self._listed(keyword)
        )

    def whole(self, keyword: str) -> int | None:
        """The first value, where it is a whole number."""
        number = self.number(keyword)
        return int(number) if number is not None and number == int(number) else None

    def text(self, keyword: str) -> str:
        """The first value in capitals, stripped."""
        value = self.value(keyword)
        if _is_list(value):
            value = value[0]
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        return value.strip(" \0").upper() if isinstance(value, str) else ""

    def texts(self, keyword: str) -> list[str]:
        """All values in capitals, stripped."""
        value = self.value(keyword)
        values = value if _is_list(value) else [value]
        return [str(item).strip(" \0").upper() for item in values if item is not None]

    def items(self, keyword: str) -> list["Header"]:
        """The items of a sequence; empty where the attribute is none."""
        value = self.value(keyword)
        if not isinstance(value, Sequence):
            return []
        return [Header(item, little=self.little) for item in value]

    def keywords(self) -> Iterable[str]:
        """The keywords of all attributes."""
        return self.dataset.dir()

    def with_items(self, items: Iterable[tuple["Header", Iterable[str]]]) -> "Header":
        """This header with the items' attributes in place of its own and of those each replaces."""
        merged = Dataset()
        merged.update(self.dataset)
        for item, replaced in items:
            for keyword in replaced:
                merged.pop(keyword, None)
            for keyword in item.keywords():
                if item.value(keyword) is not None:
                    merged[keyword] = item.dataset[keyword]
        return Header(merged, little=self.little)

    def _listed(self, keyword: str) -> list[Any]:
        """The values of an attribute of numbers; of bytes as text if that is of text, else words.

        One value that is no number keeps pydicom from reading the others: then as they are written.
        """
        if keyword not in self.dataset:
            return []
        value = self.value(keyword)
        is_text = dictionary_VR(keyword) in ("DS", "IS")
        if value is None:
            raw = self.dataset.get_item(keyword).value
            value = raw if is_text or not raw else [None]  # there is one, and it cannot be read
        if isinstance(value, bytes) and is_text:
            return value.decode("ascii", "replace").strip(" \0").split("\\") if value else []
        if isinstance(value, bytes):
            order = "<u2" if self.little else ">u2"
            return list(np.frombuffer(value[: len(value) // 2 * 2], order).tolist())
        if value is None or isinstance(value, Sequence):
            return []
        return list(value) if _is_list(value) else [value]


def _number(item: object) -> float | None:
    try:
        number = float(item)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_list(value: object) -> bool:
    return isinstance(value, (MultiValue, list, tuple)) and len(value) > 0


MAX_ENTRIES = 2**16
NARROWER = 3  # bits that entries have to stay below those declared to be taken for narrower
COLOURS = ("Red", "Green", "Blue")
WHOLE = 2**16
Entries = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True)
class Table:
    """`entries` for the values from `first` on; lesser and greater ones take the ends."""

    first: int
    entries: Entries
    bits: int

    def apply(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The entries of values, which may be fractions of whole numbers."""
        places = np.rint(np.asarray(values, np.float64) - self.first)
        return self.entries[np.clip(places, 0, len(self.entries) - 1).astype(np.intp)].astype(
            np.float64
        )


def read_table(header: Header, domain: tuple[float, float], say: Say) -> Table | None:
    """A table of an item with a LUTDescriptor and LUTData; None where it is empty or no table.

    `domain` are the least and the greatest value that can come in.
    """
    descriptor = header.numbers("LUTDescriptor")
    if len(descriptor) != 3:
        return None
    entries = _entries(header, "LUTData", descriptor)
    if entries is None:
        return None
    bits = _bits_of(entries, int(descriptor[2]), say)
    return _made(descriptor, entries, bits, domain, say)


def _made(
    descriptor: list[float], entries: Entries, bits: int, domain: tuple[float, float], say: Say
) -> Table:
    first, stated = _first(descriptor, len(entries), domain), _stated_count(descriptor)
    if len(entries) < stated and first + len(entries) <= domain[1]:
        say(
            "lookup_table",
            f"A lookup table states {stated} entries and holds {len(entries)}: its last one stands "
            "for those that are missing.",
        )
    return Table(first, entries, bits)


def _stated_count(descriptor: list[float]) -> int:
    return int(descriptor[0]) % WHOLE or MAX_ENTRIES


def read_palette(
    header: Header, domain: tuple[float, float], name: str, say: Say
) -> tuple[Table, ...]:
    """The red, green and blue tables, all of the same bits.

    Raises `ImageError` where one is missing, or unfolds without end.
    """
    tables = []
    declared = 0
    for colour in COLOURS:
        descriptor = header.numbers(f"{colour}PaletteColorLookupTableDescriptor")
        if len(descriptor) != 3:
            raise _no_palette(name)
        segmented = header.value(f"Segmented{colour}PaletteColorLookupTableData")
        declared = max(declared, int(descriptor[2]))
        if segmented is not None:
            eight = int(descriptor[2]) == 8
            entries = _unfolded(_segments(header, segmented, eight), name, eight)
        else:
            found = _entries(header, f"{colour}PaletteColorLookupTableData", descriptor)
            if found is None:
                raise _no_palette(name)
            entries = found
        tables.append((descriptor, entries))
    bits = _bits_of(np.concatenate([entries for _, entries in tables]), declared, say)
    return tuple(_made(descriptor, entries, bits, domain, say) for descriptor, entries in tables)


def _no_palette(name: str) -> ImageError:
    return ImageError(f"{name} lacks its colour table.", "Save the picture as RGB or PNG.")


def _entries(header: Header, keyword: str, descriptor: list[float]) -> Entries | None:
    """Entries as 16-bit values, however they are packed."""
    count = _stated_count(descriptor)
    narrow = int(descriptor[2]) <= 8
    value = header.value(keyword)
    if value is None:
        return None
    if isinstance(value, bytes):
        data = value[: 2 * MAX_ENTRIES]
        words = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if header.little else ">u2")
        size = len(data)
    else:
        try:
            listed = list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]
            words = np.array([int(item) % WHOLE for item in listed[:MAX_ENTRIES]], np.uint16)
        except (TypeError, ValueError):
            return None
        size = 2 * len(words)
    packed = size < 2 * count and (narrow or size in (count, count + 1))
    if packed:  # two entries a word, the first in its low byte
        octets = words.astype("<u2").tobytes()
        if isinstance(value, bytes) and size % 2:
            octets += value[size - 1 : size]
        entries = np.frombuffer(octets, np.uint8)[:count].astype(np.uint16)
    else:
        entries = words.astype(np.uint16)
        if narrow and not (entries & 0xFF).any():
            entries >>= 8
    return entries if len(entries) else None


def _bits_of(entries: Entries, declared: int, say: Say) -> int:
    """The bits of an entry: those declared, unless the entries need more, or clearly have fewer.

    A table whose greatest entry needs a bit or two less is a dark one and shown so, except where
    that entry is the greatest of so many bits: then it reaches white.
    """
    greatest = int(entries.max())
    needed = greatest.bit_length()
    is_full = greatest + 1 == 1 << needed
    if not needed or (needed <= declared < needed + NARROWER and not is_full):
        return min(max(declared, 1), 16)
    if needed != declared:
        say(
            "lookup_table",
            f"A lookup table states {declared} bits and holds {needed}: it is shown by what it "
            "holds.",
        )
    return needed


def _first(descriptor: list[float], count: int, domain: tuple[float, float]) -> int:
    """The first value mapped, signed or unsigned: whichever lets the table meet more values."""
    stated = int(descriptor[1])
    low, high = domain

    def met(first: int) -> float:
        return min(first + count - 1, high) - max(first, low)

    others = (stated, stated - WHOLE if stated >= WHOLE // 2 else stated + WHOLE)
    return max(others, key=met) if met(stated) < 0 else stated


def _segments(header: Header, value: object, eight: bool) -> list[int]:
    data = value if isinstance(value, bytes) else b""
    order = "u1" if eight else "<u2" if header.little else ">u2"
    data = data[: 8 * MAX_ENTRIES]
    return np.frombuffer(data[: len(data) // 2 * 2], order).tolist()  # type: ignore[no-any-return]


def _unfolded(words: list[int], name: str, eight: bool) -> Entries:
    """Entries of a segmented table (PS3.3 C.7.9.2): an opcode, a length, and what it stands for.

    0 lists values, 1 draws a line to its one value, and 2 repeats segments from a place on, whose
    number takes four words of `eight` bits or two of 16.
    """
    entries: list[int] = []
    _unfold(words, 0, len(words), entries, name, 4 if eight else 2)
    if not entries:
        raise _no_palette(name)
    return np.array(entries, np.uint16)


def _unfold(
    words: list[int], at: int, segments: int, entries: list[int], name: str, place_words: int
) -> None:
    while segments > 0 and at + 1 < len(words):
        opcode, length = words[at : at + 2]
        segments -= 1
        if opcode == 0:
            entries += words[at + 2 : at + 2 + length]
            at += 2 + length
        elif opcode == 1 and entries and at + 2 < len(words):
            start, end = entries[-1], words[at + 2]
            steps = np.linspace(start, end, length + 1)[1:]
            entries += np.rint(steps).astype(int).tolist()
            at += 3
        elif opcode == 2 and place_words and at + 1 + place_words < len(words):
            parts = words[at + 2 : at + 2 + place_words]
            place = sum(part << 32 // place_words * i for i, part in enumerate(parts))
            _unfold(words, place, length, entries, name, 0)
            at += 2 + place_words
        elif opcode == 0xFFFF or (opcode == 0 and length == 0):  # padding
            break
        else:
            raise ImageError(f"{name} has an unsupported colour table.", "Save it as RGB or PNG.")
        if len(entries) > MAX_ENTRIES:
            raise ImageError(f"{name} has an unsupported colour table.", "Save it as RGB or PNG.")
