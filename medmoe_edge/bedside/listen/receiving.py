"""C-ECHO, C-STORE and STOW-RS: what is let in, and what is kept before the sender is told so.

The statuses are those of PS3.4 B.2.3 and PS3.7 annex C; STOW-RS has the same as failure reasons.
"""

import contextlib
import functools
import hashlib
import io
import ipaddress
import logging
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.uid import UID, AllTransferSyntaxes, DeflatedExplicitVRLittleEndian
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event, EventHandlerType
from pynetdicom.presentation import build_context
from python_multipart.multipart import MultipartParser, parse_options_header

from medmoe_edge.bedside.listen.config import Configuration
from medmoe_edge.bedside.listen.header import (
    BODY_PARTS,
    Origin,
    body_parts_of,
    check_uids,
    modality_of,
    notices_of,
    origin_of,
    same_patient,
    text_of,
    uid_of,
)
from medmoe_edge.bedside.listen.queue import Folder, Queue, key_of
from medmoe_edge.bedside.listen.schema import Membership
from medmoe_edge.bedside.listen.selection import (
    ASIDE,
    aside,
    classes_set_aside,
    classes_with_pixels,
    is_private,
    key_objects,
    membership_of,
    register,
    shown_uid,
)
from medmoe_edge.bedside.serve.settings import plain_address
from medmoe_edge.errors import MedMoEError, MissingDependencyError, ResourceError
from medmoe_edge.image.dicom_container import deflated_meta
from medmoe_edge.image.dicom_pixels import can_decode
from medmoe_edge.image.loading import decoding

log = logging.getLogger(__name__)


class Limits:
    """Closes connections whose message has over `size` bytes, or whose PDU takes over `seconds`."""

    def __init__(self, size: int, seconds: float) -> None:
        self._size, self._seconds = size, seconds
        self._received: weakref.WeakKeyDictionary[Association, int] = weakref.WeakKeyDictionary()

    @property
    def handlers(self) -> list[EventHandlerType]:
        """Of an association, whoever asks for it."""
        return [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_DATA_RECV, self._data),
            (evt.EVT_DIMSE_RECV, self._message),
            (evt.EVT_DIMSE_SENT, self._said),
        ]

    def _opened(self, event: Event) -> None:
        """Read the PDUs of a connection as `_read` does: pynetdicom knows no end of one."""
        connection: Any = event.assoc.dul.socket
        connection.socket.settimeout(self._seconds)
        connection.recv = functools.partial(self._read, event.assoc, connection.socket)

    def _read(self, association: Association, link: socket.socket, size: int) -> bytearray:
        """So many bytes of a PDU, or fewer where the peer has left."""
        end, data = time.monotonic() + self._seconds, bytearray()
        while len(data) < size <= LONGEST_PDU and time.monotonic() <= end:
            part = link.recv(min(size - len(data), STEP))
            if not part:
                return data
            data += part
        if len(data) < size:
            _hang_up(association)
            log.warning("A connection was closed: a PDU is too long, or does not come to its end.")
            raise ConnectionAbortedError
        return data

    def _data(self, event: Event) -> None:
        """Data of an association have come in."""
        association = event.assoc
        total = self._received.get(association, 0) + len(event.data)
        self._received[association] = total
        if total > self._size:
            _hang_up(association)
            log.warning("A connection was closed: its object is larger than allowed.")

    def _message(self, event: Event) -> None:
        """A message is whole: the next begins."""
        self._received[event.assoc] = 0

    def _said(self, event: Event) -> None:
        """The peer was silent while it waited for this: its time begins now."""
        dul: Any = event.assoc.dul
        dul._idle_timer.restart()


def _is_open(association: Association) -> bool:
    ended = association.is_released or association.is_aborted or association.is_rejected
    return association.is_alive() and not ended


def _hang_up(association: Association) -> None:
    """Close the connection under the association, which its own thread then notices."""
    connection = association.dul.socket
    if connection is not None and connection.socket is not None:
        descriptor = connection.socket
        connection.close()
        descriptor.close()  # pynetdicom leaves it open where the peer was faster


LONGEST_PDU = 2**20  # bytes; of data a peer may send 16,382, and hardly so many to begin with
STEP = 2**16
SUCCESS = 0x0000
OK, ACCEPTED, BAD_REQUEST, CONFLICT = 200, 202, 400, 409  # of HTTP
TRANSFER_SYNTAXES_NOT_SUPPORTED = 0x04  # of a presentation context, PS3.8 table 9-18
UNSUPPORTED_CLASS = 0x0122
NOT_AUTHORISED = 0x0124
OUT_OF_RESOURCES = 0xA700
TOO_LARGE = "It is larger than max_object_mb allows."  # the one for which no room can be made
CLASS_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
UNREADABLE_SYNTAX = "Its transfer syntax cannot be read here."

