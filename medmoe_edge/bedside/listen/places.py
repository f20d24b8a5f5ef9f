"""The places that `max_associations` gives to senders."""

import threading
import weakref

from pynetdicom.association import Association


class Places:
    """At most `number` associations have one, each from its request to its end."""

    def __init__(self, number: int) -> None:
        self._number, self._lock = number, threading.Lock()
        self._taken = weakref.WeakSet[Association]()

    def take(self, association: Association) -> bool:
        """Give it a place, if one is free."""
        with self._lock:
            if sum(map(_is_open, self._taken)) >= self._number:
                return False
            self._taken.add(association)
            return True


def _is_open(association: Association) -> bool:
    """Whether one that was let in has not come to its end."""
    ended = association.is_released or association.is_aborted or association.is_rejected
    return association.is_alive() and not ended
