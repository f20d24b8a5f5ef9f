"""A thread that does one job after another; what fails is tried again later, and later still.

When is kept in memory, by a clock that never jumps; after a restart everything is tried at once.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)
IDLE = 1.0  # seconds between looks, when nobody wakes it
FIRST_DELAY, LONGEST_DELAY = 1.0, 300.0  # seconds, doubled with each failure


class Worker(threading.Thread):
    """Calls `do` for the keys that `pending(limit)` names, in order.

    `do` ends well, or raises: then the key is left for later. It must not be in the log what the
    key stands for, so the log tells the kind of an error alone.
    """

    def __init__(
        self,
        name: str,
        pending: Callable[[int], Sequence[str]],
        do: Callable[[str], None],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._pending, self._do = pending, do
        self._stopping, self._awake = threading.Event(), threading.Event()
        self._delayed: dict[str, tuple[float, float]] = {}  # key -> not before, next delay

    def wake(self) -> None:
        """There is something new."""
        self._awake.set()

    def stop(self) -> None:
        """End after the job at hand; `join` waits for that."""
        self._stopping.set()
        self._awake.set()

    def run(self) -> None:
        """The thread's life."""
        while not self._stopping.is_set():
            self._awake.clear()
            try:
                key = self._next()
                if key is not None:
                    self._attempt(key)
                    continue
            except Exception as error:
                log.error("%s cannot work (%s): waiting.", self.name, type(error).__name__)
            self._awake.wait(IDLE)

    def _next(self) -> str | None:
        """The first key that is due; one more than the delayed are asked for, so it is seen."""
        now = time.monotonic()
        keys = self._pending(len(self._delayed) + 1)
        return next((key for key in keys if self._delayed.get(key, (0.0,))[0] <= now), None)

    def _attempt(self, key: str) -> None:
        try:
            self._do(key)
            self._delayed.pop(key, None)
        except Exception as error:
            _, delay = self._delayed.get(key, (0.0, FIRST_DELAY))
            self._delayed[key] = time.monotonic() + delay, min(2 * delay, LONGEST_DELAY)
            kind = type(error).__name__
            log.warning("%s: %s failed (%s), again in %.0f s.", self.name, key[:16], kind, delay)
