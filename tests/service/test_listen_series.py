"""Series: brought together until they are complete, one result each, nothing lost or mixed."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, answer_to, two_lines
from listen_process import (
    PEER,
    QUESTION,
    SOME,
    Archive,
    StandIn,
    configuration,
    free_port,
    send,
    study,
    wait_for,
)
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
    SecondaryCaptureImageStorage,
)
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.events import Event

from medmoe_edge.bedside.listen.config import Series
from medmoe_edge.bedside.listen.evidence import taken_at
from medmoe_edge.bedside.listen.header import Origin, body_parts, body_parts_of, origin_of
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.bedside.listen.queue import Queue
from medmoe_edge.bedside.listen.schema import Membership, Slice
from medmoe_edge.bedside.listen.selection import chosen, membership_of, voted
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import Notice, ResourceError
from medmoe_edge.image.pixels import Image

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning"
)
REPORT = "comprehensive-3d-sr"


class Reading(StandIn):
    """Answers with the brightness of the picture's corner."""

    def __init__(self, confidence: float = 0.9) -> None:
        super().__init__()
        self.seen_values: list[int] = []
        self.confidence = confidence

    def ask_all(
        self, image: Image, questions: Any, *, max_new_tokens: int, **_: Any
    ) -> list[Answer]:
        value = int(image.pixels[0, 0, 0])
        self.seen_values.append(value)
        return [answer_to(each, str(value), confidence=self.confidence) for each in questions]


def slice_of(number: int, series: int = 1, value: int | None = None, **values: Any) -> Dataset:
    """A slice of a CT series; its pixels are all `value`, else its number."""
    uid = f"1.2.826.0.4711.{series}"
    pixels = bytes([number if value is None else value]) * SOME.size
    given: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "Modality": "CT",
        "StudyInstanceUID": f"{uid}.1",
        "SeriesInstanceUID": f"{uid}.2",
        "SOPInstanceUID": f"{uid}.3.{number}",
        "InstanceNumber": number,
        "PixelData": pixels,
        "WindowCenter": 128,
        "WindowWidth": 256,
    }
    return study(**(given | values))


def results(node: Node) -> list[dict[str, Any]]:
    """The answers, in the order in which they were recorded."""
    rows = node.queue._read(
        "SELECT answer FROM answer JOIN result USING (key) ORDER BY result.number"
    )
    return [json.loads(text) for (text,) in rows]


def answered(node: Node, count: int = 1) -> None:
    wait_for(lambda: node.queue.counts()["answered"] == count, 60)
    wait_for(lambda: node.queue.counts()["waiting"] == 0, 60)


def codes_of(answer: dict[str, Any]) -> list[str]:
    return [each["code"] for each in answer["warnings"]]


def test_a_series_has_one_result_about_its_middle(tmp_path: Path) -> None:
    engine = Reading()
    with Node(configuration(tmp_path / "node", series={"quiet": 1}), engine) as node:
        order = [4, 1, 7, 2, 6, 3, 5]
        assert send(node.port, *map(slice_of, order)) == [0] * 7
        answered(node)
        assert send(node.port, *map(slice_of, order)) == [0] * 7
        answered(node)
        (report,) = [dcmread(path) for path in node.folder.documents.glob("*/*.dcm")]
        (answer,) = results(node)
    assert len(engine.seen_values) == 1
    assert "slices" in codes_of(answer)
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    (instance,) = evidence.ReferencedSOPSequence
    assert instance.ReferencedSOPInstanceUID == slice_of(4).SOPInstanceUID


def test_a_series_is_complete_as_soon_as_all_are_there(tmp_path: Path) -> None:
    series = {"quiet": 1000}
    with Node(configuration(tmp_path / "node", series=series), Reading()) as node:
        said: dict[str, Any] = {"NumberOfSeriesRelatedInstances": "2"}
        assert send(node.port, slice_of(1, **said), slice_of(1, series=2)) == [0, 0]
        assert node.queue.counts()["waiting"] == 2
        assert send(node.port, slice_of(2, **said)) == [0]
        wait_for(
            lambda: node.queue.counts() == {"waiting": 1, "answered": 1, "failed": 0, "unsent": 0}
        )


def test_what_a_series_has_counts_each_object_once(tmp_path: Path) -> None:
    """Versions are one object; what is set aside counts towards what the series says alone."""
    queue = Queue(tmp_path / "queue.sqlite")
    for key, uid, aside in (
        *(("a", "uid 1", ""), ("b", "uid 1", ""), ("c", "uid 2", "localizer")),
        *(("d", "uid 2", "localizer"), ("e", None, "")),
    ):
        origin = uid and Origin(uid, key, "patient", "study")
        membership = Membership("series", expected=5)
        queue.add(key, "", PEER, ["q"], origin or None, membership, aside)
    assert queue.extent("series") == (2, 3, 5, False, "study")
    queue.close()


def test_an_object_in_two_versions_does_not_complete_a_series(tmp_path: Path) -> None:
    said: dict[str, Any] = {"NumberOfSeriesRelatedInstances": "3"}
    localizer: dict[str, Any] = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    for expected in (0, 2):
        series = {"quiet": 1000, "expected": expected}
        with Node(configuration(tmp_path / str(expected), series=series), Reading()) as node:
            first = [slice_of(1, **said), slice_of(1, value=7, **said)]
            assert send(node.port, *first, slice_of(3, **said, **localizer)) == [0] * 3
            (name,) = node.queue.waiting(2)
            assert not node.answering.pending(1)
            assert send(node.port, slice_of(2, **said)) == [0]
            answered(node)
            assert node.queue.extent(name)[:2] == (2, 3)


