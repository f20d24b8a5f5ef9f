"""Where the time of an answer went."""

import time
from collections.abc import Mapping

from medmoe_edge.engine.answer import Timings


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the lap that began with the last one's end, or with the clock."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def timings(
    prefix: Mapping[str, float],
    own: Mapping[str, float],
    tokens: int,
    *,
    first: bool,
    reused: bool,
) -> Timings:
    """Of an answer, from the laps of its image's prefix and its own.

    The `first` answer about an image bears the prefix's time; `reused`: that was merely fetched.
    """
    first_token = (sum(prefix.values()) if first else 0.0) + own["question"]
    return Timings(
        **prefix,
        **own,
        first_token=first_token,
        total=first_token + own["decode"],
        tokens=tokens,
        prefix_reused=reused or not first,
    )
