"""What a DICOM header says, read so that no odd attribute can stop the picture.

Any optional attribute may be absent, empty, multi-valued, of another value representation or no
number at all. Here each of these reads as "does not say", and only what a picture cannot do without
is asked for by name.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

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

    def numbers(self, keyword: str) -> list[float]:
        """All values as finite numbers; empty where any of them is none."""
        value = self.value(keyword)
        if isinstance(value, Sequence):
            return []
        if isinstance(value, bytes):
            value = self._unpacked(keyword, value)
        try:
            numbers = [float(item) for item in (value if _is_list(value) else [value])]
        except (TypeError, ValueError):
            return []
        return numbers if all(map(math.isfinite, numbers)) else []

    def number(self, keyword: str) -> float | None:
        """The first value as a finite number."""
        value = self.value(keyword)
        try:
            first = float(value[0] if _is_list(value) else value)
        except (TypeError, ValueError):
            return next(iter(self.numbers(keyword)), None)
        return first if math.isfinite(first) else None

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

    def with_items(self, items: Iterable["Header"]) -> "Header":
        """This header with the attributes of the items in place of its own, where they say more."""
        merged = Dataset()
        merged.update(self.dataset)
        for item in items:
            for keyword in item.keywords():
                if item.value(keyword) is not None:
                    merged[keyword] = item.dataset[keyword]
        return Header(merged, little=self.little)

    def _unpacked(self, keyword: str, value: bytes) -> object:
        """Bytes of an attribute of numbers: as text where it is of text, else as 16-bit words."""
        if dictionary_VR(keyword) in ("DS", "IS"):
            return value.decode("ascii", "replace").strip(" \0").split("\\")
        order = "<u2" if self.little else ">u2"
        return np.frombuffer(value[: len(value) // 2 * 2], order).tolist()


def _is_list(value: object) -> bool:
    return isinstance(value, (MultiValue, list, tuple)) and len(value) > 0
