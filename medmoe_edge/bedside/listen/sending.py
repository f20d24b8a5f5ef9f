"""What is sent on, each document until it is taken, and the connections that it takes.

One that its destination refuses for good, time after time, while it takes others, is set aside
until a person has it sent again (`listen retry`). Where it takes none, the fault may be its own.

Documents of DICOM go by C-STORE or STOW-RS, FHIR transactions by HTTP POST, messages of HL7 version
2 by MLLP. All that waits for a DICOM node goes over one association, which ends when nothing waits
any more; then the node may be asked to say that it keeps what it has (Storage Commitment, PS3.4 J).

A document may arrive twice, where an acknowledgement was lost: it is then the same object with the
same UIDs, which a DICOM node stores once and a FHIR server creates once (`ifNoneExist`), or the
same message with the same control ID.
"""

import asyncio
import contextlib
import io
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hl7
import hl7.mllp
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
    generate_uid,
)
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.events import Event, EventHandlerType
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)
from pynetdicom.status import code_to_category

from medmoe_edge.bedside.listen.config import (
    Destination,
    DicomDestination,
    DicomSource,
    FhirDestination,
    Hl7Destination,
    StowDestination,
    WebSource,
)
from medmoe_edge.bedside.listen.queue import Folder, Queue
from medmoe_edge.bedside.listen.receiving import Limits
from medmoe_edge.errors import MedMoEError, ResourceError, shown_bytes
from medmoe_edge.image.pixels import MAX_BYTES

log = logging.getLogger(__name__)
Context = tuple[str, Sequence[str]]  # a class, and the transfer syntaxes that are offered for it
TIMEOUT = 30.0  # seconds
CLASSES = (
    *(Comprehensive3DSRStorage, BasicTextSRStorage, KeyObjectSelectionDocumentStorage),
    SecondaryCaptureImageStorage,
)
UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
COMMITMENT = "commitment"  # a job of the sender: no document has such a name
AT_ONCE = 500  # documents in one request for commitment
ACCEPTED = ("AA", "CA")  # of HL7 table 0008
LINES = re.compile(r"[\r\n]")
MALFORMED = (hl7.HL7Exception, hl7.mllp.InvalidBlockError)
SUCCESS = 0x0000
MOST_REDIRECTS = 5
ENCODINGS = ("", "identity", "gzip", "deflate")  # of answers
LONGEST_ANSWER = 16_000_000  # bytes; those that bring studies are read piece by piece
DICOM_JSON = "application/dicom+json"
LOG = "See its log."
MOST_FAILURES = 10  # of one document; from the first to the last it is 8.5 minutes
# Failures that pass: processing failure, resource limitation (PS3.7 annex C); 0xA7xx too.
PASSING = (0x0110, 0x0213)
DUPLICATE = 0x0111  # it has an object of that UID: this one, whose UID follows from what it says
# Of HTTP, those that are about who calls, or when.
PASSING_HTTP = (401, 407, 408, 425, 429)
SOME_KEPT = 202
WEB_PAGES = ("text/html", "application/xhtml+xml")  # which none of these services answers with
FAILED_SOP, REFERENCED_SOP = "00081198", "00081199"


class RefusedForGood(ResourceError):
    """A document that its destination refuses for what it is, and so would refuse again."""


class Gone(ResourceError):
    """A document whose file is no more."""


