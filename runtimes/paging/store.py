"""Where a pager takes experts from, and what it counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Expert = tuple[int, int]  # the layer, counted among those with experts, and the expert in it
T = TypeVar("T")


class Store(Protocol[T]):
    """Where experts come from. One `load` runs at a time; `release` is quick."""

    @property
    def sizes(self) -> Mapping[Expert, int]:
        """Bytes that each takes while it is in memory."""

    @property
    def stored(self) -> Mapping[Expert, int]:
        """Bytes that are read to load each."""

    @property
    def scratch(self) -> int:
        """Further bytes while one is being loaded, at most."""

    def announce(self, experts: Sequence[Expert]) -> None:
        """Hear which will be loaded, in order: time to read ahead."""

    def load(self, expert: Expert) -> T:
        """Bring one into memory; where it raises, nothing of it is left there."""

    def release(self, value: T) -> None:
        """Take it out of memory: the bytes are free when this returns."""


@dataclass
class Counts:
    """What became of the experts asked for.

    `hits` were in memory, `late` on their way, `misses` neither; `loads` of `bytes_read` were
    made, with those ahead of need, and `stall` seconds spent waiting for experts.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    loads: int = 0
    bytes_read: int = 0
    stall: float = 0.0
