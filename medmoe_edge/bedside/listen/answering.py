"""One complete series after another: asked, its answers written as documents, and recorded.

A crash at any point leaves the series waiting or answered, never half: the documents are on the
disk before the one transaction that records the answers and what is to be sent. Made again after a
crash, documents have the same UIDs, and none has left the machine before.

Of a series one picture is in memory at a time, and of each slice only its answers stay.

A result whose objects were sent again is replaced: by one about the same patient, whose reports
name the earlier ones; or, where the patient is another, it is withdrawn in that patient's study.
"""

import datetime
import hashlib
import io
import itertools
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pydicom import Dataset, dcmread, dcmwrite

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.listen.config import Configuration, Destination, Document
from medmoe_edge.bedside.listen.evidence import Evidence, Result, coded, together
from medmoe_edge.bedside.listen.header import Origin, same_patient
from medmoe_edge.bedside.listen.queue import Folder, Queue, key_of
from medmoe_edge.bedside.listen.report_sr import (
    Locator,
    Standing,
    basic_text_sr,
    comprehensive_3d_sr,
    heat_map,
    seen_capture,
    withdrawal,
)
from medmoe_edge.bedside.listen.schema import Job, Slice
from medmoe_edge.bedside.listen.selection import (
    OF_THE_SERIES,
    Selection,
    chosen,
    chosen_frames,
    of_one_person,
    voted,
)
from medmoe_edge.contrastive.heatmap import NO_MAP, rests_on_picture
from medmoe_edge.engine.answer import Answer, Choices
from medmoe_edge.errors import ImageError, InputError, MedMoEError, Notice, ResourceError
from medmoe_edge.image.loading import decoding
from medmoe_edge.image.pixels import Image, Pixels, black_picture

log = logging.getLogger(__name__)
# An object at which the process itself ends, or that provokes a mistake of ours, comes after all
# others and is not tried for ever. Others end the process too: power, updates, a kill.
MAX_ATTEMPTS = 100
SENT_AGAIN = Notice(
    "sent_again",
    "The object was sent before with other content, or encoded otherwise: this answer is about "
    "what was sent last.",
)
OTHER_PATIENT = Notice(
    "other_patient",
    "The object was sent before in the name of another patient, under the same UID: look whose "
    "image it is. The results that were made for the other are withdrawn.",
)
ENDINGS = {"fhir-r4": "json", "fhir-r5": "json", "hl7-v2": "hl7"}  # of documents not of DICOM
LATE = Notice(
    "late_slices",
    "These objects came long after the others of their series, which has an earlier result: this "
    "answer is about the late ones alone.",
)
FRAMES = "Of an object {0} of {1} frames were asked."
UNREADABLE = Notice("unreadable_slices", "Some of the chosen slices could not be read.")
SHARED_STUDY = Notice(
    "shared_study", "Another patient's images were sent with the same Study Instance UID."
)


class Asked(Protocol):
    """What answers, such as `engine.Engine`."""

    def ask_all(
        self,
        image: Image,
        questions: Sequence[str],
        *,
        max_new_tokens: int,
        choices: Choices | None = None,
    ) -> list[Answer]:
        """Answer each question about the image."""
        ...

    def seen(self, image: Image) -> Pixels:
        """Exactly what the model sees of the image, `[S, S, 3]`."""
        ...


