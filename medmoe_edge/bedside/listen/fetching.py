"""Studies that a person asks for: found and fetched from a source, and then answered as others are.

From a DICOM node by C-FIND and C-MOVE, which has it send them to this node's port, or C-GET (PS3.4
C, study root); from a DICOMweb server by QIDO-RS and WADO-RS. Earlier studies of the same patient
come after it, the latest first.

A source is not believed: what it names beside what was asked for is left out, and a list of studies
without end is not read to its end.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urlencode

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.presentation import build_role
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
from pynetdicom.status import code_to_category

from medmoe_edge.bedside.listen.config import Configuration, DicomSource, WebSource
from medmoe_edge.bedside.listen.header import text_of
from medmoe_edge.bedside.listen.queue import Folder, Queue
from medmoe_edge.bedside.listen.receiving import (
    OUT_OF_RESOURCES,
    SUCCESS,
    TOO_LARGE,
    Receiving,
    Refused,
    multipart,
    transfer_syntaxes,
)
from medmoe_edge.bedside.listen.schema import Request
from medmoe_edge.bedside.listen.selection import classes_with_pixels
from medmoe_edge.bedside.listen.sending import (
    DICOM_JSON,
    LOG,
    MOST_FAILURES,
    Context,
    RefusedForGood,
    associated,
    called,
    check_done,
    passes,
    read_json,
)
from medmoe_edge.errors import InputError, MedMoEError, ResourceError

log = logging.getLogger(__name__)
PLAIN = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
FIND = StudyRootQueryRetrieveInformationModelFind
MOVE = StudyRootQueryRetrieveInformationModelMove
GET = StudyRootQueryRetrieveInformationModelGet
MOST_CLASSES = 127  # in an association, beside C-GET itself
PATIENCE = 600.0  # seconds until a source says how far it is, and until it is any further
ANY_SYNTAX = 'multipart/related; type="application/dicom"; transfer-syntax=*'
NO_CONTENT = 204  # of HTTP
ASKED_FOR = ("StudyInstanceUID", "PatientID", "StudyDate", "StudyTime", "IssuerOfPatientID")
# Of the answers to one query; no patient has so many studies.
MOST_FOUND, FINDING = 10_000, 120.0  # and seconds for them all
Found = dict[str, str]  # a study, by keyword as in `ASKED_FOR`


@dataclasses.dataclass(eq=False)
class Fetching:
    """The work of the thread of one source, the `place`-th that is configured.

    The first, which is there without any source too, also has the requests to none that is known.
    """

    configuration: Configuration
    folder: Folder
    queue: Queue
    receiving: Receiving
    place: int = 0
    _requests: dict[str, Request] = dataclasses.field(default_factory=dict, init=False)
    # By request: how often it failed for what may be for good, and what came of its studies.
    _failures: Counter[int] = dataclasses.field(default_factory=Counter, init=False)
    _got: dict[int, dict[str, "Retrieved"]] = dataclasses.field(default_factory=dict, init=False)

    def pending(self, limit: int) -> list[str]:
        """The first requests to its source, by their numbers."""
        found = islice(filter(self._is_mine, self.queue.requests()), limit)
        self._requests = {f"request {each.number}": each for each in found}
        return list(self._requests)

    def _is_mine(self, request: Request) -> bool:
        names = [each.shown for each in self.configuration.sources]
        place = names.index(request.source) if request.source in names else 0
        return place == self.place

    def do(self, name: str) -> None:
        """Fetch a study; raises `ResourceError` where it may come another time.

        One that its source refuses for good, time after time, does not.
        """
        request = self._requests[name]
        path = self.folder.requests / request.file
        try:
            state, why = self._fetch(request, _uid_in(path))
        except ResourceError as error:
            is_last, is_refused = self._is_last(request), isinstance(error, RefusedForGood)
            self._failures[request.number] += is_refused or request.number in self._got
            if not is_refused or not is_last:
                raise
            state, why = "failed", f"{error.what}, {MOST_FAILURES} times"
        except MedMoEError as error:
            state, why = "failed", error.what
        if why and self.receiving.ending:
            raise ResourceError("the node ends meanwhile", "It is fetched after the next start.")
        self.queue.close_request(request.number, state, why)
        self._failures.pop(request.number, None)
        self._got.pop(request.number, None)
        path.unlink(missing_ok=True)
        level = logging.ERROR if why else logging.INFO
        log.log(level, "%s: %s", name, f"{state}, {why}" if why else state)

    def _is_last(self, request: Request) -> bool:
        """Whether what fails now is not tried again."""
        return self._failures[request.number] >= MOST_FAILURES - 1

    def _fetch(self, request: Request, study: str) -> tuple[str, str]:
        """The state that the request comes to, and why it is failed or not all was kept."""
        source = self.configuration.source(request.source)
        finder: Finder = (
            WebFinder(source, self.receiving)
            if isinstance(source, WebSource)
            else DicomFinder(source, self.configuration.ae_title, self.receiving, self.place + 1)
        )
        found = finder.find(StudyInstanceUID=study)
        if not found:
            raise InputError("the source has no such study", "Check the UID.")
        if request.number not in self._got:
            self._got[request.number] = {study: finder.retrieve(study)}
        got, lacking = self._got[request.number], list[str]()
        with self._as_far_as_it_comes(request, lacking):
            for uid in _priors(request.priors, found[0], finder):
                with self._as_far_as_it_comes(request, lacking):
                    if uid not in got:
                        got[uid] = finder.retrieve(uid)
        told, own = [], got[study]
        if refused := sum(each.refused for each in got.values()):
            objects = sum(each.objects for each in got.values())
            reasons = "; ".join(sorted({each.why for each in got.values() if each.why}))
            told.append(f"{refused} of {objects} objects were not kept ({reasons})")
        if any(each.gave_up for each in got.values()):
            told.append("the source then gave up, and may have more")
        if lacking:
            told.append(f"earlier studies were not fetched ({'; '.join(sorted(set(lacking)))})")
        failed = own.gave_up or (own.refused and own.refused == own.objects)
        return "failed" if failed else "fetched", "; ".join(told)

    @contextlib.contextmanager
    def _as_far_as_it_comes(self, request: Request, lacking: list[str]) -> Iterator[None]:
        """Around fetching what is earlier than the study: it is told of where it never comes."""
        try:
            yield
        except MedMoEError as error:
            if isinstance(error, ResourceError) and not self._is_last(request):
                raise
            lacking.append(error.what)


def _uid_in(path: Path) -> str:
    """The UID of the study that a request is for; raises `InputError` where it is gone."""
    try:
        return path.read_text("ascii")
    except FileNotFoundError as error:
        raise InputError("its UID is gone: ask again", "Ask again.") from error


def _priors(count: int, study: Found, finder: "Finder") -> list[str]:
    """The latest earlier studies of its patient; none where it has no patient's number."""
    if not count or not study["PatientID"]:
        return []
    when, issuer = (study["StudyDate"], study["StudyTime"]), study["IssuerOfPatientID"]
    found = [
        each
        for each in finder.find(PatientID=study["PatientID"])
        if each["StudyInstanceUID"] != study["StudyInstanceUID"]
        and (each["StudyDate"], each["StudyTime"]) <= when
        and (not issuer or each["IssuerOfPatientID"] in ("", issuer))
    ]
    found.sort(key=lambda each: (each["StudyDate"], each["StudyTime"]), reverse=True)
    return [each["StudyInstanceUID"] for each in found[:count]]