PLAIN_MODALITY = re.compile(r"[A-Z]{2,16}")
SOME = 3  # of many classes
MOST_TOLD = 10_000  # series that are remembered
LONGEST_UID = 64  # characters in a command
LONGEST_COMMENT = 64  # characters of an Error Comment (LO)


@functools.cache
def transfer_syntaxes() -> list[str]:
    """Those that can be read here; not the deflated one, which may inflate to any size."""
    return [
        str(syntax)
        for syntax in AllTransferSyntaxes
        if syntax != DeflatedExplicitVRLittleEndian
        and (not syntax.is_encapsulated or can_decode(syntax))
    ]


class Refused(Exception):
    """An object that is not taken: the status, and why, without a word of the patient."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Taken:
    """An object that is taken: the key it is known by, who sent it, and what it says of itself."""

    key: str
    peer: str
    data: bytes
    header: Dataset
    origin: Origin
    membership: Membership


class Receiving:
    """The handlers of pynetdicom's events.

    `arrived` is called after each object that is kept, and what `moved` has for the Message ID of
    this node's C-MOVE with what `judged` says of each that comes because of it.
    """

    def __init__(
        self,
        configuration: Configuration,
        folder: Folder,
        queue: Queue,
        arrived: Callable[[], None],
    ) -> None:
        self.configuration, self.folder, self.queue = configuration, folder, queue
        self.arrived = arrived
        self.moved: dict[int, Callable[[int, str], None]] = {}
        self.ending = False  # the node: what is not kept now is fetched after its next start
        self._admitted, self._admitting = weakref.WeakSet[Association](), threading.Lock()
        self._keeping = threading.Lock()  # or two that send one object could spoil each other's
        self.images, self.others = set(classes_with_pixels()), set(classes_set_aside())
        self._told: set[str] = set()  # series of which it was said that no question fits

    def requested(self, event: Event) -> None:
        """Reject an association that is not to be, and say in the log why: senders may not."""
        association = event.assoc
        try:
            if (found := self._rejection(association)) is None:
                self._support_private(association)
                return
        except Exception as error:  # after which pynetdicom would let it in
            found = f"it cannot be judged ({type(error).__name__})", 2, 1, 1
        why, *reason = found
        association.is_rejected = True  # even where its sender cannot be told so
        association.acse.send_reject(*reason)
        association.kill()
        log.warning("An association was rejected: %s.", why)

    def _rejection(self, association: Association) -> tuple[str, int, int, int] | None:
        """Why one is rejected, and the same as PS3.8 table 9-21 has it: result, source, reason."""
        asked, requestor = association.requestor.primitive, association.requestor
        assert asked is not None  # what this event is about
        title = str(asked.calling_ae_title).strip()
        address = plain_address(ipaddress.ip_address(requestor.address))
        known = (each for each in self.configuration.peers if each.ae_title == title)
        if not any(not each.hosts or address in each.hosts for each in known):
            return "its AE title or address is not on the list", 1, 1, 3
        if str(asked.called_ae_title).strip() != self.configuration.ae_title:
            return "it called another AE title", 1, 1, 7
        with self._admitting:
            if sum(map(_is_open, self._admitted)) >= self.configuration.max_associations:
                return "max_associations are open", 2, 3, 2
            self._admitted.add(association)
        return None

    def rejected(self, event: Event) -> None:
        """Say that pynetdicom has rejected one: it does so only by the number of connections."""
        log.warning("An association was rejected: too many connections are open.")

    def _support_private(self, association: Association) -> None:
        """Let an association offer classes of its maker's own: images are judged as they come."""
        primitive = association.requestor.primitive
        offered = getattr(primitive, "presentation_context_definition_list", None) or ()
        contexts = association.acceptor.supported_contexts
        for uid in {str(context.abstract_syntax) for context in offered}:
            if is_private(uid) and register(uid):
                contexts.append(build_context(uid, transfer_syntaxes()))
        association.acceptor.supported_contexts = contexts

    def accepted(self, event: Event) -> None:
        """Say what of an association's offer is not taken, which the sender may not tell.

        Senders offer all that they know, so that only images in no readable encoding are a warning.
        """
        taken = {context.abstract_syntax for context in event.assoc.accepted_contexts}
        others: dict[bool, set[str]] = {True: set(), False: set()}
        for context in event.assoc.rejected_contexts:
            if context.abstract_syntax not in taken:
                is_unreadable = context.result == TRANSFER_SYNTAXES_NOT_SUPPORTED
                others[is_unreadable].add(shown_uid(context.abstract_syntax))
        if others[True]:
            log.warning("Offered in no readable encoding: %s.", ", ".join(sorted(others[True])))
        if others[False]:
            level = logging.INFO if taken else logging.WARNING
            some = ", ".join(sorted(others[False])[:SOME])
            log.log(level, "Not taken here (%d): %s.", len(others[False]), some)

    def echo(self, event: Event) -> int:
        """C-ECHO."""
        return SUCCESS

    def store(self, event: Event) -> Dataset:
        """C-STORE: the status, which is success only once the object lies on the disk."""
        answer = Dataset()
        answer.Status, why = self.judged(lambda: self._store(event))
        if why:
            answer.ErrorComment = why[:LONGEST_COMMENT]
        mover = getattr(event.request, "MoveOriginatorApplicationEntityTitle", None)
        count = self.moved.get(getattr(event.request, "MoveOriginatorMessageID", None) or 0)
        if count and mover is not None and str(mover).strip() == self.configuration.ae_title:
            count(answer.Status, why)
        return answer

    def judged(self, receive: Callable[[], None]) -> tuple[int, str]:
        """What `receive` comes to: a status, and why it is not success."""
        try:
            receive()
        except Refused as refused:
            status, why = refused.status, refused.why
        except MissingDependencyError as error:
            status, why = CANNOT_UNDERSTAND, f"{error.what} {error.remedy}"
        except (OSError, MemoryError) as error:
            status, why = OUT_OF_RESOURCES, f"no room for it ({type(error).__name__})"
        except MedMoEError as error:
            full = isinstance(error, ResourceError)
            status, why = OUT_OF_RESOURCES if full else CANNOT_UNDERSTAND, error.what
        except Exception as error:  # whatever a peer's bytes may still provoke
            status, why = CANNOT_UNDERSTAND, f"it is damaged ({type(error).__name__})"
        else:
            self.arrived()
            return SUCCESS, ""
        with contextlib.suppress(ResourceError):
            self.queue.tally("refused")
        level = logging.ERROR if status == OUT_OF_RESOURCES else logging.WARNING
        log.log(level, "An object was refused (0x%04X): %s", status, why)
        return status, why

    def _store(self, event: Event) -> None:
        request = event.request
        assert isinstance(request, C_STORE)
        sop_class = str(request.AffectedSOPClassUID)
        self._judge_class(sop_class)
        if event.context.abstract_syntax != request.AffectedSOPClassUID:
            raise Refused(CLASS_MISMATCH, "Its class is not the one that was agreed on.")
        announced = (sop_class, str(request.AffectedSOPInstanceUID))
        peer = str(event.assoc.requestor.ae_title).strip()
        self.receive(event.encoded_dataset(), peer, announced)

    def receive(self, data: bytes, peer: str, announced: tuple[str, str] | None = None) -> None:
        """Keep a DICOM file, or set it aside; on return the disk has it.

        `announced` are the class and UID that the sender announced, if it did. Raises `Refused`
        where it is not taken, and `MedMoEError` where it cannot be read or kept.
        """
        if len(data) > self.configuration.max_object_mb * 1_000_000:
            raise Refused(OUT_OF_RESOURCES, TOO_LARGE)
        header, pixels = _parts(data)
        self._judge(header, announced)
        why = aside(header, bool(pixels), self.configuration)
        if not why or (why == "no_pixels" and uid_of(header, "SOPClassUID") in self.images):
            self._judge_pixels(header, pixels)
        origin = origin_of(header, pixels[8 if header.original_encoding[0] else 12 :])
        own = membership_of(header)
        series = self.queue.joined(own, origin.patient).series
        with (
            self.queue.arriving(series, origin.study),
            self._keeping,
            # others came meanwhile: it may belong to another series now, which is not quiet either
            self.queue.arriving((membership := self.queue.joined(own, origin.patient)).series),
        ):
            self.judge_room(len(data))
            key = self._key(origin, data)
            if self.queue.settles(key) and not self._lacks(key, membership.series):
                return  # the sender had not heard of it
            item = Taken(key, peer, data, header, origin, membership)
            if why:
                self.queue.mark(key_objects(header))
                self._add(item, (), why)
                self._tell_aside(item, why)
            else:
                self._keep(item)
        for notice in () if why else notices_of(header):
            log.warning("%s: %s", key[:16], notice.message)

    def _judge_class(self, sop_class: str) -> None:
        if sop_class not in self.images | self.others and not is_private(sop_class):
            raise Refused(UNSUPPORTED_CLASS, "Its class is none of the storage service.")

    def judge_room(self, size: int) -> None:
        """Refuse what could not be kept; one object at a time is judged and written."""
        self.folder.check()
        if self.folder.free() - size < self.configuration.reserve_mb * 1_000_000:
            raise Refused(OUT_OF_RESOURCES, "The disk is too full to keep it.")
        quota = self.configuration.quota_mb * 1_000_000
        if quota and self.folder.used() + size > quota:
            raise Refused(OUT_OF_RESOURCES, "The node's folder has reached its quota_mb.")

    def _lacks(self, key: str, series: str) -> bool:
        """Whether an object of a series that waits is to be asked, and its image is gone."""
        is_gone = self.queue.state(key) == "waiting" and not self.folder.image(key).exists()
        return is_gone and key in {each.key for each in self.queue.slices(series)}

    def _key(self, origin: Origin, data: bytes) -> str:
        """By which an object is known; sent again with other content, it gets one of its own.

        So does what comes back after it was sent as one of another series meanwhile.
        """
        versions = self.queue.versions(origin.uid)
        same = [known for known, at in versions if at.content == origin.content]
        if same:
            returned = key_of(f"{origin.uid} {origin.content} {len(versions)}")
            return returned if self.queue.has_moved(same[-1]) else same[-1]
        if self.queue.state(origin.uid) is None:
            return origin.uid
        if not versions and self.queue.sha256(origin.uid) == hashlib.sha256(data).hexdigest():
            return origin.uid  # kept by an earlier version of this program
        return key_of(f"{origin.uid} {origin.content}")

    def _keep(self, item: Taken) -> None:
        header, path = item.header, self.folder.image(item.key)
        self.folder.keep(path, item.data)
        kept = False
        try:
            self.folder.picture(item.key)
            asked = self.configuration.questions_for(modality_of(header), body_parts_of(header))
            contradictions = list(self._contradictions(item.key, item.origin))
            self._add(item, asked)
            kept = True
        finally:  # those that were given up are kept to be looked at
            if not kept and self.queue.state(item.key) != "failed":
                path.unlink(missing_ok=True)
        for each in contradictions:
            log.warning("%s: %s", item.key[:16], each)

    def _add(self, item: Taken, asked: Sequence[str], why: str = "") -> None:
        own = (item.key, hashlib.sha256(item.data).hexdigest(), item.peer)
        self.queue.add(*own, asked, item.origin, item.membership, why)
        self.folder.check()  # or its row and its image may lie apart

    def _tell_aside(self, item: Taken, why: str) -> None:
        """Say that nothing is asked: as a warning where it may be a mistake."""
        key, header, series = item.key, item.header, item.membership.series
        if why != "no_question":
            log.info("%s: it %s: set aside.", key[:16], ASIDE[why])
            return
        level = logging.INFO if series in self._told else logging.WARNING
        if len(self._told) < MOST_TOLD:
            self._told.add(series)
        modality = modality_of(header)
        known = sorted({name for name, _, _ in BODY_PARTS} & body_parts_of(header))
        log.log(
            level,
            "%s: it fits no question (Modality %s, body part %s): nothing is asked.",
            key[:16],
            modality if PLAIN_MODALITY.fullmatch(modality) else "unknown",
            " and ".join(known) or ("unknown" if body_parts_of(header) else "not given"),
        )

    def _contradictions(self, key: str, origin: Origin) -> Iterator[str]:
        """What an object says otherwise than those that came before."""
        known = [each for _, each in self.queue.versions(origin.uid)]
        if not all(same_patient(each.patient, origin.patient) for each in known):
            yield (
                "sent again in the name of another patient. It is answered anew; the results "
                "that were made for the other are withdrawn, and made anew of what is left."
            )
        elif key != origin.uid:
            yield "sent again with other content. It is answered anew."
        if self.queue.shares_study(origin):
            yield "its Study Instance UID is another patient's too."

    def _judge(self, header: Dataset, announced: tuple[str, str] | None) -> None:
        """Whether it is what was announced, or else of a class and encoding that are taken."""
        check_uids(header)
        if announced is None:
            self._judge_class(uid_of(header, "SOPClassUID"))
            if header.file_meta.get("TransferSyntaxUID") not in transfer_syntaxes():
                raise Refused(CANNOT_UNDERSTAND, UNREADABLE_SYNTAX)
            return
        sop_class, uid = (value.strip("\0 ") for value in announced)
        if uid_of(header, "SOPClassUID") != sop_class:
            raise Refused(CLASS_MISMATCH, "Its SOPClassUID is another than was announced.")
        if uid_of(header, "SOPInstanceUID")[:LONGEST_UID] != uid:  # longer ones are cut off
            raise Refused(CLASS_MISMATCH, "Its SOPInstanceUID is another than was announced.")

    def _judge_pixels(self, header: Dataset, pixels: memoryview) -> None:
        if not pixels:
            raise Refused(CLASS_MISMATCH, "It has no pixels.")
        burned_in = text_of(header, "BurnedInAnnotation").value.upper() == "YES"
        if burned_in and not self.configuration.allow_burned_in:
            raise Refused(NOT_AUTHORISED, "Its pixels are marked as showing text (burned in).")


