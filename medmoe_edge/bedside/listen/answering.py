"""One received object after another: asked, its answers written as documents, and recorded.

A crash at any point leaves the object waiting or answered, never half: the documents are on the
disk before the one transaction that records the answers and what is to be sent. Made again after a
crash, documents have the same UIDs, and none has left the machine before.

What is sent on: documents by C-STORE, FHIR transactions by HTTP POST; each until it is taken.

A document may arrive twice, where an acknowledgement was lost: it is then the same object with the
same UIDs, which a DICOM node stores once and a FHIR server creates once (`ifNoneExist`).
"""

import datetime
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import httpx
from pydicom import Dataset, dcmread, dcmwrite
from pynetdicom.ae import ApplicationEntity
from pynetdicom.status import code_to_category

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.listen.config import (
    Configuration,
    Destination,
    DicomDestination,
    Document,
    FhirDestination,
)
from medmoe_edge.bedside.listen.evidence import Evidence, Result
from medmoe_edge.bedside.listen.queue import Folder, Job, Queue
from medmoe_edge.bedside.listen.report_sr import (
    Locator,
    basic_text_sr,
    comprehensive_3d_sr,
    heat_map,
    seen_capture,
)
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import InputError, MedMoEError, Notice, ResourceError
from medmoe_edge.image.loading import decoding
from medmoe_edge.image.pixels import Image, Pixels

log = logging.getLogger(__name__)
# An object at which the process itself ends, or that provokes a mistake of ours, comes after all
# others and is not tried for ever. Others end the process too: power, updates, a kill.
MAX_ATTEMPTS = 100
SENT_AGAIN = Notice(
    "sent_again",
    "The object was sent before with other content: this answer is about what was sent last.",
)
OTHER_PATIENT = Notice(
    "other_patient",
    "The object was sent before in the name of another patient, under the same UID: look whose "
    "image it is, and at the report that was made for the other.",
)
SHARED_STUDY = Notice(
    "shared_study", "Another patient's images were sent with the same Study Instance UID."
)


class Asked(Protocol):
    """What answers, such as `engine.Engine`."""

    def ask_all(
        self, image: Image, questions: Sequence[str], *, max_new_tokens: int
    ) -> list[Answer]:
        """Answer each question about the image."""
        ...

    def seen(self, image: Image) -> Pixels:
        """Exactly what the model sees of the image, `[S, S, 3]`."""
        ...