def _listed(answers: Iterable[Dataset], keys: Mapping[str, str]) -> list[Found]:
    """The studies that a source names and that have these values; it may not look at them, or take
    one for a pattern.

    Raises `InputError` where they do not come to an end.
    """
    end, found = time.monotonic() + FINDING, []
    for count, answer in enumerate(answers, 1):
        if count > MOST_FOUND or time.monotonic() > end:
            what = f"its list of studies does not end: {MOST_FOUND:,} in {FINDING:.0f} s are read"
            raise InputError(what, LOG)
        study = {each: text_of(answer, each).value for each in ASKED_FOR}
        if all(study[keyword] == value for keyword, value in keys.items()):
            found.append(study)
    return found


@dataclasses.dataclass
class Retrieved:
    """What came of a study.

    Attributes:
        objects: How many there are.
        refused: How many of them were not kept.
        why: The last of them was not.
        full: Why there was no room for one; empty where there was.
        gave_up: Whether the source sent no more after one that was not kept.
    """

    objects: int = 0
    refused: int = 0
    why: str = ""
    full: str = ""
    gave_up: bool = False
    _adding: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False)

    def add(self, status: int, why: str) -> None:
        """Count an object by what `Receiving.judged` says of it; from any thread."""
        with self._adding:
            self.objects += 1
            if status != SUCCESS:
                self.refused, self.why = self.refused + 1, why.rstrip(".")
            if status == OUT_OF_RESOURCES and why != TOO_LARGE:
                self.full = self.why

    def check(self) -> None:
        """Raise `ResourceError` if there was no room: the study may be kept another time."""
        if self.full:
            raise ResourceError(self.full, "Make room, or raise quota_mb.")