class Sending:
    """The work of the thread of one destination."""

    def __init__(
        self, destination: Destination, ae_title: str, folder: Folder, queue: Queue
    ) -> None:
        self.destination, self.ae_title = destination, ae_title
        self.folder, self.queue = folder, queue
        self._association: Association | None = None
        self._failures, self._refusals = Counter[str](), Counter[str]()
        self._taken = 0  # documents
        self._taken_before: dict[str, int] = {}  # by document, before it was first refused
        if isinstance(destination, DicomDestination) and destination.commitment:
            queue.forget_commitment(destination.name)  # the answer may have come meanwhile

    def pending(self, limit: int) -> list[str]:
        """The first documents that were not sent there; then the question whether it keeps them."""
        found = self.queue.unsent(self.destination.name, limit)
        node = self.destination
        if len(found) < limit and isinstance(node, DicomDestination) and node.commitment:
            found += [COMMITMENT] if self.queue.uncommitted(node.name, 1) else []
        return found

    def do(self, document: str) -> None:
        """Send one document; raises where it is not taken: mostly `ResourceError`, saying why."""
        try:
            self._send(document)
            self._taken += document != COMMITMENT
        except Exception as error:
            if not self._gives_up(document, error):
                raise
            why = error.what if isinstance(error, MedMoEError) else type(error).__name__
            self.queue.refused(document, self.destination.name, why)
            told = "%s was not taken by %s, %d times (%s): set aside. See: listen retry."
            log.error(told, document[:16], self.destination.shown, self._failures[document], why)
        for counted in (self._failures, self._refusals, self._taken_before):
            counted.pop(document, None)

    def _gives_up(self, document: str, error: Exception) -> bool:
        """Whether a document that failed once more is set aside.

        So is one whose result is replaced, whatever its failures: what replaced it waits for it.
        """
        self._failures[document] += 1
        if isinstance(error, RefusedForGood):
            self._refusals[document] += 1
            self._taken_before.setdefault(document, self._taken)
        if self._failures[document] < MOST_FAILURES:
            return False
        if isinstance(error, Gone) or self.queue.is_replaced(document[:64]):
            return True
        took_another = self._taken > self._taken_before.get(document, self._taken)
        return took_another and self._refusals[document] >= MOST_FAILURES

    def _send(self, document: str) -> None:
        if isinstance(self.destination, DicomDestination):
            try:
                if document == COMMITMENT:
                    self._ask_commitment(self.destination)
                    return
                self._store(self._data(document), self.destination)
            except BaseException:
                self.rest()
                raise
        elif isinstance(self.destination, StowDestination):
            stow(self._data(document), self.destination)
        elif isinstance(self.destination, FhirDestination):
            post(self._data(document), self.destination)
        else:
            say(self._data(document), self.destination)
        self.queue.sent(document, self.destination.name)

    def rest(self) -> None:
        """Nothing waits for now: end the association."""
        association, self._association = self._association, None
        if association is not None and association.is_established:
            association.release()

    def _data(self, document: str) -> bytes:
        try:
            return (self.folder.documents / document).read_bytes()
        except FileNotFoundError as error:
            self.folder.check()  # with which it comes back
            raise Gone("the document is gone", "Restore the node's folder.") from error

    def _connected(self, node: DicomDestination) -> Association:
        if self._association is None or not self._association.is_established:
            # each syntax for itself, so that the node need not choose
            found: list[Context] = [(uid, [syntax]) for uid in CLASSES for syntax in UNCOMPRESSED]
            handlers: list[EventHandlerType] = []
            if node.commitment:
                found.append((StorageCommitmentPushModel, UNCOMPRESSED))
                handlers = commitment_handlers(self.queue)
            self._association = associated(node, self.ae_title, found, handlers=handlers)
        return self._association

    def _store(self, data: bytes, node: DicomDestination) -> None:
        """Send a DICOM file by C-STORE, in the syntax that the node chose for its class."""
        association = self._connected(node)
        dataset: Dataset = dcmread(io.BytesIO(data))
        accepted = {
            context.transfer_syntax[0]
            for context in association.accepted_contexts
            if context.abstract_syntax == dataset.SOPClassUID
        }
        if not accepted:
            name = dataset.SOPClassUID.name
            raise RefusedForGood(f"it takes no {name}", "Configure other documents.")
        if dataset.file_meta.TransferSyntaxUID not in accepted:
            dataset = converted(dataset, min(accepted, key=UNCOMPRESSED.index))
        status = association.send_c_store(dataset).get("Status")
        if status is None:
            raise ResourceError("it does not answer", LOG)
        check_kept(status)

    def _ask_commitment(self, node: DicomDestination) -> None:
        """Ask whether it keeps what it has, by N-ACTION; it says so by `commitment_handlers`."""
        headers: dict[str, Dataset] = {}
        gone = []
        for each in self.queue.uncommitted(node.name, AT_ONCE):
            try:
                headers[each] = dcmread(self.folder.documents / each, stop_before_pixels=True)
            except FileNotFoundError:
                gone.append(each)
        self.folder.check()
        if gone:  # recorded as asked by no UID, so that the others' turn comes
            self.queue.ask_commitment(node.name, "", dict.fromkeys(gone, ""))
            log.warning(
                "%d documents are gone: %s cannot be asked whether it keeps them.",
                len(gone),
                node.shown,
            )
        if not headers:
            return
        request = Dataset()
        request.TransactionUID = asked = generate_uid()
        request.ReferencedSOPSequence = []
        for header in headers.values():
            item = Dataset()
            item.ReferencedSOPClassUID = header.SOPClassUID
            item.ReferencedSOPInstanceUID = header.SOPInstanceUID
            request.ReferencedSOPSequence.append(item)
        association = self._connected(node)
        uids = {each: str(header.SOPInstanceUID) for each, header in headers.items()}
        self.queue.ask_commitment(node.name, asked, uids)  # its answer may come at once
        try:
            status, _ = association.send_n_action(
                request, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
            )
        except ValueError as error:
            self.queue.forget_commitment(node.name, asked)
            raise ResourceError(
                "it offers no storage commitment", "Set commitment = false."
            ) from error
        if status.get("Status") != SUCCESS:
            self.queue.forget_commitment(node.name, asked)
            told = f"0x{status.Status:04X}" if "Status" in status else "no answer"
            raise ResourceError(f"it refused to commit itself: {told}", LOG)


