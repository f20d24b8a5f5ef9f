"""What is sent on: documents by C-STORE, FHIR transactions by HTTP POST; each until it is taken.

All that waits for a DICOM node goes over one association, which ends when nothing waits any more.

A document may arrive twice, where an acknowledgement was lost: it is then the same object with the
same UIDs, which a DICOM node stores once and a FHIR server creates once (`ifNoneExist`).
"""

import io

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
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.status import code_to_category

from medmoe_edge.bedside.listen.config import Destination, DicomDestination, FhirDestination
from medmoe_edge.bedside.listen.queue import Folder, Queue
from medmoe_edge.errors import ResourceError

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