@dataclasses.dataclass(eq=False)
class DicomFinder:
    """A node that is asked by C-FIND and C-MOVE or C-GET.

    `message` is the Message ID of a C-MOVE, which tells what it brings from what other sources do.
    Its methods raise `ResourceError` where it cannot be reached, or has no room for a study.
    """

    source: DicomSource
    ae_title: str
    receiving: Receiving
    message: int
    _got: Retrieved = dataclasses.field(default_factory=Retrieved, init=False)

    def find(self, **keys: str) -> list[Found]:
        """The studies with these values; raises `InputError` for a list without end."""
        query = Dataset()
        query.QueryRetrieveLevel = "STUDY"
        for keyword in ASKED_FOR:
            setattr(query, keyword, keys.get(keyword, ""))
        association = associated(self.source, self.ae_title, [(FIND, PLAIN)])

        def answers() -> Iterator[Dataset]:
            for status, answer in association.send_c_find(query, FIND):
                _check(status, "the query")
                yield answer or Dataset()

        try:
            return _listed(answers(), keys)
        except InputError:
            association.abort()  # it would go on
            raise
        except (ValueError, RuntimeError) as error:  # not offered, or it has hung up
            raise ResourceError("it answers no queries", LOG) from error
        finally:
            association.release()

    def retrieve(self, uid: str) -> Retrieved:
        """Have a study received here, by the way that is configured; returns when all of it is."""
        self._got = Retrieved()
        self.receiving.moved[self.message] = self._got.add
        wanted = Dataset()
        wanted.QueryRetrieveLevel, wanted.StudyInstanceUID = "STUDY", uid
        moves = self.source.retrieve == "move"
        association = self._associated(MOVE if moves else GET)
        association.dimse_timeout = PATIENCE
        try:
            last = self._awaited(
                association.send_c_move(wanted, self.ae_title, MOVE, self.message)
                if moves
                else association.send_c_get(wanted, GET)
            )
        except ResourceError:
            association.abort()  # it would go on
            raise
        except (ValueError, RuntimeError) as error:
            raise ResourceError("it gives out no studies", LOG) from error
        finally:
            association.release()
        self._check_last(last)
        return self._outcome(last)

    def _awaited(self, answers: Iterable[tuple[Dataset, object]]) -> Dataset:
        """The last answer; raises `ResourceError` for a source that only says that it goes on."""
        last, so_far, since = Dataset(), None, time.monotonic()
        for last, _ in answers:
            now = self._got.objects, *(_count(last, each) for each in ("Remaining", "Completed"))
            if now != so_far:
                so_far, since = now, time.monotonic()
            elif time.monotonic() > since + PATIENCE:
                what = f"it says that it goes on, and has sent nothing for {PATIENCE:.0f} s"
                raise ResourceError(what, LOG)
        return last

    def _outcome(self, last: Dataset) -> Retrieved:
        """By what came here, and the counts in the last answer.

        Not every source says in what it sends by C-MOVE that this node asked for it.
        """
        got = self._got
        failed, done, warned = (_count(last, each) for each in ("Failed", "Completed", "Warning"))
        if failed and not done + warned and not got.refused:
            hint = "Does it know this node's AE title, address and port?"
            raise ResourceError("it could send none of the study", hint)
        refused = max(failed, got.refused)
        objects = max(failed + done + warned, got.objects)
        if not objects and "NumberOfCompletedSuboperations" in last:
            raise InputError("the source gave nothing of the study", LOG)
        why = (got.why or "see the log") if refused else ""
        tried_all = failed and not done + warned  # and all of it was refused (0xA702)
        return Retrieved(objects, refused, why, gave_up=not _is_well(last) and not tried_all)

    def _check_last(self, last: Dataset) -> None:
        """Raise `ResourceError` for an answer of failure; no room here is the reason before all.

        Failure is also the answer where this node refused all that was sent (0xA702), or where the
        source gives up at the first that is refused. Asked again, it would come to the same.
        """
        self._got.check()
        failed = _count(last, "Failed")
        if self._got.refused and failed <= self._got.refused and "Status" in last:
            return
        if failed or not _is_well(last):
            try:  # what it does not say to be asked for was not counted
                self.receiving.judge_room(0)
            except Refused as refused:
                raise ResourceError(refused.why.rstrip("."), "Make room.") from refused
        _check(last, "the study")

    def _associated(self, model: str) -> Association:
        if model == MOVE:
            return associated(self.source, self.ae_title, [(MOVE, PLAIN)])
        classes = classes_with_pixels()[:MOST_CLASSES]
        storage: list[Context] = [(uid, transfer_syntaxes()) for uid in classes]
        return associated(
            self.source,
            self.ae_title,
            [(GET, PLAIN), *storage],
            handlers=[(evt.EVT_C_STORE, self._store)],
            ext_neg=[build_role(uid, scp_role=True) for uid in classes],
        )

    def _store(self, event: Event) -> int:
        receive = partial(self.receiving.receive, event.encoded_dataset(), self.source.ae_title)
        status, why = self.receiving.judged(receive)
        self._got.add(status, why)
        return status