@dataclass(frozen=True)
class Asking:
    """A picture that was asked: its answers, and the Secondary Capture of what the model saw.

    `expected` is how many frames of its object were to be asked.
    """

    evidence: Evidence
    answers: tuple[Answer, ...]
    picture: Dataset | None = None
    expected: int = 1

    @property
    def picture_name(self) -> str:
        """Of the Secondary Capture's file."""
        frame = f".{self.evidence.frame}" if self.expected > 1 else ""
        return f"{self.evidence.key[:16]}{frame}.picture.dcm"


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
        self.audit = AuditLog(configuration.audit_log)
        self._lingering: dict[str, float] = {}  # series whose images go, and when
        self.progress = time.monotonic()  # when a slice was last begun

    def pending(self, limit: int) -> list[str]:
        """The first series that are complete and wait."""
        self._tidy()
        return self.queue.waiting(limit, self._is_complete)

    def _is_complete(self, series: str) -> bool:
        """Nothing of it has come for a while, or all that it has to have is there.

        Where other objects of the study matter, key objects or the same picture for presentation,
        it waits for the study.
        """
        settings = self.configuration.series
        if not settings.quiet:
            return True
        extent = self.queue.extent(series)
        if settings.slices == "key" or extent.has_processing:
            return self.queue.quiet(extent.study) >= settings.quiet
        if self.queue.quiet(series) >= settings.quiet:
            return True
        if settings.expected:
            return extent.objects >= settings.expected
        return 0 < extent.expected <= extent.instances

    def do(self, key: str) -> None:
        """Answer all questions about one series, or give it up if it can never be answered."""
        job = self.queue.job(key)
        if job.attempts >= MAX_ATTEMPTS:
            self._give_up(job, "too many attempts")
            return
        self.queue.count_attempt(key)
        try:
            try:
                self._answer(job)
            except InputError as error:
                self._give_up(job, f"{type(error).__name__}: {error.what}")
        except (MedMoEError, OSError):  # a full disk, a broken audit log, a model that diverged
            self.queue.forgive_attempt(key)
            raise

    def _tidy(self) -> None:
        """Remove the images of series that were answered long enough ago."""
        for series in [key for key, end in self._lingering.items() if end <= time.monotonic()]:
            del self._lingering[series]
            self._remove_images(series)

    def _answer(self, job: Job) -> None:
        selection, is_whole = self._selected(job.key)
        replaced = self.queue.replaced(job.key)
        doubts = of_one_person(self.queue.persons(job.key)) if selection.slices else ()
        selection = replace(selection, notices=(*selection.notices, *doubts))
        known_by = enumerate(_result_keys(job, selection, replaced))
        repeat, result = next(each for each in known_by if not self.queue.is_replaced(each[1]))
        if selection.slices and is_whole:
            replaced |= {each: self.queue.sources(each) for each in self.queue.results(job.key)}
        if standing := self.queue.sources(result):
            if replaced.keys() <= {result} and self._tells(result, selection):
                self.queue.close_series(job, "answered")
                self._let_go(job.key)
                log.info("%s: what came changes nothing.", job.key[:16])
                return
            replaced[result] = standing
            repeat, result = next(known_by)
        if not selection.slices and not replaced:
            self.queue.close_series(job, "aside", "left_out")
            self._let_go(job.key)
            log.info("%s: nothing of it is to be asked.", job.key[:16])
            return
        for notice in doubts:
            log.warning("%s: %s", job.key[:16], notice.message)
        asked = [each for slice_ in selection.slices for each in self._asked(slice_, result)]
        if selection.slices and not asked:
            raise ImageError("none of its slices can be read", "Send it again.")
        counts = Counter(each.evidence.key for each in asked)
        is_missing = len(counts) < len(selection.slices)
        if is_missing or any(counts[each.evidence.key] < each.expected for each in asked):
            selection = replace(selection, notices=(*selection.notices, UNREADABLE))
        results = [replace(each, repeat=repeat) for each in self._results(selection, asked)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote what breaks the standard
            ours = [old for old in replaced if self._is_ours(old, job.key)]
            written = [name for each in results for name in self._write(result, each, ours)]
            # what the model saw is the same for all questions
            names = [f"{result}/{each.picture_name}" for each in asked if each.picture is not None]
            successors = {name.partition("/")[2] for name in written}
            names = [*self._withdraw(result, replaced, ours, successors), *names, *written]
        answers = {each.answer.question: json.dumps(each.answer.to_json()) for each in results}
        sources = list(dict.fromkeys(each.evidence.key for each in asked))
        self.queue.answered(job, result, sources, answers, self._deliveries(names), replaced)
        self._let_go(job.key)

    def _tells(self, result: str, selection: Selection) -> bool:
        """Whether an earlier result about the same slices says of the series what is so now."""
        told, now = self.queue.told(result), {each.code: each.message for each in selection.notices}
        return told is None or (
            told.keys() & OF_THE_SERIES == now.keys() & OF_THE_SERIES
            and told.get("patient_differs") == now.get("patient_differs")  # in what they differ
        )

    def _selected(self, series: str) -> tuple[Selection, bool]:
        """The slices to ask, and whether they were chosen among all of the series.

        Those for processing are left out where they are there for presentation. Where images have
        gone since, those are chosen from that are there.
        """
        slices = [
            each
            for each in self.queue.slices(series)
            if each.intent != "processing" or not self.queue.shown_elsewhere(each.key)
        ]
        settings, marked = self.configuration.series, self.queue.marked(series)
        selection = chosen(slices, marked, settings)
        if all(self.folder.image(each.key).exists() for each in selection.slices):
            return selection, True
        there = [each for each in slices if self.folder.image(each.key).exists()]
        if not there:
            raise ImageError("its images are gone", "Send it again.")
        selection = chosen(there, marked, settings)
        notices = (*selection.notices, LATE)
        return replace(selection, of=len(slices), notices=notices), False

    def _asked(self, slice_: Slice, result: str) -> Iterator[Asking]:
        """The pictures of a slice, asked and audited, as far as they can be read."""
        try:
            for asking in self._ask(slice_):
                self._keep(asking, slice_, result)
                yield asking
        except InputError as error:
            log.warning("%s: a slice cannot be read (%s).", slice_.key[:16], error.what)

    def _keep(self, asking: Asking, slice_: Slice, result: str) -> None:
        """Audit the answers, and write the picture."""
        self.folder.check()  # the audit log may be in it, and would be begun anew
        try:
            for answer in asking.answers:
                self.audit.append(
                    who=f"dicom:{slice_.peer}",
                    event="answer",
                    model=answer.model,
                    question=answer.question,
                    answer=answer.logged,
                    input_sha256=slice_.sha256,
                )
        except InputError as error:  # the log was changed, which is no fault of the object's
            raise ResourceError(error.what, error.remedy) from error
        if asking.picture is not None:
            path = self.folder.documents / result / asking.picture_name
            self.folder.keep(path, encoded(asking.picture))
            del asking.picture.PixelData  # many would not fit into memory

    def _ask(self, slice_: Slice) -> Iterator[Asking]:
        """One picture after another of a slice: itself, or those of its frames that are chosen."""
        path = self.folder.image(slice_.key)
        with decoding(path.name):
            dataset = dcmread(path, stop_before_pixels=True)
        image = self.folder.picture(slice_.key)
        frames = chosen_frames(image.frames, self.configuration.series)
        notices = [*self._notices(slice_.key)]
        if len(frames) < image.frames:
            notices.append(Notice("frames", FRAMES.format(len(frames), image.frames)))
        limit = self.configuration.max_new_tokens
        choices = self.configuration.choices_for(slice_.questions)
        for index in frames:
            self.progress = time.monotonic()
            if len(frames) > 1:
                image = self.folder.picture(slice_.key, index)
            answers = self.engine.ask_all(
                image, slice_.questions, max_new_tokens=limit, choices=choices
            )
            evidence = Evidence.of(dataset, image, slice_.sha256, slice_.key, index)
            found = (*evidence.notices, *notices)
            answers = [replace(each, warnings=(*each.warnings, *found)) for each in answers]
            picture = self._picture(evidence, image)
            yield Asking(evidence, tuple(answers), picture, len(frames))

    def _picture(self, evidence: Evidence, image: Image) -> Dataset | None:
        if "picture" not in self.configuration.all_documents:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = seen_capture(evidence, self.engine.seen(image))
        series, name = str(picture.SeriesInstanceUID), str(picture.SOPInstanceUID)
        picture.InstanceNumber = self.queue.instance_number(series, name)
        return picture

    def _results(self, selection: Selection, asked: Sequence[Asking]) -> list[Result]:
        """For each question what the slices say together."""
        by_question: dict[str, dict[str, Answer]] = {}
        for asking in asked:
            for answer in asking.answers:
                by_question.setdefault(answer.question, {})[asking.evidence.place] = answer
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # what in the configuration an answer depends on
        settings = self.configuration.series.model_dump(include={"slices", "every"})
        settings |= {"max_new_tokens": self.configuration.max_new_tokens}
        found = []
        for answers in by_question.values():
            best, answer, agreed = voted(answers)
            finding = self.configuration.finding(answer.question)
            pictures = [each for each in asked if each.evidence.place in answers]
            evidence = next(each.evidence for each in pictures if each.evidence.place == best)
            sources = together(each.evidence for each in pictures)
            is_whole = len(sources) == selection.of and all(each.is_whole for each in sources)
            answer = replace(answer, warnings=(*answer.warnings, *selection.notices))
            certainty = self.configuration.certainty
            codes = None
            if finding is not None:
                codes = coded(finding, answer, certainty, agreed=agreed, is_whole=is_whole)
            found.append(
                Result(
                    evidence=evidence,
                    answer=answer,
                    when=when,
                    pictures=tuple(each.picture for each in pictures if each.picture is not None),
                    others=sources,
                    of=selection.of,
                    settings=json.dumps(settings),
                    coded=codes,
                )
            )
        return found

    def _notices(self, key: str) -> Iterator[Notice]:
        """What other objects say of this one."""
        origin = self.queue.origin(key)
        if origin is None:
            return
        versions = self.queue.versions(origin.uid)
        keys = [known for known, _ in versions]
        earlier = [each.patient for _, each in versions[: keys.index(key)]]
        if earlier:
            yield SENT_AGAIN
        if not all(same_patient(patient, origin.patient) for patient in earlier):
            yield OTHER_PATIENT
        if self.queue.shares_study(origin):
            yield SHARED_STUDY

    def _is_ours(self, result: str, series: str) -> bool:
        """Whether an earlier result is about the patient of a series, with all that it rests on."""
        theirs = self.queue.patients(self.queue.series_of(result))
        theirs |= {origin.patient for _, origin in self._latest(result)}
        pairs = itertools.product(theirs, self.queue.patients(series))
        return all(itertools.starmap(same_patient, pairs))

    def _latest(self, result: str) -> list[tuple[str, Origin]]:
        """The latest versions of the objects that a result is about."""
        origins = filter(None, map(self.queue.origin, self.queue.sources(result)))
        return [self.queue.versions(origin.uid)[-1] for origin in origins]

    def _withdraw(
        self,
        result: str,
        replaced: Iterable[str],
        ours: Collection[str],
        successors: Collection[str],
    ) -> Iterator[str]:
        """Take back the earlier results: all of them in HL7's forms, another patient's in DICOM.

        In DICOM the reports of `ours`, those about the same patient, stay where they are if one of
        the `successors` names them, or nothing that their result is about was sent again.
        """
        for old in replaced:
            folder = self.folder.documents / old
            if not folder.is_dir():
                log.error("%s: its documents are gone, and cannot be withdrawn.", old[:16])
            for path in sorted((*folder.glob("*.fhir-*.json"), *folder.glob("*.hl7"))):
                if path.name.startswith("withdrawn."):
                    continue
                from medmoe_edge.bedside.listen.hl7 import oru_withdrawn, withdrawn

                take_back = oru_withdrawn if path.suffix == ".hl7" else withdrawn
                name = f"{result}/withdrawn.{path.name}"
                self.folder.keep(self.folder.documents / name, take_back(path.read_bytes()))
                yield name
            if old not in ours:
                log.warning("%s: its results are withdrawn: the patient was another.", old[:16])
                yield from self._reject(result, old, None)
            elif {key for key, _ in self._latest(old)} - {*self.queue.sources(old)}:
                yield from self._reject(result, old, successors)

    def _reject(self, result: str, old: str, successors: Collection[str] | None) -> Iterator[str]:
        """Write the key object that rejects what an earlier result has made: but for `successors`
        all of it, else the reports that none of them names.
        """
        paths = sorted((self.folder.documents / old).glob("*.dcm"))
        reports = [dcmread(path, stop_before_pixels=True) for path in paths]
        reports = [
            each
            for path, each in zip(paths, reports, strict=True)
            if (each.Modality != "KO" if successors is None else each.Modality == "SR")
            and path.name not in (successors or ())
        ]
        if not reports:
            return
        if successors is not None:
            log.warning("%s: its reports are withdrawn: none follows them.", old[:16])
        document = withdrawal(reports)
        kind, name = str(document.SeriesInstanceUID), f"{result}/{old[:16]}.withdrawal.dcm"
        document.InstanceNumber = self.queue.instance_number(kind, name)
        self.folder.keep(self.folder.documents / name, encoded(document))
        yield name

    def _earlier(self, name: str, ours: Iterable[str]) -> list[Dataset]:
        """Documents of that name in results about the same patient, whose place a new one takes."""
        paths = [self.folder.documents / old / name for old in ours]
        return [dcmread(path, stop_before_pixels=True) for path in paths if path.exists()]

    def _write(self, key: str, result: Result, ours: Collection[str]) -> Iterator[str]:
        """Write the configured documents; gives their names under the documents' folder."""
        question = hashlib.sha256(result.answer.question.encode()).hexdigest()[:16]
        for kind in self.configuration.all_documents:
            ending = ENDINGS.get(kind, "dcm")
            name = f"{question}.{kind}.{ending}"
            number = self.queue.instance_number(result.series_uid(kind), f"{key}/{name}")
            earlier = self._earlier(name, ours) if ending == "dcm" else ()
            data = self._made(kind, result, Standing(number, tuple(earlier)))
            if data is not None:
                self.folder.keep(self.folder.documents / key / name, data)
                yield f"{key}/{name}"

    def _made(self, kind: Document, result: Result, standing: Standing) -> bytes | None:
        match kind:
            case "picture":
                return None  # which is of a slice, not of a question
            case "fhir-r4" | "fhir-r5" | "hl7-v2":
                return self._hl7(kind, result)
            case "basic-text-sr":
                return encoded(basic_text_sr(result, standing))
            case "comprehensive-3d-sr":
                return encoded(comprehensive_3d_sr(result, standing))
            case "heat-map":
                return self._heat_map(result, standing)

    def _hl7(self, kind: Document, result: Result) -> bytes | None:
        """Nothing where nobody could tell whose it is."""
        if not result.evidence.values["PatientID"].strip():
            self.queue.tally("no_subject")
            log.warning("A result has no Patient ID: nothing of it is sent as FHIR or HL7.")
            return None
        from medmoe_edge.bedside.listen.hl7 import fhir, oru  # half a second to import

        if kind == "hl7-v2":
            return oru(result, self.configuration.ae_title)
        systems = self.configuration.identifiers
        return fhir(result, "R4" if kind == "fhir-r4" else "R5", systems)

    def _let_go(self, series: str) -> None:
        """Of the images, at once or after a while."""
        if self.configuration.keep_images:
            return
        if self.configuration.series.linger:
            self._lingering[series] = time.monotonic() + self.configuration.series.linger
        else:
            self._remove_images(series)

    def _remove_images(self, series: str) -> None:
        for key in self.queue.settled(series):
            self.folder.image(key).unlink(missing_ok=True)

    def _heat_map(self, result: Result, standing: Standing) -> bytes | None:
        """Extra to the answer: left out where it cannot be made, or would say what is not so."""
        if self.locator is None:
            return None
        try:
            limit, asked = self.configuration.max_new_tokens, [result.answer.question]
            choices = self.configuration.choices_for(asked)
            (blind,) = self.engine.ask_all(
                black_picture(), asked, max_new_tokens=limit, choices=choices
            )
            if not rests_on_picture(result.answer, blind):
                log.info("%s", NO_MAP)
                return None
            frame = result.evidence.frame
            image = self.folder.picture(result.evidence.key, None if frame is None else frame - 1)
            return encoded(heat_map(result, image, self.locator, standing))
        except MedMoEError as error:
            log.warning("No heat map was made (%s).", type(error).__name__)
            return None

    def _deliveries(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        settings = self.configuration
        pictures_and_reports: list[Destination] = [*settings.dicom, *settings.stow]
        for name in names:
            if name.endswith(".dcm"):
                yield from ((name, each.name) for each in pictures_and_reports)
            if name.endswith(".hl7"):
                yield from ((name, each.name) for each in settings.hl7)
            for server in settings.fhir:
                if name.endswith(f".fhir-{server.version.lower()}.json"):
                    yield name, server.name

    def _give_up(self, job: Job, why: str) -> None:
        self.folder.check()  # its images come back with it
        self.queue.close_series(job, "failed", why)
        log.error("%s cannot be answered (%s): given up, and kept.", job.key[:16], why)


def _result_keys(job: Job, selection: Selection, replaced: Iterable[str]) -> Iterator[str]:
    """By which a result is known: that of its slice, or a hash of all; of none, of what it ends.

    Where one was replaced, the next about the same has the next of these.
    """
    keys = [each.key for each in selection.slices]
    first = keys[0] if len(keys) == 1 else key_of("\n".join([job.key, *(keys or replaced)]))
    yield first
    yield from (key_of(f"{first} {repeat}") for repeat in itertools.count(1))


def encoded(dataset: Dataset) -> bytes:
    """A dataset as a DICOM file."""
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()
