"""Types and small functions that the whole package shares; each is defined here once."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads`; raises `ValueError` for a key that is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice in one object: leave one of them")
        found[name] = value
    return found