class Answering:
    """The work of the thread that owns the engine."""

    def __init__(
        self,
        configuration: Configuration,
        folder: Folder,
        queue: Queue,
        engine: Asked,
        locator: Locator | None,
    ) -> None:
        self.configuration, self.folder, self.queue = configuration, folder, queue
        self.engine, self.locator = engine, locator
        self.audit = AuditLog(configuration.audit or folder.root / "audit.jsonl")

    def pending(self, limit: int) -> list[str]:
        """The first objects that wait."""
        return self.queue.waiting(limit)

    def do(self, key: str) -> None:
        """Answer all questions about one object, or give it up if it can never be answered."""
        job = self.queue.job(key)
        if job.attempts >= MAX_ATTEMPTS:
            self._give_up(key, "too many attempts")
            return
        self.queue.count_attempt(key)
        try:
            try:
                image, results = self._ask(job)
            except InputError as error:
                self._give_up(key, type(error).__name__)
            else:
                self._record(job, image, results)
        except (MedMoEError, OSError):  # a full disk, a broken audit log, a model that diverged
            self.queue.forgive_attempt(key)
            raise

    def _record(self, job: Job, image: Image, results: list[Result]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote what breaks the standard
            names = self._write_picture(job, results)
            names += [name for result in results for name in self._write(job, result, image)]
        for answer in (result.answer for result in results):
            self.audit.append(
                who=f"dicom:{job.peer}",
                event="answer",
                model=answer.model,
                question=answer.question,
                answer=answer.text,
                input_sha256=job.sha256,
            )
        answers = {
            result.answer.question: json.dumps(result.answer.to_json()) for result in results
        }
        self.queue.answered(job.key, answers, self._deliveries(names))
        if not self.configuration.keep_images:
            self.folder.image(job.key).unlink(missing_ok=True)

    def _ask(self, job: Job) -> tuple[Image, list[Result]]:
        path = self.folder.image(job.key)
        with decoding(path.name):
            dataset = dcmread(path, stop_before_pixels=True)
        image = self.folder.picture(job.key)
        limit = self.configuration.max_new_tokens
        answers = self.engine.ask_all(image, job.questions, max_new_tokens=limit)
        evidence = Evidence.of(dataset, image, job.sha256, job.key)
        found = (*evidence.notices, *self._notices(job.key))
        answers = [replace(each, warnings=(*each.warnings, *found)) for each in answers]
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        picture = self._picture(evidence, image)
        return image, [Result(evidence, answer, when, picture) for answer in answers]

    def _picture(self, evidence: Evidence, image: Image) -> Dataset | None:
        if "picture" not in self.configuration.all_documents:
            return None
        return seen_capture(evidence, self.engine.seen(image))

    def _notices(self, key: str) -> Iterator[Notice]:
        """What other objects say of this one."""
        origin = self.queue.origin(key)
        if origin is None:
            return
        earlier = self._earlier(key)
        if earlier:
            yield SENT_AGAIN
        if any(patient != origin.patient for _, patient in earlier):
            yield OTHER_PATIENT
        if self.queue.shares_study(origin):
            yield SHARED_STUDY

    def _earlier(self, key: str) -> list[tuple[str, str]]:
        """The keys and patients of what was sent under the same UID before."""
        origin = self.queue.origin(key)
        versions = [] if origin is None else self.queue.versions(origin.uid)
        keys = [known for known, _ in versions]
        return [(known, each.patient) for known, each in versions[: keys.index(key)]]

    def _replaced(self, key: str, name: str) -> list[Dataset]:
        """Documents of that name about the same patient that are of earlier versions."""
        origin = self.queue.origin(key)
        paths = [
            self.folder.documents / known / name
            for known, patient in self._earlier(key)
            if origin is not None and patient == origin.patient
        ]
        return [dcmread(path, stop_before_pixels=True) for path in paths if path.exists()]

    def _write_picture(self, job: Job, results: list[Result]) -> list[str]:
        """What the model saw is the same for all questions."""
        picture = next((result.picture for result in results), None)
        if picture is None:
            return []
        name = f"{job.key}/image.picture.dcm"
        self.folder.keep(self.folder.documents / name, encoded(picture))
        return [name]

    def _write(self, job: Job, result: Result, image: Image) -> Iterator[str]:
        """Write the configured documents; gives their names under the documents' folder."""
        question = hashlib.sha256(result.answer.question.encode()).hexdigest()[:16]
        for kind in self.configuration.all_documents:
            ending = "json" if kind.startswith("fhir") else "dcm"
            name = f"{question}.{kind}.{ending}"
            data = self._made(kind, result, image, name)
            if data is None:
                continue
            self.folder.keep(self.folder.documents / job.key / name, data)
            yield f"{job.key}/{name}"

    def _made(self, kind: Document, result: Result, image: Image, name: str) -> bytes | None:
        match kind:
            case "picture":
                return None  # which is of the image, not of a question
            case "fhir-r4" | "fhir-r5":
                from medmoe_edge.bedside.listen.fhir import fhir  # half a second to import

                return fhir(result, "R4" if kind == "fhir-r4" else "R5")
            case "basic-text-sr":
                return encoded(basic_text_sr(result, self._replaced(result.evidence.key, name)))
            case "comprehensive-3d-sr":
                earlier = self._replaced(result.evidence.key, name)
                return encoded(comprehensive_3d_sr(result, earlier))
            case "heat-map":
                return self._heat_map(result, image)

    def _heat_map(self, result: Result, image: Image) -> bytes | None:
        """Extra to the answer, so that it is left out where it cannot be made."""
        if self.locator is None:
            return None
        try:
            return encoded(heat_map(result, image, self.locator))
        except MedMoEError as error:
            log.warning("No heat map was made (%s).", type(error).__name__)
            return None

    def _deliveries(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        for name in names:
            for node in self.configuration.dicom:
                if name.endswith(".dcm"):
                    yield name, node.name
            for server in self.configuration.fhir:
                if name.endswith(f".fhir-{server.version.lower()}.json"):
                    yield name, server.name

    def _give_up(self, key: str, why: str) -> None:
        log.error("%s cannot be answered (%s): given up, and kept.", key[:16], why)
        self.queue.fail(key)


def encoded(dataset: Dataset) -> bytes:
    """A dataset as a DICOM file."""
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


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
