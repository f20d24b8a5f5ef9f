"""C-ECHO and C-STORE: what is let in, and what is kept before the sender is told so.

The statuses are those of PS3.4 B.2.3 and PS3.7 annex C.
"""

import hashlib
import ipaddress
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import AllTransferSyntaxes, DeflatedExplicitVRLittleEndian
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.presentation import AllStoragePresentationContexts

from medmoe_edge.bedside.listen.config import Configuration
from medmoe_edge.bedside.listen.evidence import check_uids
from medmoe_edge.bedside.listen.files import Folder, key_of
from medmoe_edge.bedside.listen.queue import Queue
from medmoe_edge.errors import ImageError, MedMoEError, ResourceError
from medmoe_edge.image.loading import decoding, load_image

log = logging.getLogger(__name__)

SUCCESS = 0x0000
UNSUPPORTED_CLASS = 0x0122
NOT_AUTHORISED = 0x0124
OUT_OF_RESOURCES = 0xA700
CLASS_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

# Classes of the storage service whose objects are made of pixels; those of other kinds (reports,
# waveforms, presentation states, plans ...) are refused when they are offered.
WORDS = ("Image Storage", "Image Storage - For", "Parametric Map", "Segmentation", "RT Dose")
NOT_PIXELS = ("Presentation State", "Surface", "Spectroscopy", "Raw Data")
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def classes_with_pixels() -> list[str]:
    """The UIDs of the storage classes that are taken."""
    contexts = [context.abstract_syntax for context in AllStoragePresentationContexts]
    named = [(uid, uid.name) for uid in contexts if uid is not None]
    return [
        str(uid)
        for uid, name in named
        if any(word in name for word in WORDS) and not any(word in name for word in NOT_PIXELS)
    ]


def transfer_syntaxes() -> list[str]:
    """Those that can be read here; not the deflated one, which may inflate to any size."""
    return [
        str(syntax)
        for syntax in AllTransferSyntaxes
        if syntax != DeflatedExplicitVRLittleEndian
        and (not syntax.is_encapsulated or _is_decodable(str(syntax)))
    ]


class Receiving:
    """The handlers of pynetdicom's events; `arrived` is called after each object that is kept."""

    def __init__(
        self,
        configuration: Configuration,
        folder: Folder,
        queue: Queue,
        arrived: Callable[[], None],
    ) -> None:
        self.configuration, self.folder, self.queue = configuration, folder, queue
        self.arrived = arrived
        self._keeping = threading.Lock()  # or two that send one object could spoil each other's
        self.classes = set(classes_with_pixels())

    def requested(self, event: Event) -> None:
        """Reject an association from whoever is not on the list."""
        requestor = event.assoc.requestor
        assert requestor.primitive is not None  # what this event is about
        title = str(requestor.primitive.calling_ae_title).strip()
        address = ipaddress.ip_address(requestor.address)
        for peer in self.configuration.peers:
            if peer.ae_title == title and (not peer.hosts or address in peer.hosts):
                return
        log.warning("An association was rejected: its AE title or address is not on the list.")
        event.assoc.acse.send_reject(0x01, 0x01, 0x03)  # permanent; calling AE not recognised
        event.assoc.kill()

    def echo(self, event: Event) -> int:
        """C-ECHO."""
        return SUCCESS

    def store(self, event: Event) -> int:
        """C-STORE: the status, which is success only once the object lies on the disk."""
        try:
            status = self._store(event)
        except (ResourceError, OSError, MemoryError) as error:
            log.error("An object was refused: no room for it (%s).", type(error).__name__)
            return OUT_OF_RESOURCES
        except MedMoEError as error:
            log.warning("An object was refused: it cannot be read (%s).", type(error).__name__)
            return CANNOT_UNDERSTAND
        except Exception as error:  # whatever a peer's bytes may still provoke
            log.warning("An object was refused: it is damaged (%s).", type(error).__name__)
            return CANNOT_UNDERSTAND
        if status == SUCCESS:
            self.arrived()
        else:
            log.warning("An object was refused (0x%04X).", status)
        return status

    def _store(self, event: Event) -> int:
        request = event.request
        assert isinstance(request, C_STORE)
        if str(request.AffectedSOPClassUID) not in self.classes:
            return UNSUPPORTED_CLASS
        if event.context.abstract_syntax != request.AffectedSOPClassUID:
            return CLASS_MISMATCH
        key = key_of(str(request.AffectedSOPInstanceUID))
        data = event.encoded_dataset()
        if len(data) > self.configuration.max_object_mb * 1_000_000:
            raise ResourceError("An object is too large.", "Configure a higher limit.")
        if self.folder.free() - len(data) < self.configuration.reserve_mb * 1_000_000:
            raise ResourceError("The disk is too full to keep an object.", "Free some space.")
        with self._keeping:
            if self.queue.knows(key):  # the sender had not heard of it
                return SUCCESS
            return self._keep(event, request, key, data)

    def _keep(self, event: Event, request: C_STORE, key: str, data: bytes) -> int:
        path = self.folder.image(key)
        title = str(event.assoc.requestor.ae_title).strip()
        self.folder.keep(path, data)
        try:
            dataset = _header(path)
            status = self._judge(request, dataset)
            if status != SUCCESS:
                return status
            load_image(path)
            questions = self.configuration.questions_for(
                str(dataset.get("Modality") or ""), str(dataset.get("BodyPartExamined") or "")
            )
            self.queue.add(key, hashlib.sha256(data).hexdigest(), title, questions)
        finally:
            if not self.queue.knows(key):
                path.unlink(missing_ok=True)
        if not questions:
            log.info("%s: nothing is asked of such images.", key[:16])
            path.unlink(missing_ok=True)
        return SUCCESS

    def _judge(self, request: C_STORE, dataset: Dataset) -> int:
        check_uids(dataset)
        if dataset.SOPClassUID != request.AffectedSOPClassUID:
            return CLASS_MISMATCH
        if dataset.SOPInstanceUID != request.AffectedSOPInstanceUID:
            return CLASS_MISMATCH
        if not any(keyword in dataset for keyword in PIXELS):
            return CLASS_MISMATCH
        burned_in = str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES"
        if burned_in and not self.configuration.allow_burned_in:
            return NOT_AUTHORISED
        return SUCCESS


def _header(path: Path) -> Dataset:
    """The dataset, its long values (pixels) left on the disk; raises `ImageError`."""
    with decoding(path.name):
        dataset = dcmread(path, defer_size=1024)
        if "SOPClassUID" not in dataset:
            raise ImageError("The object is no DICOM object.", "Export it again.")
        return dataset


def _is_decodable(syntax: str) -> bool:
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False
