"""The DICOM node: receives, answers and sends, each in threads of its own, over one queue.

A thread does one job after another; what fails is tried again later, and later still. When is kept
in memory, by a clock that never jumps; after a restart everything is tried at once.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import filelock
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.events import EventHandlerType
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from medmoe_edge.bedside.listen.answering import Answering, Asked
from medmoe_edge.bedside.listen.config import Configuration, Destination
from medmoe_edge.bedside.listen.fetching import Fetching
from medmoe_edge.bedside.listen.queue import Folder, Queue
from medmoe_edge.bedside.listen.receiving import (
    MessageSizeLimit,
    Receiving,
    classes_set_aside,
    classes_with_pixels,
    transfer_syntaxes,
)
from medmoe_edge.bedside.listen.report_sr import Locator
from medmoe_edge.bedside.listen.sending import Sending, commitment_handlers
from medmoe_edge.errors import MedMoEError, ResourceError
from medmoe_edge.image.pixels import MAX_BYTES

log = logging.getLogger(__name__)
VERIFICATION = "1.2.840.10008.1.1"
PATIENCE = 10.0  # seconds that open associations get to end by themselves
# Their messages quote UIDs, AE titles and values of what they read.
TALKATIVE = (
    *("pynetdicom", "pydicom", "highdicom", "httpx", "httpcore"),
    *("dicomweb_client", "urllib3", "hl7"),
)
IDLE = 1.0  # seconds between looks, when nobody wakes it
FIRST_DELAY, LONGEST_DELAY = 1.0, 300.0  # seconds, doubled with each failure


class Worker(threading.Thread):
    """Calls `do` for the keys that `pending(limit)` names, in order.

    `do` ends well, or raises: then the key is left for later. It must not be in the log what the
    key stands for, so the log tells an error's own words only where they are ours. `rest` is called
    when there is nothing to do for now, and at the end.
    """

    def __init__(
        self,
        name: str,
        pending: Callable[[int], Sequence[str]],
        do: Callable[[str], None],
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._pending, self._do, self._rest = pending, do, rest
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
                self._rest()
            except Exception as error:
                log.error("%s cannot work (%s): waiting.", self.name, type(error).__name__)
            self._awake.wait(IDLE)
        self._rest()

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
            why = error.what if isinstance(error, MedMoEError) else type(error).__name__
            log.warning("%s: %s failed (%s), again in %.0f s.", self.name, key[:16], why, delay)


class Node:
    """A node at work inside `with`; `engine` is used by one thread alone.

    Raises `ResourceError` where its port or its folder is in use.
    """

    def __init__(
        self, configuration: Configuration, engine: Asked, locator: Locator | None = None
    ) -> None:
        self.configuration = configuration
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.folder = Folder(configuration.folder)
        self._lock = filelock.FileLock(self.folder.lock, timeout=0, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise ResourceError(
                "Another node works in this folder.",
                "One node owns a queue: stop it, or give each node a folder of its own.",
            ) from error
        self.queue = Queue(self.folder.queue)
        needed = self.queue.images("waiting") | self.queue.images("failed")
        if configuration.keep_images:
            needed |= self.queue.images("answered")
        self.folder.sweep(needed)
        self.answering = Answering(configuration, self.folder, self.queue, engine, locator)
        self._answerer = Worker("Answering", self.answering.pending, self.answering.do)
        self._senders = [self._sender(each) for each in configuration.destinations]
        self.receiving = Receiving(configuration, self.folder, self.queue, self._answerer.wake)
        fetching = Fetching(configuration, self.queue, self.receiving)
        self._fetcher = Worker("Fetching", fetching.pending, fetching.do)
        self._workers = [self._answerer, self._fetcher, *self._senders]
        self._entity = _entity(configuration)
        self._server: ThreadedAssociationServer | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        receiving = self.receiving
        size_limit = MessageSizeLimit(min(self.configuration.max_object_mb * 1_000_000, MAX_BYTES))
        handlers: list[EventHandlerType] = [
            (evt.EVT_REQUESTED, receiving.requested),
            (evt.EVT_ACCEPTED, receiving.accepted),
            (evt.EVT_C_ECHO, receiving.echo),
            (evt.EVT_C_STORE, receiving.store),
            (evt.EVT_DATA_RECV, size_limit.data),
            (evt.EVT_DIMSE_RECV, size_limit.message),
            *commitment_handlers(self.queue),
        ]
        address = (self.configuration.host, self.configuration.port)
        tls = self.configuration.tls
        try:
            self._server = self._entity.start_server(
                address,
                block=False,
                evt_handlers=handlers,
                ssl_context=tls.server() if tls else None,
            )
        except OSError as error:
            self._close()
            raise ResourceError(
                f"The node cannot listen there ({error.strerror or type(error).__name__}).",
                "Is another running? Configure another host or port.",
            ) from error
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        """Let what is being received end, then what is being answered and sent."""
        if self._server is not None:
            self._server.shutdown()
        end = time.monotonic() + PATIENCE
        while self._entity.active_associations and time.monotonic() < end:
            time.sleep(0.05)
        self._entity.shutdown()
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        self._close()

    def _close(self) -> None:
        self.queue.close()
        self._lock.release()

    def _sender(self, destination: Destination) -> Worker:
        title = self.configuration.ae_title
        sending = Sending(destination, title, self.folder, self.queue)
        name = f"Sending to {destination.shown}"
        return Worker(name, sending.pending, sending.do, sending.rest)


def _entity(configuration: Configuration) -> ApplicationEntity:
    entity = ApplicationEntity(configuration.ae_title)
    entity.require_called_aet = True
    entity.maximum_associations = configuration.max_associations
    entity.acse_timeout = entity.dimse_timeout = configuration.timeout
    entity.network_timeout = configuration.timeout
    entity.add_supported_context(VERIFICATION)
    syntaxes = transfer_syntaxes()
    for uid in (*classes_with_pixels(), *classes_set_aside()):
        entity.add_supported_context(uid, syntaxes)
    if any(node.commitment for node in configuration.dicom):  # who answers calls as SCP
        uid = StorageCommitmentPushModel
        entity.add_supported_context(uid, scu_role=True, scp_role=True)
    return entity
