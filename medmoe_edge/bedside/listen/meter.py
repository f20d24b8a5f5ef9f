"""How much a peer may send for one object: what it has sent is in memory until it is whole."""

import logging
import weakref

from pynetdicom.association import Association
from pynetdicom.events import Event

log = logging.getLogger(__name__)


class Meter:
    """Counts the bytes of the message at hand; beyond `limit` the connection is closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._received: weakref.WeakKeyDictionary[Association, int] = weakref.WeakKeyDictionary()

    def data(self, event: Event) -> None:
        """Data of an association have come in."""
        association = event.assoc
        total = self._received.get(association, 0) + len(event.data)
        self._received[association] = total
        if total > self._limit:
            log.warning("A connection was closed: its object is larger than allowed.")
            _hang_up(association)

    def message(self, event: Event) -> None:
        """A message is whole: the next begins."""
        self._received[event.assoc] = 0


def _hang_up(association: Association) -> None:
    """Close the connection under the association, which its own thread then notices."""
    connection = association.dul.socket
    if connection is not None and connection.socket is not None:
        descriptor = connection.socket
        connection.close()
        descriptor.close()  # pynetdicom leaves it open where the peer was faster
