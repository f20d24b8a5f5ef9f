"""The DICOM node: receives, answers and sends, each in threads of its own, over one queue.

What is sent on: documents by C-STORE, FHIR transactions by HTTP POST; each until it is taken.

All that waits for a DICOM node goes over one association, which ends when nothing waits any more.

A document may arrive twice, where an acknowledgement was lost: it is then the same object with the
same UIDs, which a DICOM node stores once and a FHIR server creates once (`ifNoneExist`).
"""

import io
import logging
import time
from types import TracebackType
from typing import Self

import filelock
import httpx
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    SecondaryCaptureImageStorage,
)
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.status import code_to_category
from pynetdicom.transport import ThreadedAssociationServer

from medmoe_edge.bedside.listen.answering import Answering, Asked
from medmoe_edge.bedside.listen.config import (
    Configuration,
    Destination,
    DicomDestination,
    FhirDestination,
)
from medmoe_edge.bedside.listen.queue import Folder, Queue, Worker
from medmoe_edge.bedside.listen.receiving import (
    MessageSizeLimit,
    Receiving,
    classes_set_aside,
    classes_with_pixels,
    transfer_syntaxes,
)
from medmoe_edge.bedside.listen.report_sr import Locator
from medmoe_edge.errors import ResourceError
from medmoe_edge.image.pixels import MAX_BYTES

log = logging.getLogger(__name__)
VERIFICATION = "1.2.840.10008.1.1"
PATIENCE = 10.0  # seconds that open associations get to end by themselves
# Their messages quote UIDs, AE titles and values of what they read.
TALKATIVE = ("pynetdicom", "pydicom", "highdicom", "httpx", "httpcore")


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
                "Another node works in this folder: a queue has one owner.",
                "Stop it, or give each node a folder of its own.",
            ) from error
        self.queue = Queue(self.folder.queue)
        needed = self.queue.images("waiting") | self.queue.images("failed")
        if configuration.keep_images:
            needed |= self.queue.images("answered")
        self.folder.sweep(needed)
        self.answering = Answering(configuration, self.folder, self.queue, engine, locator)
        self._answerer = Worker("Answering", self.answering.pending, self.answering.do)
        self._senders = [self._sender(each) for each in configuration.destinations]
        self._entity = _entity(configuration)
        self._server: ThreadedAssociationServer | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        receiving = Receiving(self.configuration, self.folder, self.queue, self._answerer.wake)
        size_limit = MessageSizeLimit(min(self.configuration.max_object_mb * 1_000_000, MAX_BYTES))
        handlers: list[EventHandlerType] = [
            (evt.EVT_REQUESTED, receiving.requested),
            (evt.EVT_ACCEPTED, receiving.accepted),
            (evt.EVT_C_ECHO, receiving.echo),
            (evt.EVT_C_STORE, receiving.store),
            (evt.EVT_DATA_RECV, size_limit.data),
            (evt.EVT_DIMSE_RECV, size_limit.message),
        ]
        address = (self.configuration.host, self.configuration.port)
        try:
            self._server = self._entity.start_server(address, block=False, evt_handlers=handlers)
        except OSError as error:
            self._close()
            raise ResourceError(
                f"The node cannot listen there ({error.strerror or type(error).__name__}).",
                "Is another running? Configure another host or port.",
            ) from error
        for worker in (self._answerer, *self._senders):
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
        for worker in (self._answerer, *self._senders):
            worker.stop()
        for worker in (self._answerer, *self._senders):
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
    return entity


TIMEOUT = 30.0  # seconds
CLASSES = (
    *(Comprehensive3DSRStorage, BasicTextSRStorage, KeyObjectSelectionDocumentStorage),
    SecondaryCaptureImageStorage,
)
UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)


class Sending:
    """The work of the thread of one destination."""

    def __init__(
        self,
        destination: Destination,
        ae_title: str,
        folder: Folder,
        queue: Queue,
    ) -> None:
        self.destination, self.ae_title = destination, ae_title
        self.folder, self.queue = folder, queue
        self._association: Association | None = None

    def pending(self, limit: int) -> list[str]:
        """The first documents that were not sent there."""
        return self.queue.unsent(self.destination.name, limit)

    def do(self, document: str) -> None:
        """Send one document; raises `ResourceError`, saying why, where it is not taken."""
        data = (self.folder.documents / document).read_bytes()
        if isinstance(self.destination, DicomDestination):
            try:
                self._store(data, self.destination)
            except BaseException:
                self.rest()
                raise
        else:
            post(data, self.destination)
        self.queue.sent(document, self.destination.name)

    def rest(self) -> None:
        """Nothing waits for now: end the association."""
        association, self._association = self._association, None
        if association is not None and association.is_established:
            association.release()

    def _store(self, data: bytes, node: DicomDestination) -> None:
        """Send a DICOM file by C-STORE, in the syntax that the node chose for its class."""
        if self._association is None or not self._association.is_established:
            self._association = associated(node, self.ae_title)
        dataset: Dataset = dcmread(io.BytesIO(data))
        accepted = {
            context.transfer_syntax[0]
            for context in self._association.accepted_contexts
            if context.abstract_syntax == dataset.SOPClassUID
        }
        if not accepted:
            name = dataset.SOPClassUID.name
            raise ResourceError(f"it takes no {name}", "Configure other documents.")
        if dataset.file_meta.TransferSyntaxUID not in accepted:
            dataset = converted(dataset, min(accepted, key=UNCOMPRESSED.index))
        status = self._association.send_c_store(dataset).get("Status")
        if status is None:
            raise ResourceError("it does not answer", "See its log.")
        if code_to_category(status) not in ("Success", "Warning"):
            raise ResourceError(f"it refused the document: 0x{status:04X}", "See its log.")


def converted(dataset: Dataset, syntax: UID) -> Dataset:
    """A document in another uncompressed transfer syntax; those made here have bytes as pixels."""
    buffer = io.BytesIO()
    list(dataset.iterall())  # values, in place of bytes in the old order
    dataset.file_meta.TransferSyntaxUID = syntax
    dcmwrite(
        buffer,
        dataset,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
        force_encoding=True,
    )
    return dcmread(io.BytesIO(buffer.getvalue()), force=True)


def associated(node: DicomDestination, ae_title: str) -> Association:
    """An association for all kinds of documents in all uncompressed syntaxes.

    Raises `ResourceError` where the node cannot be reached or rejects it.
    """
    entity = ApplicationEntity(ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT
    entity.connection_timeout = TIMEOUT
    for uid in CLASSES:
        for syntax in UNCOMPRESSED:  # each for itself, so that the node need not choose
            entity.add_requested_context(uid, syntax)
    association = entity.associate(node.host, node.port, ae_title=node.ae_title)
    if not association.is_established:
        why = "rejected the association" if association.is_rejected else "cannot be reached"
        raise ResourceError(f"it {why}", "Is it running, and does it know this AE title?")
    return association


def post(data: bytes, server: FhirDestination) -> None:
    """Post a FHIR transaction; raises `ResourceError` unless it is done."""
    headers = {"Content-Type": "application/fhir+json", "Accept": "application/fhir+json"}
    if server.token_file is not None:
        headers["Authorization"] = f"Bearer {server.token_file.read_text('utf-8').strip()}"
    try:
        response = httpx.post(str(server.url), content=data, headers=headers, timeout=TIMEOUT)
    except httpx.HTTPError as error:
        raise ResourceError(f"no answer: {type(error).__name__}", "Is it running?") from error
    if not response.is_success:
        raise ResourceError(f"it refused: HTTP {response.status_code}", "See its log.")