@dataclasses.dataclass(eq=False)
class WebFinder:
    """A DICOMweb server that is asked by QIDO-RS and WADO-RS, as a `DicomFinder` is."""

    source: WebSource
    receiving: Receiving

    def find(self, **keys: str) -> list[Found]:
        """The studies with these values."""
        asked = [*keys.items(), *(("includefield", each) for each in ASKED_FOR)]
        path = f"/studies?{urlencode(asked, quote_via=quote)}"
        with called(self.source, path, {"Accept": DICOM_JSON}) as answer:
            check_done(answer)
            found = [] if answer.status_code == NO_CONTENT else read_json(answer)
        found = [found] if isinstance(found, dict) else found  # some answer so
        try:
            return _listed(map(Dataset.from_json, found), keys)
        except InputError:
            raise
        except Exception as error:  # pydicom raises nearly anything on what is no DICOM JSON
            raise ResourceError("it answers the query with something else", LOG) from error

    def retrieve(self, uid: str) -> Retrieved:
        """One object after another, as the server has them."""
        got, most = Retrieved(), self.receiving.configuration.max_object_mb * 1_000_000
        path = f"/studies/{quote(uid, safe='')}"
        with called(self.source, path, {"Accept": ANY_SYNTAX}) as answer:
            check_done(answer)
            kind = answer.headers.get("Content-Type", "")
            try:
                for data in multipart(answer.iter_bytes(), kind, most):
                    receive = partial(self.receiving.receive, data, "DICOMweb")
                    got.add(*self.receiving.judged(receive))
                    got.check()
            except ValueError as error:
                raise ResourceError("it sends no whole multipart/related", LOG) from error
        if not got.objects:
            raise InputError("the source gave nothing of the study", LOG)
        return got


Finder = DicomFinder | WebFinder


def _check(status: Dataset, what: str) -> None:
    """Raise `ResourceError` unless an answer of C-FIND, C-MOVE or C-GET is none of failure."""
    if "Status" not in status:
        raise ResourceError("it does not answer", LOG)
    if not _is_well(status):
        error = ResourceError if passes(status.Status) else RefusedForGood
        raise error(f"it refused {what}: 0x{status.Status:04X}", LOG)


def _count(last: Dataset, what: str) -> int:
    """How many suboperations came to `what`, by the last answer of C-MOVE or C-GET."""
    return int(last.get(f"NumberOf{what}Suboperations") or 0)


def _is_well(status: Dataset) -> bool:
    category = code_to_category(status.get("Status", OUT_OF_RESOURCES))
    return category in ("Success", "Pending", "Warning")
