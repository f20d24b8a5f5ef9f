"""Where the time of an answer went."""

import time
from collections.abc import Mapping

from medmoe_edge.answer import Timings


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
    prefix: Mapping[str, float], own: Mapping[str, float], tokens: int, reused: bool
) -> Timings:
    """Of an answer, from the laps of its image's prefix and its own; `reused`: not its first."""
    shared = 0.0 if reused else sum(prefix.values())
    first_token = shared + own["question"]
    return Timings(
        **prefix,
        **own,
        first_token=first_token,
        total=first_token + own["decode"],
        tokens=tokens,
        prefix_reused=reused,
    )