def stored(
    receiving: Receiving, body: bytes, content_type: str, peer: str, study: str | None
) -> tuple[int, Dataset | None]:
    """STOW-RS (PS3.18, 10.5): the HTTP status, and what became of each object.

    The body is multipart/related of application/dicom. Objects of another `study` than that of the
    path, if there is one, are refused.
    """
    told = Dataset()
    told.ReferencedSOPSequence, told.FailedSOPSequence = [], []
    try:
        parts = list(multipart([body], content_type, len(body)))
    except ValueError:
        parts = []
    if not parts:
        return BAD_REQUEST, None
    for part in parts:
        item = Dataset()

        def receive(part: bytes = part, item: Dataset = item) -> None:
            header, _ = _parts(part)
            item.ReferencedSOPClassUID = UID(uid_of(header, "SOPClassUID"))
            item.ReferencedSOPInstanceUID = UID(uid_of(header, "SOPInstanceUID"))
            if study is not None and uid_of(header, "StudyInstanceUID") != study:
                raise Refused(CLASS_MISMATCH, "It is of another study than the request.")
            receiving.receive(part, peer)

        status, _ = receiving.judged(receive)
        if status == SUCCESS:
            told.ReferencedSOPSequence.append(item)
        else:
            item.FailureReason = status
            told.FailedSOPSequence.append(item)
    if not told.FailedSOPSequence:
        return OK, told
    return (ACCEPTED if told.ReferencedSOPSequence else CONFLICT), told