def test_the_images_of_all_versions_go_and_of_nothing_else(tmp_path: Path) -> None:
    with Node(
        configuration(tmp_path / "node", series={"quiet": 0.5, "linger": 0}), Reading()
    ) as node:
        sent = [slice_of(1), slice_of(1, value=7), slice_of(2)]
        assert send(node.port, *sent) == [0] * 3
        answered(node)
        assert node.queue._read("SELECT count(*) FROM object") == [(3,)]
        wait_for(lambda: not list(node.folder.images.iterdir()))


def test_images_are_kept_of_what_waits_or_was_given_up(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite")
    for key, aside in (("a", ""), ("b", ""), ("c", "localizer")):
        queue.add(key, "", PEER, ["q"], Origin("uid", key, "p", "s"), Membership("series"), aside)
    for state, gone in (("failed", []), ("aside", ["a", "b"]), ("answered", ["a", "b"])):
        assert queue.settled("series") == []  # it waits
        queue.close_series(queue.job("series"), state)
        assert queue.settled("series") == gone
        queue.add(f"of {state}", "", PEER, ["q"], None, Membership("other"))
        queue._write("UPDATE series SET state = 'waiting' WHERE key = ?", [("series",)])
    queue.close()


AT_ONCE = {"quiet": 0, "linger": 600}


def _keep(node: Node, *datasets: Dataset) -> None:
    """As received, without a network."""
    for dataset in datasets:
        origin = origin_of(dataset, dataset.PixelData)
        key = origin.content
        path = node.folder.image(key)
        dataset.save_as(path, implicit_vr=False, enforce_file_format=True)
        node.queue.add(key, "0" * 64, PEER, [QUESTION], origin, membership_of(dataset))


def test_a_choice_that_comes_back_takes_its_place_again(tmp_path: Path) -> None:
    """The middle goes from 2 to 3 and back, as often as the series grows."""
    config = configuration(tmp_path / "node", documents=[REPORT, "fhir-r4"], series=AT_ONCE)
    node = Node(config, Reading())
    # Numbers, and which is then the middle one.
    steps = [((1, 2, 3), 2), ((4, 5), 3), ((0, -1), 2), ((6, 7), 3), ((-2, -3), 2)]
    names: list[str] = []
    for numbers, middle in steps:
        _keep(node, *(slice_of(100 + each, InstanceNumber=each) for each in numbers))
        (series,) = node.answering.pending(1)
        node.answering.do(series)
        (name,) = node.queue.results(series)
        assert name not in names
        names.append(name)
        ((instance,),) = node.queue._read(
            "SELECT instance FROM object JOIN source ON object = key WHERE result = ?", name
        )
        assert instance == middle
    _keep(node, slice_of(108, InstanceNumber=8))  # of twelve, the middle stays
    node.answering.do(series)
    assert node.queue.results(series) == [names[-1]]
    replaced = node.queue._read("SELECT key, replaced FROM result ORDER BY number")
    assert replaced == list(zip(names, [*names[1:], ""], strict=True))
    paths = [path for name in names for path in node.folder.documents.glob(f"{name}/*.dcm")]
    assert len({str(dcmread(path).SOPInstanceUID) for path in paths}) == len(names)
    node._close()


def test_a_choice_that_comes_back_at_the_same_size_has_a_uid_of_its_own(tmp_path: Path) -> None:
    """Where versions move slices, not a word of the answer differs from the first time."""
    config = configuration(tmp_path / "node", documents=[REPORT, "fhir-r4"], series=AT_ONCE)
    node = Node(config, Reading())
    posted = []
    _keep(node, slice_of(1), slice_of(2))
    for number in (3, 0, 4):  # the third slice moves to the front and back
        _keep(node, slice_of(3, value=number, InstanceNumber=number))
        (series,) = node.answering.pending(1)
        node.answering.do(series)
        (name,) = node.queue.results(series)
        (path,) = node.folder.documents.glob(f"{name}/*.comprehensive-3d-sr.dcm")
        (fhir,) = (node.folder.documents / name).glob("[0-9a-f]*.fhir-r4.json")
        entries = json.loads(fhir.read_bytes())["entry"]
        posted.append((dcmread(path).SOPInstanceUID, entries[1]["request"]["ifNoneExist"]))
    answers = results(node)
    assert answers[0]["answer"] == answers[2]["answer"] != answers[1]["answer"]
    assert answers[0]["warnings"] == answers[2]["warnings"]
    assert len({uid for uid, _ in posted}) == len({condition for _, condition in posted}) == 3
    node._close()


def test_a_crash_before_a_repeated_result_is_recorded_changes_no_uid(tmp_path: Path) -> None:
    node = Node(configuration(tmp_path / "node", series=AT_ONCE), Reading())
    queue, answering = node.queue, node.answering
    for number in (1, 2, 3):
        _keep(node, slice_of(number))
    (series,) = answering.pending(1)
    answering.do(series)
    _keep(node, slice_of(4), slice_of(5))
    answering.do(series)
    _keep(node, slice_of(60, InstanceNumber=0), slice_of(61, InstanceNumber=-1))
    full = "BEFORE INSERT ON result BEGIN SELECT raise(ABORT, ''); END"
    queue._database.execute(f"CREATE TRIGGER full {full}")
    with pytest.raises(ResourceError):
        answering.do(series)
    before = {path: dcmread(path).SOPInstanceUID for path in node.folder.documents.glob("*/*.dcm")}
    queue._database.execute("DROP TRIGGER full")
    answering.do(series)
    after = {path: dcmread(path).SOPInstanceUID for path in node.folder.documents.glob("*/*.dcm")}
    assert before == after
    assert len(set(after.values())) == 3
    node._close()


def test_all_slices_vote_and_the_report_names_them(tmp_path: Path) -> None:
    engine = Reading()
    config = configuration(
        tmp_path / "node",
        series={"quiet": 1, "slices": "all"},
        documents=[REPORT, "basic-text-sr", "picture", "fhir-r4"],
    )
    with Node(config, engine) as node:
        values = [9, 9, 200, 9]
        sent = [slice_of(n, value=value) for n, value in enumerate(values, 1)]
        assert send(node.port, *sent) == [0] * 4
        answered(node)
        (answer,) = results(node)
        found = {path.name.split(".")[1]: path for path in node.folder.documents.glob("*/*")}
        reports = {kind: path.read_bytes() for kind, path in found.items()}
        pictures = list(node.folder.documents.glob("*/*.picture.dcm"))
        report = dcmread(found[REPORT])
    common = [each for each in engine.seen_values if engine.seen_values.count(each) == 3]
    assert answer["answer"] == str(common[0])
    assert codes_of(answer) == ["vote"]
    assert "3 of 4 pictures gave this answer. 1 gave others" in answer["warnings"][0]["message"]
    assert len(pictures) == 4
    for kind in (REPORT, "basic-text-sr", "fhir-r4"):
        for dataset in sent:
            assert str(dataset.SOPInstanceUID).encode() in reports[kind]
    assert b"4 of 4 (number 1, 2, 3, 4)" in reports[REPORT]
    assert sorted(int(dcmread(path).InstanceNumber) for path in pictures) == [1, 2, 3, 4]
    assert report.SeriesInstanceUID != slice_of(1).SeriesInstanceUID


def a_slice(number: int, **values: Any) -> Slice:
    given = {"position": None, "instance": number, "intent": "", "view": ""}
    return Slice(str(number), "", "", ("q",), **(given | values))


@pytest.mark.parametrize(
    ("series", "marked", "keys"),
    [
        ({}, {"2"}, ["5"]),
        ({"slices": "key"}, {"2", "7"}, ["2", "7"]),
        ({"slices": "key"}, set(), ["5"]),
        ({"slices": "every", "every": 4}, set(), ["3", "7"]),
        ({"slices": "every", "every": 40}, set(), ["5"]),
        ({"slices": "all"}, set(), [str(number) for number in range(1, 10)]),
    ],
)
def test_which_slices_are_chosen(series: dict[str, Any], marked: set[str], keys: list[str]) -> None:
    slices = [a_slice(number) for number in (9, 1, 5, 3, 4, 2, 8, 7, 6)]
    found = chosen(slices, marked, Series(**series))
    assert [each.key for each in found.slices] == keys
    assert found.of == 9
    by_place = [a_slice(number, position=-float(number)) for number in range(1, 10)]
    assert chosen(by_place, set(), Series()).slices[0].key == "5"
    assert next(each.key for each in chosen(by_place, set(), Series(slices="all")).slices) == "9"


def test_a_vote_is_of_the_words_and_the_more_confident_wins_a_draw() -> None:
    answers = {
        "a": answer_to("q", "Yes.", confidence=0.5),
        "b": answer_to("q", "No", confidence=0.6),
        "c": answer_to("q", "yes", confidence=0.9),
        "d": answer_to("q", "no", confidence=0.7),
    }
    best, answer, agreed = voted(answers)
    assert not agreed
    assert (best, answer.text) == ("c", "yes")
    assert answer.confidence == pytest.approx(0.7)
    assert voted({"a": answers["a"]}) == ("a", answers["a"], True)


def test_a_vote_is_unsure_where_a_slice_that_lost_is() -> None:
    answers = {
        "a": answer_to("q", "No", confidence=0.95),
        "b": answer_to("q", "No", confidence=0.9),
        "c": replace(answer_to("q", "Yes", confidence=0.99), unsure=True),
    }
    assert voted(answers).answer.unsure
    assert not voted({key: answers[key] for key in "ab"}).answer.unsure


def test_a_vote_says_which_of_its_warnings_are_of_the_slices_that_lost() -> None:
    text, label, patient = (Notice(code, f"{code}.") for code in ("text", "label", "patient"))
    mine = Notice("label", "c.")
    answers = {
        "a": replace(answer_to("q", "Yes", confidence=0.99), warnings=(label, patient)),
        "b": replace(answer_to("q", "No", confidence=0.8), warnings=(text,)),
        "c": replace(
            answer_to("q", "No", confidence=0.9), warnings=(replace(label, message="c."),)
        ),
    }
    *said, vote = voted(answers).answer.warnings
    assert said == [
        mine,
        text,
        Notice("patient", "Of a picture that gave another answer: patient."),
    ]
    assert vote.code == "vote"


def test_what_shows_nothing_to_ask_about_is_left_out(tmp_path: Path) -> None:
    """Localizers, screens, and what is there for presentation too."""
    engine = Reading()
    processing: dict[str, Any] = {"Modality": "DX", "ViewPosition": "PA"}
    sent = [
        slice_of(1),
        slice_of(2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        slice_of(3, Modality="OT", SOPClassUID=SecondaryCaptureImageStorage),
        slice_of(4, BurnedInAnnotation="YES", SOPClassUID=SecondaryCaptureImageStorage),
        slice_of(
            5,
            SeriesInstanceUID="1.2.826.0.4711.5",
            SOPClassUID=DigitalXRayImageStorageForProcessing,
            **processing,
        ),
        slice_of(
            6,
            SeriesInstanceUID="1.2.826.0.4711.6",
            SOPClassUID=DigitalXRayImageStorageForPresentation,
            **processing,
        ),
        slice_of(
            7,
            SeriesInstanceUID="1.2.826.0.4711.7",
            PresentationIntentType="FOR PROCESSING",
            Modality="DX",
            ViewPosition="LL",
        ),
    ]
    with Node(configuration(tmp_path / "node", series={"quiet": 1}), engine) as node:
        assert send(node.port, *sent) == [0] * len(sent)
        answered(node, 3)
        assert node.queue.asides() == {"localizer": 1, "kind": 1, "burned_in": 1}
        about = {key for (key,) in node.queue._read("SELECT object FROM source")}
        numbers = dict(node.queue._read("SELECT key, instance FROM object"))
    assert sorted(numbers[key] for key in about) == [1, 6, 7]


def test_own_results_are_never_answered(tmp_path: Path) -> None:
    """Not even where a question names their modality, and whoever changed their header."""
    config = configuration(
        tmp_path / "node",
        documents=[REPORT, "picture"],
        questions=[{"modalities": ["CR", "OT", "SR"], "ask": [QUESTION]}],
    )
    engine = StandIn()
    with Node(config, engine) as node:
        assert send(node.port, study()) == [0]
        answered(node)
        own = [dcmread(path) for path in node.folder.documents.glob("*/*.dcm")]
        changed = [dcmread(path) for path in node.folder.documents.glob("*/*.dcm")]
        for dataset in changed:
            dataset.Manufacturer, dataset.Modality = "Other", "CR"
            dataset.SOPInstanceUID = f"1.2.826.0.4711.9.{len(dataset.SOPInstanceUID)}"
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        assert send(node.port, *own) == [0, 0]
        assert send(node.port, *changed) == [0, 0]
        answered(node)
        assert node.queue.asides()["own_result"] >= 3
    assert engine.asked == 1


def test_key_images_are_asked(tmp_path: Path) -> None:
    key = study(SOPClassUID=KeyObjectSelectionDocumentStorage, Modality="KO")
    del key.PixelData
    key.StudyInstanceUID = slice_of(1).StudyInstanceUID
    title, item, reference = Dataset(), Dataset(), Dataset()
    title.CodeValue, title.CodingSchemeDesignator = codes.DCM.OfInterest.value, "DCM"
    title.CodeMeaning = "Of Interest"
    reference.ReferencedSOPClassUID = CTImageStorage
    reference.ReferencedSOPInstanceUID = slice_of(2).SOPInstanceUID
    item.ReferencedSOPSequence, item.ValueType = [reference], "IMAGE"
    key.ConceptNameCodeSequence, key.ContentSequence = [title], [item]
    config = configuration(tmp_path / "node", series={"quiet": 2, "slices": "key"})
    with Node(config, Reading()) as node:
        assert send(node.port, *map(slice_of, range(1, 8)), key) == [0] * 8
        answered(node)
        ((number,),) = node.queue._read(
            "SELECT instance FROM object JOIN source ON source.object = object.key"
        )
    assert number == 2


def test_patients_interleaved_in_one_series_stay_apart(tmp_path: Path) -> None:
    engine = Reading()
    config = configuration(tmp_path / "node", series={"quiet": 1, "slices": "all"})
    with Node(config, engine) as node:
        others: dict[str, Any] = {"PatientID": "MRN-0815", "PatientName": "Roe^Richard"}
        sent = [
            dataset
            for number in range(1, 4)
            for dataset in (
                slice_of(number, value=10),
                slice_of(number + 10, value=250, **others),
            )
        ]
        assert send(node.port, *sent) == [0] * 6
        answered(node, 2)
        reports = [dcmread(path) for path in node.folder.documents.glob("*/*.dcm")]
        texts = {report.PatientID: str(report) for report in reports}
    for number in range(1, 4):
        assert slice_of(number).SOPInstanceUID in texts["MRN-4711"]
        assert slice_of(number + 10).SOPInstanceUID in texts["MRN-0815"]
        assert slice_of(number + 10).SOPInstanceUID not in texts["MRN-4711"]
    assert {answer["answer"] for answer in results(node_of(tmp_path))} == {
        str(each) for each in engine.seen_values
    }


def node_of(folder: Path) -> Any:
    """A queue as a node has one, to be read after it ended."""

    class Ended:
        queue = Queue(folder / "node" / "queue.sqlite")

    return Ended


def test_slices_that_come_late_are_answered_with_the_others(tmp_path: Path) -> None:
    config = configuration(tmp_path / "node", series={"quiet": 0.5})
    with Node(config, Reading()) as node:
        assert send(node.port, *map(slice_of, (1, 2, 3))) == [0] * 3
        answered(node)
        assert send(node.port, *map(slice_of, (4, 5, 6, 7))) == [0] * 4
        answered(node, 2)
        (old,), (new,) = (
            node.queue._read(f"SELECT key FROM result WHERE replaced {sign} ''")
            for sign in ("!=", "=")
        )
        assert old != new
        reports = sorted(
            (dcmread(path) for path in node.folder.documents.glob("*/*.dcm")),
            key=lambda each: int(each.InstanceNumber),
        )
    assert "PredecessorDocumentsSequence" not in reports[0]
    assert "PredecessorDocumentsSequence" in reports[1]


FINDING = {"ask": [QUESTION], "code": ["60046008", "SCT", "Pleural effusion"]}


def presences(node: Node) -> list[str]:
    """What the reports say of the finding, the first report first."""
    reports = [dcmread(path) for path in node.folder.documents.glob("*/*.comprehensive-3d-sr.dcm")]
    reports.sort(key=lambda each: int(each.InstanceNumber))
    said = ("Present", "Absent", "Undetermined")
    return [next(word for word in said if f"'{word}'" in str(each)) for each in reports]


@pytest.mark.parametrize("linger", [60, 0])
def test_nothing_is_absent_once_there_are_slices_that_were_not_asked(
    tmp_path: Path, linger: float
) -> None:
    """Even where the one that was asked is the middle one still; or where it is gone."""
    series = {"quiet": 0.5, "linger": linger}
    with Node(
        configuration(tmp_path / "node", series=series, findings=[FINDING]), StandIn()
    ) as node:
        assert send(node.port, slice_of(1)) == [0]
        answered(node)
        assert presences(node) == ["Absent"]
        wait_for(lambda: bool(linger) or not list(node.folder.images.iterdir()))
        assert send(node.port, slice_of(2)) == [0]
        answered(node, 2)
        assert presences(node) == ["Absent", "Undetermined"]
        standing = node.queue._read("SELECT count(*) FROM result WHERE replaced = ''")
        assert standing == [(1 if linger else 2,)]
        if linger:  # and more of it change nothing
            assert send(node.port, *map(slice_of, (1, 2, 0))) == [0] * 3
            wait_for(lambda: node.queue.counts()["waiting"] == 0)
            answered(node, 2)


def test_slices_whose_others_are_gone_are_answered_and_say_so(tmp_path: Path) -> None:
    config = configuration(tmp_path / "node", series={"quiet": 0.5, "linger": 0, "slices": "all"})
    with Node(config, Reading()) as node:
        assert send(node.port, *map(slice_of, (1, 2, 3))) == [0] * 3
        answered(node)
        wait_for(lambda: not list(node.folder.images.iterdir()))
        assert send(node.port, slice_of(4)) == [0]
        answered(node, 2)
        assert "late_slices" in codes_of(results(node)[1])
        assert node.queue._read("SELECT count(*) FROM result WHERE replaced != ''") == [(0,)]


def test_another_patients_resend_withdraws_even_where_nothing_is_asked(tmp_path: Path) -> None:
    questions = [{"body_parts": ["CHEST"], "ask": [QUESTION]}]
    with Node(configuration(tmp_path / "node", questions=questions), StandIn()) as node:
        assert send(node.port, study()) == [0]
        answered(node)
        other = study(PatientID="MRN-0815", BodyPartExamined="FOOT")
        assert send(node.port, other) == [0]
        wait_for(lambda: bool(list(node.folder.documents.glob("*/*.withdrawal.dcm"))))
        wait_for(lambda: node.queue.counts()["waiting"] == 0)
        assert node.queue.counts()["answered"] == 1


def references(document: Dataset) -> list[str]:
    """The objects that a document names."""
    return sorted(
        str(instance.ReferencedSOPInstanceUID)
        for each in document.CurrentRequestedProcedureEvidenceSequence
        for series in each.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    )


def told_of(node: Node) -> tuple[list[tuple[str, list[int]]], int]:
    """Of the reports that stand whose each is and about which slices; and how many do not."""
    made = [dcmread(path) for path in node.folder.documents.glob("*/*.dcm")]
    ended = [uid for each in made if each.Modality == "KO" for uid in references(each)]
    for each in made:
        for named in each.get("PredecessorDocumentsSequence") or ():
            for series in named.ReferencedSeriesSequence:
                ended += [str(one.ReferencedSOPInstanceUID) for one in series.ReferencedSOPSequence]
    standing = [
        (str(each.PatientID), [int(uid.split(".")[-1]) for uid in references(each)])
        for each in made
        if each.Modality == "SR" and each.SOPInstanceUID not in ended
    ]
    return sorted(standing), len(ended)


def quiet(node: Node) -> None:
    """Wait until nothing is to be answered."""
    wait_for(lambda: node.queue.counts()["waiting"] == 0)


@pytest.mark.parametrize("slices", ["all", "middle"])
def test_what_is_left_of_a_series_is_answered_without_what_is_anothers(
    tmp_path: Path, slices: str
) -> None:
    series = {"quiet": 0.5, "linger": 60, "slices": slices}
    with Node(configuration(tmp_path / "node", series=series), StandIn()) as node:
        assert send(node.port, *map(slice_of, (1, 2, 3))) == [0] * 3
        answered(node)
        assert send(node.port, slice_of(2, PatientID="OTHER")) == [0]
        answered(node, 3)
        left = [1, 3] if slices == "all" else [1]
        assert told_of(node) == ([("MRN-4711", left), ("OTHER", [2])], 1)
        assert send(node.port, slice_of(4)) == [0]  # the other's is not asked in this one's name
        quiet(node)
        left = [1, 3, 4] if slices == "all" else [3]
        assert told_of(node)[0] == [("MRN-4711", left), ("OTHER", [2])]
        assert send(node.port, slice_of(2)) == [0]
        quiet(node)
        assert told_of(node)[0] == [("MRN-4711", [1, 2, 3, 4] if slices == "all" else [2])]


def test_what_is_left_of_a_series_is_given_up_where_its_images_are_gone(tmp_path: Path) -> None:
    series = {"quiet": 0.5, "linger": 0, "slices": "all"}
    with Node(configuration(tmp_path / "node", series=series), StandIn()) as node:
        assert send(node.port, *map(slice_of, (1, 2, 3))) == [0] * 3
        answered(node)
        wait_for(lambda: not list(node.folder.images.iterdir()))
        assert send(node.port, slice_of(2, PatientID="OTHER")) == [0]
        wait_for(lambda: node.queue.counts()["failed"] == 1)
        answered(node, 2)
        assert told_of(node) == ([("OTHER", [2])], 1)
        assert send(node.port, *map(slice_of, (1, 3))) == [0] * 2
        answered(node, 3)
        assert told_of(node) == ([("MRN-4711", [1, 3]), ("OTHER", [2])], 1)


def test_a_whole_series_that_is_anothers_makes_one_result(tmp_path: Path) -> None:
    """And none of what is left meanwhile, whatever the objects say of their number."""
    series = {"quiet": 1.0, "linger": 60}
    said: dict[str, Any] = {"NumberOfSeriesRelatedInstances": "4"}
    with Node(configuration(tmp_path / "node", series=series), StandIn()) as node:
        assert send(node.port, *(slice_of(each, **said) for each in (1, 2, 3, 4))) == [0] * 4
        answered(node)
        for number in (2, 1, 3, 4):
            assert send(node.port, slice_of(number, PatientID="OTHER", **said)) == [0]
            time.sleep(0.2)
        answered(node, 2)
        quiet(node)
        assert told_of(node) == ([("OTHER", [2])], 1)
        assert node.queue.counts()["answered"] == 2


def test_a_report_that_no_other_follows_is_withdrawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where what came again is asked nothing, or something else, about the same patient."""
    questions = [
        {"body_parts": ["CHEST"], "ask": [QUESTION]},
        {"body_parts": ["HAND"], "ask": ["Is there a fracture?"]},
    ]
    config = configuration(tmp_path / "node", questions=questions)
    with Node(config, StandIn()) as node:
        assert send(node.port, study(1), study(2)) == [0, 0]
        answered(node, 2)
        assert send(node.port, study(1, BodyPartExamined="HAND")) == [0]
        answered(node, 3)
        other = "1.2.826.0.4711.2.9"
        assert send(node.port, study(2, SeriesInstanceUID=other, BodyPartExamined="FOOT")) == [0]
        wait_for(lambda: told_of(node)[1] == 2)
        (standing,), _ = told_of(node)
        assert standing == ("MRN-4711", [3])
        paths = node.folder.documents.glob("*/*.withdrawal.dcm")
        assert all(b"is not asked the same" in path.read_bytes() for path in paths)
        assert caplog.text.count("its reports are withdrawn: none follows them") == 2


@pytest.mark.parametrize("changed", ["documents", "questions"])
def test_a_report_stands_where_nothing_of_it_was_sent_again(tmp_path: Path, changed: str) -> None:
    """No other names it: the node writes another kind now, or the middle is asked otherwise."""
    folder, series = tmp_path / "node", {"quiet": 0.5, "linger": 60}
    other = {"questions": [{"body_parts": ["HAND"], "ask": ["Is there a fracture?"]}]}
    other["questions"].append({"body_parts": ["CHEST"], "ask": [QUESTION]})
    before = other if changed == "questions" else {"documents": ["basic-text-sr"]}
    after = other if changed == "questions" else {"documents": [REPORT]}
    with Node(configuration(folder, keep_images=True, series=series, **before), StandIn()) as node:
        assert send(node.port, slice_of(1)) == [0]
        answered(node)
    with Node(configuration(folder, keep_images=True, series=series, **after), StandIn()) as node:
        late = [slice_of(each, BodyPartExamined="HAND") for each in (2, 3)]
        assert send(node.port, *late) == [0, 0]
        answered(node, 2)
        assert told_of(node) == ([("MRN-4711", [1]), ("MRN-4711", [2])], 0)


def test_a_report_about_what_left_its_series_does_not_stand(tmp_path: Path) -> None:
    """Whichever of the two series is answered first."""
    questions = [
        {"body_parts": ["CHEST"], "ask": [QUESTION]},
        {"body_parts": ["HAND"], "ask": ["Is there a fracture?"]},
    ]
    series = {"quiet": 0.5, "linger": 60, "slices": "all"}
    config = configuration(tmp_path / "node", series=series, questions=questions)
    with Node(config, StandIn()) as node:
        assert send(node.port, slice_of(1), slice_of(2, BodyPartExamined="HAND")) == [0, 0]
        answered(node)
        other = "1.2.826.0.4711.9"
        assert send(node.port, slice_of(2, SeriesInstanceUID=other, BodyPartExamined="")) == [0]
        wait_for(lambda: told_of(node)[0] == [("MRN-4711", [1])])


def test_what_comes_back_to_the_first_patient_is_answered_there_again(tmp_path: Path) -> None:
    engine = StandIn()
    with Node(configuration(tmp_path / "node"), engine) as node:
        for count, patient in enumerate(["MRN-4711", "MRN-0815", "MRN-4711"], 1):
            assert send(node.port, study(PatientID=patient)) == [0]
            answered(node, count)
        standing = node.queue._read("SELECT key FROM result WHERE replaced = ''")
        reports = {path.parent.name: path for path in node.folder.documents.glob(f"*/*.{REPORT}.*")}
        assert [dcmread(reports[key]).PatientID for (key,) in standing] == ["MRN-4711"]
        rejected = [
            dcmread(path).PatientID for path in node.folder.documents.glob("*/*.withdrawal.dcm")
        ]
        assert sorted(rejected) == ["MRN-0815", "MRN-4711"]
        uids = {str(dcmread(path).SOPInstanceUID) for path in reports.values()}
        assert len(uids) == 3
        assert send(node.port, study()) == [0]  # as it was sent last
        assert node.queue.counts()["waiting"] == 0
    assert engine.asked == 3


def test_what_comes_back_to_its_first_series_is_answered_there_again(tmp_path: Path) -> None:
    series = {"quiet": 0.5, "linger": 60, "slices": "all"}
    moved = slice_of(2, SeriesInstanceUID="1.2.826.0.4711.9")
    with Node(configuration(tmp_path / "node", series=series), StandIn()) as node:
        assert send(node.port, *map(slice_of, (1, 2, 3))) == [0] * 3
        answered(node)
        for again, standing in [(moved, [[1, 3], [2]]), (slice_of(2), [[1, 2, 3]])] * 2:
            assert send(node.port, again) == [0]
            quiet(node)
            assert [each for _, each in told_of(node)[0]] == standing
        assert send(node.port, slice_of(2)) == [0]  # as it was sent last
        assert node.queue.counts()["waiting"] == 0


def test_an_object_that_no_question_fits_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    questions = [{"body_parts": ["CHEST"], "ask": [QUESTION]}]
    with Node(configuration(tmp_path / "node", questions=questions), StandIn()) as node:
        same: dict[str, Any] = {"SeriesInstanceUID": "1.2.826.0.4711.77"}
        sent = [
            study(1, BodyPartExamined=""),
            study(2, BodyPartExamined="FOOT", **same),
            study(3, BodyPartExamined="FOOT", StudyInstanceUID="1.2.826.0.4711.2.1", **same),
            study(4, BodyPartExamined="MRN-4711 Doe", Modality="CT"),
            study(5, BodyPartExamined="Thorax"),
        ]
        assert send(node.port, *sent) == [0] * 5
        answered(node)
        assert node.queue.asides() == {"no_question": 4}
    told = [each for each in caplog.records if "fits no question" in each.message]
    assert [each.levelname for each in told] == ["WARNING", "WARNING", "INFO", "WARNING"]
    assert "(Modality CR, body part not given)" in told[0].message
    assert "(Modality CR, body part FOOT)" in told[1].message
    assert "(Modality CT, body part unknown)" in told[3].message


@pytest.mark.parametrize(
    ("said", "wanted", "fits"),
    [
        ("THORAX", "CHEST", True),
        ("chest", "Thorax", True),
        ("CHESTABDPELVIS", "CHEST", True),
        ("CHEST, ABDOMEN AND PELVIS", "PELVIS", True),
        ("Chest_Abd", "CHESTABDOMEN", True),
        ("CHEST", "CHESTABDOMEN", False),
        ("Left Knee", "KNEE", True),
        ("KNEE", "FOOT", False),
        ("CHEST", "51185008", True),
        ("C-SPINE", "CSPINE", True),
        ("Ohr", "OHR", True),
        ("", "CHEST", False),
    ],
)
def test_body_parts_are_compared_by_what_they_mean(said: str, wanted: str, fits: bool) -> None:
    questions = [{"body_parts": [wanted], "ask": ["q"]}]
    config = configuration(Path("node"), questions=questions)
    assert (config.questions_for("CR", body_parts(said)) == ("q",)) is fits


@pytest.mark.parametrize(
    ("value", "scheme"), [("816094009", "SCT"), ("51185008", "SCT"), ("T-D3000", "SRT")]
)
def test_a_region_is_known_by_its_code(value: str, scheme: str) -> None:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, "Brustkorb"
    assert "CHEST" in body_parts_of(study(BodyPartExamined="", AnatomicRegionSequence=[item]))
    frames, anatomy = Dataset(), Dataset()
    anatomy.AnatomicRegionSequence = [item]
    frames.FrameAnatomySequence = [anatomy]
    enhanced = study(BodyPartExamined="", SharedFunctionalGroupsSequence=[frames])
    assert "CHEST" in body_parts_of(enhanced)


@pytest.mark.parametrize(
    ("values", "when"),
    [
        ({}, "2024-05-06"),
        ({"AcquisitionDateTime": "20240507101112.5+0200"}, "2024-05-07T10:11:12+02:00"),
        (
            {
                "AcquisitionDate": "20240508",
                "AcquisitionTime": "101112",
                "TimezoneOffsetFromUTC": "-0500",
            },
            "2024-05-08T10:11:12-05:00",
        ),
        ({"ContentDate": "20240509", "ContentTime": "1011"}, "2024-05-09"),
        ({"StudyDate": ""}, ""),
        ({"StudyDate": "20241399"}, ""),
    ],
)
def test_when_an_image_was_taken(values: dict[str, Any], when: str) -> None:
    assert taken_at(study(**values)) == when


def test_fhir_names_patient_order_and_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = {"url": f"http://127.0.0.1:{free_port()}", "version": "R4"}
    config = configuration(
        tmp_path / "node",
        fhir=[server],
        identifiers={"patient": "urn:oid:1.2.3", "accession": "urn:oid:1.2.4"},
    )
    with Node(config, StandIn()) as node:
        assert send(node.port, study(1, AccessionNumber="A-77"), study(2, PatientID="")) == [0, 0]
        answered(node, 2)
        (path,) = node.folder.documents.glob("*/*.json")
        assert node.queue.counts()["unsent"] == 1
        assert node.queue.asides()["no_subject"] == 1
        wait_for(lambda: "no answer: ConnectError" in caplog.text)
        assert server["url"] in caplog.text
    _, observation, report = (entry["resource"] for entry in json.loads(path.read_bytes())["entry"])
    for resource in (observation, report):
        assert resource["effectiveDateTime"] == "2024-05-06"
        assert resource["subject"]["identifier"]["system"] == "urn:oid:1.2.3"
        order = resource["basedOn"][0]["identifier"]
        assert (order["system"], order["value"]) == ("urn:oid:1.2.4", "A-77")
        assert order["type"]["coding"][0]["code"] == "ACSN"
    assert report["identifier"][1] == order
    assert "no Patient ID: nothing of it is sent" in caplog.text


def test_what_fhir_does_not_know_keeps_no_result_back(tmp_path: Path) -> None:
    blank = "\xa0"
    odd = {"AccessionNumber": blank, "IssuerOfPatientID": blank}
    late = "20240507101112+1500"
    with Node(configuration(tmp_path / "node", documents=["fhir-r4"]), StandIn()) as node:
        objects = study(1, AcquisitionDateTime=late, **odd), study(2, PatientID=blank)
        assert send(node.port, *objects) == [0, 0]
        answered(node, 2)
        (path,) = node.folder.documents.glob("*/*.json")
        assert node.queue.asides()["no_subject"] == 1
    _, observation, report = (entry["resource"] for entry in json.loads(path.read_bytes())["entry"])
    assert observation["effectiveDateTime"] == "2024-05-07"
    assert "basedOn" not in report
    assert "assigner" not in report["subject"]["identifier"]


def test_one_association_for_a_batch(tmp_path: Path) -> None:
    associations: list[Event] = []
    with Archive() as archive:
        archive._entity.add_supported_context("1.2.840.10008.1.1")
        archive._server.bind(evt.EVT_ACCEPTED, associations.append)  # type: ignore[union-attr]
        destination = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}
        config = configuration(
            tmp_path / "node",
            documents=[REPORT, "basic-text-sr", "picture"],
            questions=[{"ask": ["a", "b", "c"]}],
            dicom=[destination],
        )
        with Node(config, StandIn()) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: len(archive.received) == 7)
            wait_for(lambda: node.queue.counts()["unsent"] == 0)
    assert len(associations) == 1
    sent = [datasets[0] for datasets in archive.received.values()]
    numbers = sorted(int(each.InstanceNumber) for each in sent if each.Modality == "SR")
    assert numbers == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_an_archive_that_takes_one_syntax_gets_that(tmp_path: Path, syntax: str) -> None:
    received: list[Dataset] = []

    def store(event: Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        received.append(dataset)
        return 0

    entity = ApplicationEntity("ARCHIVE")
    for ending in ("88.34", "7"):
        entity.add_supported_context(f"1.2.840.10008.5.1.4.1.1.{ending}", syntax)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)]
    )
    assert server is not None
    destination = {"ae_title": "A", "host": "127.0.0.1", "port": server.server_address[1]}
    documents = [REPORT, "picture"]
    config = configuration(tmp_path / "node", documents=documents, dicom=[destination])
    try:
        with Node(config, StandIn()) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: len(received) == 2)
            written = [dcmread(path) for path in node.folder.documents.glob("*/*.dcm")]
    finally:
        entity.shutdown()
    for dataset in received:
        assert dataset.file_meta.TransferSyntaxUID == syntax
        (same,) = [each for each in written if each.SOPInstanceUID == dataset.SOPInstanceUID]
        for element in same:
            if element.keyword != "PixelData":
                assert dataset[element.tag] == element
        if "PixelData" in same:
            assert (dataset.pixel_array == same.pixel_array).all()


def test_the_log_says_where_why_and_when(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    destination = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port}
    with Node(configuration(tmp_path / "node", dicom=[destination]), StandIn()) as node:
        assert send(node.port, study()) == [0]
        wait_for(lambda: "again in" in caplog.text)
    assert f"Sending to dicom://ARCHIVE@127.0.0.1:{port}: " in caplog.text
    assert "(it cannot be reached), again in 1 s." in caplog.text


CONFIG = """
folder = "node"
peers = [{ ae_title = "%s" }]
questions = [{ body_parts = ["CHEST"], ask = ["Is there effusion?"] }]
series = { quiet = 0, linger = 0 }
dicom = [{ ae_title = "ARCHIVE", host = "127.0.0.1", port = %d }]
"""


def test_the_queue_is_looked_at_and_tried_again(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    (tmp_path / "listen.toml").write_text(CONFIG % (PEER, port))
    listen, given = ("listen",), ("--config", "listen.toml", "--json")
    nothing = run(*listen, "status", *given[:2])
    assert nothing.exit_code == 2
    assert "no queue" in two_lines(nothing)[0]
    destination = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port}
    questions = [{"body_parts": ["CHEST"], "ask": [QUESTION]}]
    config = configuration(tmp_path / "node", dicom=[destination], questions=questions)
    with Archive(port) as archive, Node(config, StandIn()) as node:
        sent = [study(1), study(2, BodyPartExamined="")]
        assert send(node.port, *sent) == [0, 0]
        wait_for(lambda: len(archive.received) == 1 and not node.queue.counts()["unsent"])
        (job,) = (
            node.queue.job(key)
            for (key,) in node.queue._read("SELECT key FROM series WHERE state = 'answered'")
        )
        status = json.loads(run(*listen, "status", *given).stdout)
        assert status == {
            "objects": 2,
            "series": {"waiting": 0, "answered": 1, "failed": 0, "aside": 1},
            "results": 1,
            "not_asked": {"no_question": 1},
            "unsent": {f"dicom://ARCHIVE@127.0.0.1:{port}": 0},
            "set_aside": {},
            "uncommitted": {},
            "requests": {"waiting": 0, "fetched": 0, "failed": 0},
        }
        rows = json.loads(run(*listen, "show", *given).stdout)["series"]
        assert [(row["state"], row["results"]) for row in rows] == [("aside", 0), ("answered", 1)]
        found = json.loads(run(*listen, "show", job.key[:8], *given).stdout)
        assert found["results"][0]["answers"][0]["question"] == QUESTION
        assert found["results"][0]["deliveries"][0]["sent"] is True
        count = json.loads(run(*listen, "requeue", job.key[:8], *given).stdout)
        assert count == {"sent_again": 1, "gone": 0}
        wait_for(lambda: sum(archive.forms.values()) == 2)
        assert len(archive.forms) == 1  # the same bytes
        wrong = run(*listen, "retry", job.key[:8], *given)
        assert wrong.exit_code == 2
        for letters in ("00", "zzzz", "%%%%"):
            assert run(*listen, "show", letters, *given).exit_code == 2
        assert "answered" in run(*listen, "status", *given[:2]).stdout
        assert job.key[:16] in run(*listen, "show", *given[:2]).stdout


def test_what_was_given_up_is_tried_again(tmp_path: Path, run: Run) -> None:
    (tmp_path / "listen.toml").write_text(CONFIG % (PEER, free_port()))
    given = ("--config", "listen.toml", "--json")
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        path = node.folder.image("a" * 64)
        path.write_bytes(b"no image")
        node.queue.add("a" * 64, "b" * 64, PEER, [QUESTION])
        wait_for(lambda: node.queue.counts()["failed"] == 1)
        whole = study()
        whole.save_as(path, implicit_vr=False, enforce_file_format=True)
        (row,) = json.loads(run("listen", "show", *given).stdout)["series"]
        assert (row["state"], row["objects"]) == ("failed", 1)
        assert "none of its slices can be read" in row["why"]
        told = json.loads(run("listen", "retry", *given).stdout)
        assert told == {"tried_again": 1, "sent_again": 0, "gone": 0}
        answered(node)
