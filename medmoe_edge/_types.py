"""Types that the whole package shares, each defined here once; and results as plain JSON."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

Progress = Callable[[str, int, int], None]
"""Told of long work as `(step, done, total)`: what is being done, and how far it is."""


def no_progress(step: str, done: int, total: int) -> None:
    """The `Progress` that tells nobody."""


Counting = Callable[[int, int], None]
"""The same of one step: told of `(done, total)`."""


def no_counting(done: int, total: int) -> None:
    """The `Counting` that tells nobody."""


def there(value: T | None) -> T:
    """A value that is never missing where it is asked for, though its type allows for that."""
    assert value is not None
    return value


LATER = "later"  # of a field that is left out where it has its default


@dataclasses.dataclass(frozen=True)
class Told:
    """Base of what is told as JSON: its fields, then the properties that `TOLD` names."""

    TOLD: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values (tuples become lists)."""
        names = [
            field.name
            for field in dataclasses.fields(self)
            if not field.metadata.get(LATER) or getattr(self, field.name) != field.default
        ]
        return {name: plain(getattr(self, name)) for name in (*names, *self.TOLD)}


def plain(value: Any) -> Any:
    """Records, and mappings and sequences of them, as plain JSON values."""
    if isinstance(value, Told):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):  # of a NamedTuple
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