def multipart(pieces: Iterable[bytes], content_type: str, most: int) -> Iterator[bytes]:
    """The DICOM files of a multipart/related body that comes in `pieces`, each once it is whole.

    Of a file that has more than `most` bytes only the beginning is kept, with one byte more.
    Raises `ValueError` for anything else, and for a body without its end.
    """
    kind, options = parse_options_header(content_type)
    part_kind = options.get(b"type", b"application/dicom").lower()
    if kind.lower() != b"multipart/related" or part_kind != b"application/dicom":
        raise ValueError("not multipart/related of application/dicom")
    part, found, ended = bytearray(), list[bytes](), list[bool]()

    def add(data: bytes, start: int, end: int) -> None:
        part.extend(memoryview(data)[start : min(end, start + most + 1 - len(part))])

    def finish() -> None:
        found.append(bytes(part))
        part.clear()

    parser = MultipartParser(
        options.get(b"boundary", b""),
        {"on_part_data": add, "on_part_end": finish, "on_end": lambda: ended.append(True)},
    )
    for piece in pieces:
        parser.write(piece)
        yield from found
        found.clear()
    if not ended:
        raise ValueError("it has no end")


def _parts(data: bytes) -> tuple[Dataset, memoryview]:
    """The header of a file, and what follows it from its pixels on.

    Raises `Refused` for one that would first have to be inflated, and `ImageError`.
    """
    file = io.BytesIO(data)
    with decoding("The object"):
        is_deflated = deflated_meta(file) is not None
    if is_deflated:
        raise Refused(CANNOT_UNDERSTAND, UNREADABLE_SYNTAX)
    with decoding("The object"):
        header = dcmread(file, stop_before_pixels=True)
        return header, memoryview(data)[file.tell() :]