def commitment_handlers(queue: Queue) -> list[EventHandlerType]:
    """Record what a node says of documents that it was asked to keep (N-EVENT-REPORT)."""

    def report(event: Event) -> tuple[int, None]:
        told = event.event_information
        asked = str(told.get("TransactionUID", ""))
        for keyword, state in (("ReferencedSOPSequence", "kept"), ("FailedSOPSequence", "failed")):
            items = told.get(keyword) or []
            uids = [str(item.get("ReferencedSOPInstanceUID", "")) for item in items]
            queue.commit(asked, uids, state)
            if state == "failed" and uids:
                log.error(
                    "A destination does not keep %d documents that it took (0x%04X). "
                    "See: listen status; listen requeue sends them again.",
                    len(uids),
                    int(items[0].get("FailureReason") or 0),
                )
        return SUCCESS, None

    return [(evt.EVT_N_EVENT_REPORT, report)]


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


def associated(
    node: DicomDestination | DicomSource,
    ae_title: str,
    contexts: Sequence[Context],
    handlers: Sequence[EventHandlerType] = (),
    **options: Any,
) -> Association:
    """An association with a node, over TLS where it is configured so; `ae_title` is who calls.

    `handlers` are of what the node sends over it, `options` those of pynetdicom's `associate`.
    Raises `ResourceError` where the node cannot be reached or rejects it, and `InputError` for
    certificates of no use.
    """
    entity = ApplicationEntity(ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT
    entity.connection_timeout = TIMEOUT
    for uid, syntaxes in contexts:
        entity.add_requested_context(uid, list(syntaxes))
    association = entity.associate(
        node.host,
        node.port,
        ae_title=node.ae_title,
        evt_handlers=[*Limits(MAX_BYTES, TIMEOUT).handlers, *handlers],
        tls_args=(node.tls.client(), node.host) if node.tls else None,
        **options,
    )
    if not association.is_established:
        why = "rejected the association" if association.is_rejected else "cannot be reached"
        hint = "Is it running, and does it know this AE title?"
        if node.tls:
            why, hint = f"{why} over TLS", f"{hint} Is its certificate from the authority?"
        raise ResourceError(f"it {why}", hint)
    return association


@contextlib.contextmanager
def called(
    server: StowDestination | FhirDestination | WebSource,
    path: str,
    headers: Mapping[str, str],
    data: bytes | None = None,
) -> Iterator[httpx.Response]:
    """Around reading a server's answer to a GET, or to a POST of `data`.

    Redirects of a GET are followed on the same host.

    What `iter_bytes` gives is inflated from the 64 KiB that are read at once, so that a piece has
    at most 66 MB (RFC 1951 knows no more than 1,032 times as much); others compress further.
    Raises `ResourceError` where no whole answer comes.
    """
    url = str(server.url)
    try:
        with (
            httpx.Client(
                timeout=TIMEOUT,
                verify=server.tls.client() if server.tls else True,
                follow_redirects=data is None,
                max_redirects=MOST_REDIRECTS,
                event_hooks={"response": [_check_redirect] if data is None else []},
            ) as client,
            client.stream(
                "GET" if data is None else "POST",
                url.rstrip("/") + path if path else url,
                content=data,
                headers={**headers, "Accept-Encoding": "gzip, deflate", **server.headers()},
            ) as response,
        ):
            encoding = response.headers.get("Content-Encoding", "").strip().lower()
            if encoding not in ENCODINGS:
                raise ResourceError("it compresses its answers in a way that was not asked", LOG)
            yield response
    except httpx.HTTPError as error:
        raise ResourceError(f"no answer: {type(error).__name__}", "Is it running?") from error


def _check_redirect(response: httpx.Response) -> None:
    """Raise `ResourceError` where a redirect leads to another host, or away from https."""
    if not response.has_redirect_location:
        return
    old, new = response.url, response.url.join(response.headers["Location"])
    if new.host != old.host or new.scheme not in (old.scheme, "https"):
        raise ResourceError("it redirects to elsewhere", "Configure the address that is meant.")


def check_kept(status: int) -> None:
    """Raise `ResourceError` unless a status of PS3.4 B.2.3 says that a document is kept."""
    if code_to_category(status) in ("Success", "Warning") or status == DUPLICATE:
        return
    error = ResourceError if passes(status) else RefusedForGood
    raise error(f"it refused the document: 0x{status:04X}", LOG)


def passes(status: int) -> bool:
    """Whether a failure may be none another time."""
    return status >> 8 == 0xA7 or status in PASSING


def check_done(response: httpx.Response) -> None:
    """Raise `ResourceError` unless an answer says that it is done."""
    status = response.status_code
    if not response.is_success:
        passes = not response.is_client_error or status in PASSING_HTTP
        error = ResourceError if passes else RefusedForGood
        raise error(f"it refused: HTTP {status}", LOG)
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in WEB_PAGES:  # of a network that wants a login, of another path
        raise ResourceError("it answered with a web page: is the address right?", LOG)


def read_json(response: httpx.Response) -> Any:
    """What a short answer says; None where it is no JSON.

    Raises `ResourceError` for one that is longer than `LONGEST_ANSWER`, or drips in.
    """
    body, end = bytearray(), time.monotonic() + TIMEOUT
    for piece in response.iter_bytes():
        body += piece
        if time.monotonic() > end:
            raise ResourceError("its answer does not come to its end", LOG)
        if len(body) > LONGEST_ANSWER:
            raise ResourceError(f"its answer has over {shown_bytes(LONGEST_ANSWER)}", LOG)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def stow(data: bytes, server: StowDestination) -> None:
    """Send a DICOM file by STOW-RS; raises `ResourceError` unless it is kept."""
    mark = secrets.token_hex(16)
    head = f"--{mark}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    body = head + data + f"\r\n--{mark}--\r\n".encode()
    kind = f'multipart/related; type="application/dicom"; boundary={mark}'
    headers = {"Content-Type": kind, "Accept": DICOM_JSON}
    with called(server, "/studies", headers, body) as response:
        told = read_json(response)
        failed = _items(told, FAILED_SOP)
        if failed:
            check_kept(_failure_reason(failed[0]))
            return
        check_done(response)
        if response.status_code == SOME_KEPT and not _items(told, REFERENCED_SOP):
            raise ResourceError("it does not say whether it keeps the document", LOG)


def _items(told: Any, sequence: str) -> list[Any]:
    """Of a sequence in an answer in DICOM JSON (PS3.18, 10.5.3), which may come in a list."""
    found: list[Any] = []
    for part in told if isinstance(told, list) else [told]:
        with contextlib.suppress(LookupError, TypeError):
            found += part[sequence]["Value"]
    return found


def _failure_reason(failed: Any) -> int:
    """Why the one object that was sent is not kept."""
    try:
        return int(failed["00081197"]["Value"][0])
    except (LookupError, TypeError, ValueError):
        return PASSING[0]


def post(data: bytes, server: FhirDestination) -> None:
    """Post a FHIR transaction; raises `ResourceError` unless it is done."""
    headers = {"Content-Type": "application/fhir+json", "Accept": "application/fhir+json"}
    with called(server, "", headers, data) as response:
        check_done(response)


def say(data: bytes, receiver: Hl7Destination) -> None:
    """Send a message by MLLP; raises `ResourceError` unless it is acknowledged as accepted."""
    from medmoe_edge.bedside.listen.hl7 import addressed  # half a second to import

    message = addressed(data, receiver.application, receiver.facility)
    try:
        told = asyncio.run(asyncio.wait_for(_exchange(message, receiver), TIMEOUT))
        lines = filter(None, LINES.split(told))  # some end segments as their system ends lines
        answer = hl7.parse("\r".join(lines)).segment("MSA")
        acknowledgement, number = str(answer[1]), str(answer[2])
    except (OSError, EOFError, ValueError, LookupError, *MALFORMED) as error:
        raise ResourceError(f"no answer: {type(error).__name__}", "Is it running?") from error
    if acknowledgement not in ACCEPTED:
        raise RefusedForGood(f"it refused the message: {acknowledgement[:2]}", LOG)
    if number.encode() != message.split(b"|")[9]:
        raise ResourceError("it acknowledged another message", LOG)


async def _exchange(message: bytes, receiver: Hl7Destination) -> str:
    context = receiver.tls.client() if receiver.tls else None
    reader, writer = await hl7.mllp.open_hl7_connection(
        receiver.host, receiver.port, encoding="utf-8", ssl=context
    )
    try:
        writer.writeblock(message)
        await writer.drain()
        block: bytes = await reader.readblock()
        return block.decode("utf-8", "replace")
    finally:
        writer.close()
