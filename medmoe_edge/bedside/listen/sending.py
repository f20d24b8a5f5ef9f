"""What is sent on: documents by C-STORE, FHIR transactions by HTTP POST; each until it is taken.

A document may arrive twice, where an acknowledgement was lost: it is then the same object with the
same UIDs, which a DICOM node stores once and a FHIR server creates once (`ifNoneExist`).
"""

import io

import httpx
from pydicom import dcmread
from pynetdicom.ae import ApplicationEntity
from pynetdicom.status import code_to_category

from medmoe_edge.bedside.listen.config import Destination, DicomDestination, FhirDestination
from medmoe_edge.bedside.listen.files import Folder
from medmoe_edge.bedside.listen.queue import Queue
from medmoe_edge.errors import ResourceError

TIMEOUT = 30.0  # seconds


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

    def pending(self, limit: int) -> list[str]:
        """The first documents that were not sent there."""
        return self.queue.unsent(self.destination.name, limit)

    def do(self, document: str) -> None:
        """Send one document; raises `ResourceError` or `httpx.HTTPError` where it is not taken."""
        data = (self.folder.documents / document).read_bytes()
        if isinstance(self.destination, DicomDestination):
            store(data, self.destination, self.ae_title)
        else:
            post(data, self.destination)
        self.queue.sent(document, self.destination.name)


def store(data: bytes, node: DicomDestination, ae_title: str) -> None:
    """Send a DICOM file by C-STORE; raises `ResourceError` unless it is stored."""
    dataset = dcmread(io.BytesIO(data))
    entity = ApplicationEntity(ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT
    entity.connection_timeout = TIMEOUT
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate(node.host, node.port, ae_title=node.ae_title)
    if not association.is_established:
        raise ResourceError("The DICOM destination cannot be reached.", "Is it running?")
    try:
        status = association.send_c_store(dataset).get("Status", 0xC000)
    except ValueError as error:  # it takes no such objects
        raise ResourceError(
            "The DICOM destination takes no such documents.", "Configure others."
        ) from error
    finally:
        association.release()
    if code_to_category(status) not in ("Success", "Warning"):
        raise ResourceError(
            f"The DICOM destination refused a document (0x{status:04X}).", "See its log."
        )


def post(data: bytes, server: FhirDestination) -> None:
    """Post a FHIR transaction; raises `httpx.HTTPError` unless it is done."""
    headers = {"Content-Type": "application/fhir+json", "Accept": "application/fhir+json"}
    if server.token_file is not None:
        headers["Authorization"] = f"Bearer {server.token_file.read_text('utf-8').strip()}"
    response = httpx.post(str(server.url), content=data, headers=headers, timeout=TIMEOUT)
    response.raise_for_status()
