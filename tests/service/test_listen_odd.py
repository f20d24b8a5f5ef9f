"""Objects as real devices send them: kept as they are and told of, or refused with a reason.

What belongs to a patient is never lost, mixed with another's, or emptied without a word.
"""

import contextlib
import hashlib
import io
import json
import logging
import socket
import sqlite3
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import raising
from hypothesis import given, settings
from hypothesis import strategies as st
from listen_process import PEER, SOME, StandIn, configuration, send, study, wait_for
from pydicom import DataElement, Dataset, config, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, SecondaryCaptureImageStorage
from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR
from pynetdicom.ae import ApplicationEntity
from pynetdicom.dsutils import encode
from test_listen_fuzz import fake_event

from medmoe_edge.bedside.listen import receiving as listen_receiving
from medmoe_edge.bedside.listen.answering import encoded
from medmoe_edge.bedside.listen.evidence import Evidence
from medmoe_edge.bedside.listen.header import (
    SHARED,
    Origin,
    notices_of,
    origin_of,
    same_patient,
    text_of,
)
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.bedside.listen.queue import Queue, key_of
from medmoe_edge.bedside.listen.schema import Membership
from medmoe_edge.errors import ImageError, ResourceError
from medmoe_edge.image.pixels import Image

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning"
)
REPORT = "comprehensive-3d-sr"
LONG = "MRN-4711-" + "9" * 61  # 70 characters
RETIRED_ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6"
PRIVATE = "1.3.46.670589.11.0.0.12.99"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    documents = [REPORT, "basic-text-sr", "fhir-r4", "picture"]
    with Node(configuration(tmp_path / "node", documents=documents), StandIn()) as node:
        yield node


ISSUED = {"IssuerOfPatientID": "HOSPITAL"}


def odd(number: int = 1, **values: Any) -> Dataset:
    """A study whose values need not be allowed."""
    dataset = study(number)
    for keyword, value in values.items():
        vr = dictionary_VR(keyword)
        dataset.add(DataElement(keyword, vr, value, validation_mode=config.IGNORE))
    return dataset


def answered(node: Node, count: int = 1) -> None:
    wait_for(lambda: node.queue.counts()["answered"] == count, 60)


def reports(node: Node, kind: str = REPORT) -> list[Dataset]:
    """Of a kind, in the order in which the objects came."""
    order = [key for (key,) in node.queue._read("SELECT key FROM object ORDER BY number")]
    paths = [path for key in order for path in node.folder.documents.glob(f"{key}/*.{kind}.dcm")]
    return [dcmread(path) for path in paths]


def rejections(node: Node) -> list[Dataset]:
    """The key objects that withdraw reports."""
    return [dcmread(path) for path in node.folder.documents.glob("*/*.withdrawal.dcm")]


def classes_referred_to(report: Dataset) -> set[str]:
    """The classes of all references in a report, its evidence and its content."""
    found: set[str] = set()

    def look(_: Dataset, element: DataElement) -> None:
        if element.keyword == "ReferencedSOPClassUID":
            found.add(str(element.value))

    report.walk(look)
    return found


def warnings_of(node: Node) -> list[list[str]]:
    """The codes of the answers' warnings, in the order in which the objects came."""
    rows = sqlite3.connect(node.folder.queue).execute(
        "SELECT answer FROM answer JOIN object USING (key) ORDER BY number"
    )
    return [[each["code"] for each in json.loads(text)["warnings"]] for (text,) in rows]


ODD = [
    ("PatientID", LONG),
    ("PatientID", "MRN\\4711"),
    ("PatientID", "MRN\t4711"),
    ("IssuerOfPatientID", "H" * 80),
    ("PatientName", "Doe" * 40 + "^Jane"),
    ("PatientName", "Doe^Jane^^^^^Too^Many"),
    ("PatientBirthDate", "1970-02-03"),
    ("PatientBirthDate", "19700231"),
    ("PatientBirthDate", "about 1970"),
    ("PatientSex", "female"),
    ("StudyDate", "2024.05.06"),
    ("StudyTime", "25:61"),
    ("AccessionNumber", "ACCESSION-OF-MORE-THAN-16"),
    ("StudyID", "x" * 99),
    ("ReferringPhysicianName", "House" * 20),
]


def test_what_breaks_the_standard_is_taken_over_as_it_is_and_told_of(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    sent = [odd(number, **{keyword: value}) for number, (keyword, value) in enumerate(ODD)]
    assert send(node.port, *sent) == [0] * len(ODD)
    answered(node, len(ODD))
    plain = study()
    for kind in (REPORT, "basic-text-sr", "picture"):
        for report, (keyword, value) in zip(reports(node, kind), ODD, strict=True):
            assert text_of(report, keyword).value == value
            for other in set(SHARED) - {keyword}:
                assert text_of(report, other).value == text_of(plain, other).value
    assert warnings_of(node) == [["nonconforming_header"]] * len(ODD)
    for keyword, value in ODD:
        assert f"breaks the standard in {keyword}" in caplog.text
        assert value not in caplog.text
    paths = [node.folder.documents.glob(f"{key_of(each.SOPInstanceUID)}/*.json") for each in sent]
    for (path,), (keyword, value) in zip(paths, ODD, strict=True):
        subject = json.loads(path.read_text())["entry"][1]["resource"]["subject"]
        assert subject["identifier"]["value"] == (value if keyword == "PatientID" else "MRN-4711")


def test_uids_of_real_devices_are_taken(node: Node) -> None:
    odd_uids = [
        ("StudyInstanceUID", "1.2.826.0.4711.01.1"),
        ("SeriesInstanceUID", "1.2.826.0.4711." + "7" * 60),
        ("SOPInstanceUID", "1.2.826.0.04711.5"),
    ]
    sent = [odd(number, **{keyword: uid}) for number, (keyword, uid) in enumerate(odd_uids)]
    assert send(node.port, *sent) == [0, 0, 0]
    answered(node, 3)
    for report, (_, uid), image in zip(reports(node), odd_uids, sent, strict=True):
        (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
        series = evidence.ReferencedSeriesSequence[0]  # and the picture's
        (instance,) = series.ReferencedSOPSequence
        referred = [
            str(evidence.StudyInstanceUID),
            str(series.SeriesInstanceUID),
            str(instance.ReferencedSOPInstanceUID),
        ]
        assert uid in referred
        assert instance.ReferencedSOPClassUID == image.SOPClassUID
        assert classes_referred_to(report) == {image.SOPClassUID, SecondaryCaptureImageStorage}
        assert report.StudyInstanceUID == image.StudyInstanceUID == referred[0]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"SeriesInstanceUID": "Jane"}, "The object's SeriesInstanceUID is no UID."),
        ({"StudyInstanceUID": ""}, "The object has no StudyInstanceUID."),
        ({"Rows": 17}, "The object"),
    ],
)
def test_a_refusal_says_why_to_the_sender_and_in_the_log(
    node: Node, values: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    entity = ApplicationEntity(PEER)
    entity.add_requested_context(study().SOPClassUID)
    association = entity.associate("127.0.0.1", node.port, ae_title="MEDMOE")
    told = association.send_c_store(odd(**values))
    association.release()
    assert told.Status == 0xC000
    assert told.ErrorComment.startswith(why)
    assert f"An object was refused (0xC000): {why}" in caplog.text
    assert "Jane" not in caplog.text


def test_withdrawn_and_private_classes_are_taken_where_they_show_something(
    node: Node,
) -> None:
    empty = study(3, SOPClassUID=PRIVATE)
    del empty.PixelData
    classes = (RETIRED_ULTRASOUND, PRIVATE)
    sent = [study(number, SOPClassUID=uid) for number, uid in enumerate(classes)]
    assert send(node.port, *sent, empty) == [0, 0, 0]
    answered(node, 2)
    assert node.queue.asides() == {"no_pixels": 1}
    for kind in (REPORT, "basic-text-sr"):
        for report, uid in zip(reports(node, kind), classes, strict=True):
            assert uid in classes_referred_to(report)
            assert study().SOPClassUID not in classes_referred_to(report)


def test_what_is_not_taken_of_an_offer_is_in_the_log(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    entity = ApplicationEntity(PEER)
    entity.add_requested_context(study().SOPClassUID, "1.2.840.113619.5.2")
    entity.add_requested_context("1.2.840.10008.5.1.4.1.2.2.1")
    entity.add_requested_context("1.2.840.10008.1.1")
    entity.associate("127.0.0.1", node.port, ae_title="MEDMOE").release()
    assert "Not taken here (1): Study Root Query/Retrieve" in caplog.text
    assert "Offered in no readable encoding: Computed Radiography Image Storage." in caplog.text


@pytest.mark.timeout(30)
def test_who_says_nothing_keeps_no_node_from_ending(tmp_path: Path) -> None:
    with Node(configuration(tmp_path / "node", timeout=600.0), StandIn(), patience=300.0) as node:
        silent = socket.create_connection(("127.0.0.1", node.port))
        assert send(node.port, study()) == [0]  # so that it has been taken by then
    with silent:
        assert silent.recv(1) == b""


def test_names_in_wrong_character_sets_lose_no_letter(node: Node) -> None:
    cases = [
        (b"ISO_IR 100", b"ISO_IR 100", "Müller^Jürgen", []),
        (b"ISO_IR 100", b"ISO_IR 192", "Müller^Jürgen", ["wrong_character_set"]),
        (b"ISO_IR 192", b"ISO_IR 999", "Müller^Jürgen", ["wrong_character_set"]),
        (b"ISO_IR 192", b"ISO_IR 192", "Müller^Jürgen", []),
        (b"ISO_IR 192", b"ISO_IR 6  ", "Müller^Jürgen", ["wrong_character_set"]),
        (b"ISO_IR 100", b"ISO_IR 6  ", "Müller^Jürgen", ["wrong_character_set"]),
        (b"ISO_IR 144", b"ISO_IR 144", "Щукин^Юлия", []),
    ]
    for number, (written, declared, name, _) in enumerate(cases):
        dataset = study(number, SpecificCharacterSet=written.decode())
        dataset.PatientName = name
        assert _receive(node, dataset, written, declared) == 0
    answered(node, len(cases))
    assert [str(report.PatientName) for report in reports(node)] == [case[2] for case in cases]
    assert warnings_of(node) == [case[3] for case in cases]


def test_a_patient_without_a_number_is_told_of(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    assert send(node.port, study(PatientID="")) == [0]
    answered(node)
    assert warnings_of(node) == [["no_patient_id"]]
    assert "no Patient ID" in caplog.text


def test_the_same_object_in_another_encoding_is_the_same(tmp_path: Path) -> None:
    engine = StandIn()
    with Node(configuration(tmp_path / "node"), engine) as node:
        for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
            nested = Dataset()
            nested.ReferencedSOPInstanceUID = "1.2.3"
            dataset = study(PixelSpacing=[0.5, 0.5], ReferencedImageSequence=[nested])
            dataset.file_meta.TransferSyntaxUID = syntax
            entity = ApplicationEntity(PEER)
            entity.add_requested_context(dataset.SOPClassUID, syntax)
            association = entity.associate("127.0.0.1", node.port, ae_title="MEDMOE")
            assert association.send_c_store(dataset).Status == 0
            association.release()
        answered(node)
        assert node.queue.counts()["waiting"] == 0
    assert engine.asked == 1


def test_a_name_in_three_scripts_stays_one(node: Node) -> None:
    dataset = study(SpecificCharacterSet=["", "ISO 2022 IR 87"])
    dataset.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    assert _receive(node, dataset) == 0
    answered(node)
    (report,) = reports(node)
    assert str(report.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
    assert warnings_of(node) == [[]]


def test_a_corrected_object_is_answered_anew(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    first, corrected = study(), study(PixelData=SOME[::-1].tobytes())
    assert send(node.port, first) == [0]
    answered(node)
    assert send(node.port, corrected, corrected, first) == [0, 0, 0]  # each known by now
    answered(node, 2)
    assert node.queue.counts()["waiting"] == 0
    old, new = reports(node)
    (predecessor,) = new.PredecessorDocumentsSequence
    (series,) = predecessor.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID
    assert series.SeriesInstanceUID == old.SeriesInstanceUID == new.SeriesInstanceUID
    assert old.SOPInstanceUID != new.SOPInstanceUID
    assert "PredecessorDocumentsSequence" not in old
    assert warnings_of(node) == [[], ["sent_again"]]
    assert "sent again with other content" in caplog.text


def test_of_a_corrected_object_that_waits_only_the_last_is_asked(tmp_path: Path) -> None:
    seen = []

    class Looking(StandIn):
        def ask_all(self, image: Image, questions: Any, *, max_new_tokens: int, **_: Any) -> Any:
            seen.append(int(image.pixels[0, 0, 0]))
            return super().ask_all(image, questions, max_new_tokens=max_new_tokens)

    with Node(configuration(tmp_path / "node"), Looking(0.2)) as node:
        corrected = study(PixelData=SOME[::-1].tobytes())
        assert send(node.port, study(9), study(), corrected) == [0, 0, 0]
        answered(node, 2)
    assert seen[1:] == [240]


def test_reading_names_changes_nothing_for_other_threads() -> None:
    """pydicom's strictness and the filters of warnings are the process's, and so of all senders."""
    data = encoded(study(SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jürg"))
    mode, filters, seen = config.settings.reading_validation_mode, [*warnings.filters], set[bool]()

    def read() -> None:
        for _ in range(100):
            notices_of(dcmread(io.BytesIO(data)))
            same = config.settings.reading_validation_mode == mode
            seen.add(same and [*warnings.filters] == filters)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == {True}


def test_results_of_a_patient_whose_header_is_odd_are_withdrawn_too(node: Node) -> None:
    """As they are in the header: highdicom takes no such values."""
    values: dict[str, Any] = {
        "PatientSex": "X",
        "PatientBirthDate": "1.1.1970",
        "StudyDate": "2024-05-06",
    }
    assert send(node.port, odd(**values)) == [0]
    answered(node)
    assert send(node.port, study(PatientID="MRN-0815", PatientName="Roe^Richard")) == [0]
    answered(node, 2)
    (rejection,) = rejections(node)
    assert rejection.PatientID == "MRN-4711"
    assert {name: text_of(rejection, name).value for name in values} == values


def test_the_same_uid_of_another_patient_is_kept_apart(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    assert send(node.port, study()) == [0]
    answered(node)
    assert send(node.port, study(PatientID="MRN-0815", PatientName="Roe^Richard")) == [0]
    answered(node, 2)
    old, new = reports(node)
    assert [(each.PatientID, each.PatientName) for each in (old, new)] == [
        ("MRN-4711", "Doe^Jane"),
        ("MRN-0815", "Roe^Richard"),
    ]
    assert old.SeriesInstanceUID != new.SeriesInstanceUID
    assert "PredecessorDocumentsSequence" not in new
    assert warnings_of(node)[1] == ["sent_again", "other_patient"]
    assert "in the name of another patient" in caplog.text
    assert "its results are withdrawn: the patient was another" in caplog.text
    (rejection,) = rejections(node)
    assert (rejection.PatientID, rejection.StudyInstanceUID) == ("MRN-4711", old.StudyInstanceUID)
    assert rejection.ConceptNameCodeSequence[0].CodeValue == "113037"  # for patient safety
    rejected = {
        str(instance.ReferencedSOPInstanceUID)
        for series in rejection.CurrentRequestedProcedureEvidenceSequence[
            0
        ].ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }
    wrong = {
        str(dcmread(path).SOPInstanceUID)
        for path in node.folder.documents.glob(f"{key_of(study().SOPInstanceUID)}/*.dcm")
    }
    assert rejected == wrong
    fhir = [json.loads(path.read_bytes()) for path in node.folder.documents.glob("*/withdrawn.*")]
    assert [[each["request"]["method"] for each in one["entry"]] for one in fhir] == [
        ["POST", "PUT", "PUT"]
    ]
    assert [each["resource"]["status"] for each in fhir[0]["entry"][1:]] == ["entered-in-error"] * 2
    for secret in ("MRN-0815", "Roe", "MRN-4711", "Doe"):
        assert secret not in caplog.text
        assert secret.encode() not in node.folder.queue.read_bytes()


def test_two_patients_in_one_study_get_a_series_each(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    same = {"StudyInstanceUID": "1.2.826.0.4711.1", "SeriesInstanceUID": "1.2.826.0.4711.2"}
    assert send(node.port, study(1, **same), study(2, **same, PatientID="MRN-0815")) == [0, 0]
    answered(node, 2)
    first, second = reports(node)
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert "another patient's too" in caplog.text
    assert warnings_of(node)[1] == ["shared_study"]


def issued_by(universal: str, dataset: Dataset) -> Dataset:
    """The same, whose patient's number was issued by whom an identifier names."""
    item = Dataset()
    item.UniversalEntityID, item.UniversalEntityIDType = universal, "ISO"
    dataset.IssuerOfPatientIDQualifiersSequence = [item]
    return dataset


def test_one_number_of_two_issuers_that_identifiers_name_is_two_patients(tmp_path: Path) -> None:
    same = {"StudyInstanceUID": "1.2.826.0.4711.1", "SeriesInstanceUID": "1.2.826.0.4711.2"}
    scans = [issued_by(f"1.2.3.{each}", study(each, **same)) for each in (1, 2)]
    scans.append(study(3, **same, IssuerOfPatientID="HOSPITAL"))
    scans.append(issued_by("1.2.3.4", study(4, **same, IssuerOfPatientID="HOSPITAL")))
    kinds = [REPORT, "basic-text-sr", "picture", "fhir-r4", "hl7-v2"]
    series = {"quiet": 1.0}
    with Node(configuration(tmp_path / "node", documents=kinds, series=series), StandIn()) as node:
        assert send(node.port, *scans) == [0] * 4
        answered(node, 3)
        assert [each["objects"] for each in node.desk.series()] == [2, 1, 1]
        folders = [path for path in node.folder.documents.iterdir() if list(path.glob("*.dcm"))]
        for folder in folders:
            made = [dcmread(path) for path in folder.glob("*.dcm")]
            named = {str(each.get("IssuerOfPatientIDQualifiersSequence")) for each in made}
            assert len(named) == 1
            assert len(made) == 3
            (message,) = (path.read_bytes() for path in folder.glob("*.hl7"))
            (fhir,) = (json.loads(path.read_text()) for path in folder.glob("*.json"))
            identifier = fhir["entry"][2]["resource"]["subject"]["identifier"]
            if (own := made[0].get("IssuerOfPatientIDQualifiersSequence")) is not None:
                universal = own[0].UniversalEntityID
                assert f"&{universal}&ISO|".encode() in message
                assert universal in ("1.2.3.4", identifier["assigner"]["display"])
        again = issued_by("1.2.3.9", study(1, **same))
        assert send(node.port, again) == [0]
        wait_for(lambda: len(rejections(node)) == 1)


def test_a_series_whose_objects_differ_in_their_patient_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that only writes the same otherwise, or was corrected as a whole, says nothing."""
    same = {"StudyInstanceUID": "1.2.826.0.4711.1", "SeriesInstanceUID": "1.2.826.0.4711.2"}
    about = {"PatientBirthDate": "19700203", "PatientSex": "F"}

    def of(number: int, **values: Any) -> Dataset:
        return study(number, InstanceNumber=str(number), **same | about | values)

    series = {"quiet": 0.5, "linger": 60}
    with Node(configuration(tmp_path / "node", series=series), StandIn()) as node:

        def told(count: int) -> str:
            answered(node, count)
            (text,) = node.queue._column(
                "SELECT answer FROM answer JOIN result USING (key) WHERE replaced = ''"
            )
            return str({each["code"]: each["message"] for each in json.loads(text)["warnings"]})

        others = [of(2, PatientName="DOE^JANE^^", PatientSex=""), of(3, PatientBirthDate="")]
        assert send(node.port, of(1), *others) == [0] * 3
        assert "patient_differs" not in told(1)
        assert send(node.port, of(4, PatientName="Roe^Richard", PatientSex="M")) == [0]
        assert "differ in PatientName, PatientSex: look whose images they are" in told(2)
        assert "differ in PatientName, PatientSex: look whose images they are" in caplog.text
        assert send(node.port, of(3, PatientBirthDate="19710203")) == [0]  # 2 is asked still
        assert "differ in PatientName, PatientBirthDate, PatientSex: look" in told(3)
        assert send(node.port, of(4), of(3)) == [0, 0]
        assert "patient_differs" not in told(4)
        for secret in ("Roe", "Doe", "19700203"):
            assert secret not in caplog.text
            assert secret.encode() not in node.folder.queue.read_bytes()


@pytest.mark.parametrize("issuers", [("", "HOSPITAL"), ("HOSPITAL", "")])
def test_who_issued_the_number_makes_no_other_patient_where_one_does_not_say(
    node: Node, caplog: pytest.LogCaptureFixture, issuers: tuple[str, str]
) -> None:
    for count, issuer in enumerate(issuers, 1):
        assert send(node.port, study(IssuerOfPatientID=issuer)) == [0]
        answered(node, count)
    old, new = reports(node)
    assert [each.IssuerOfPatientID or "" for each in (old, new)] == list(issuers)
    assert "PredecessorDocumentsSequence" in new
    assert warnings_of(node)[1] == ["sent_again"]
    assert not rejections(node)
    assert "another patient" not in caplog.text
    assert len(node.desk.series()) == 1
    assert send(node.port, study(IssuerOfPatientID=issuers[0])) == [0]  # known
    assert node.queue.counts()["waiting"] == 0
    assert send(node.port, study(IssuerOfPatientID="ELSEWHERE")) == [0]
    answered(node, 3)
    assert warnings_of(node)[2] == ["sent_again", "other_patient"]
    rejected = rejections(node)
    assert {each.PatientID for each in rejected} == {"MRN-4711"}
    references = {
        str(instance.ReferencedSOPInstanceUID)
        for each in rejected
        for series in each.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }
    assert new.SOPInstanceUID in references
    assert reports(node)[2].SOPInstanceUID not in references


def test_what_comes_back_without_an_issuer_after_another_patient_is_answered_again(
    node: Node,
) -> None:
    for count, issuer in enumerate(["", "HOSPITAL", "ELSEWHERE", ""], 1):
        assert send(node.port, study(IssuerOfPatientID=issuer)) == [0]
        answered(node, count)
    standing = node.queue._read("SELECT key FROM result WHERE replaced = ''")
    assert len(standing) == 1
    (path,) = node.folder.documents.glob(f"{standing[0][0]}/*.{REPORT}.dcm")
    assert not dcmread(path).IssuerOfPatientID


def test_a_series_stays_whole_where_some_of_it_lacks_the_issuer(tmp_path: Path) -> None:
    same = {"StudyInstanceUID": "1.2.826.0.4711.1", "SeriesInstanceUID": "1.2.826.0.4711.2"}

    def of(number: int, issuer: str, **values: Any) -> Dataset:
        given = same | {"InstanceNumber": str(number), "IssuerOfPatientID": issuer}
        return study(number, **given, **values)

    series = {"quiet": 1.0, "slices": "all"}
    with Node(configuration(tmp_path / "node", series=series), StandIn()) as node:
        scans = [of(1, ""), of(2, "A"), of(3, "")]
        assert send(node.port, *scans) == [0] * 3
        answered(node)
        (found,) = node.desk.series()
        assert (found["objects"], found["results"]) == (3, 1)
        # another's, two that may be of either, and one of a third
        more = [of(number, issuer) for number, issuer in enumerate(["B", "", "A", "", "C"], 4)]
        assert send(node.port, *more) == [0] * 5
        answered(node, 5)
        assert sorted(each["objects"] for each in node.desk.series()) == [1, 1, 2, 4]


def test_patients_are_compared_once_however_many_objects_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Counter[str]()

    def counted(one: str, other: str) -> bool:
        compared["patients"] += 1
        return same_patient(one, other)

    monkeypatch.setattr("medmoe_edge.bedside.listen.queue.same_patient", counted)
    with contextlib.closing(Queue(tmp_path / "queue.sqlite")) as queue:
        membership = Membership("series", any_issuer="series")
        for number in range(50):
            origin = Origin(f"uid {number}", f"content {number}", "patient", "study")
            queue.add(f"{number}", "", PEER, [], origin, membership)
        assert queue.joined(membership, "patient") == membership
        assert not queue.shares_study(Origin("another", "", "patient", "study"))
    assert compared["patients"] <= 2


def test_a_series_is_not_quiet_while_something_of_it_comes_that_was_thought_anothers(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread keeps an object without an issuer before the lock is ours."""
    same = {"StudyInstanceUID": "1.2.826.0.4711.1", "SeriesInstanceUID": "1.2.826.0.4711.2"}
    joined, add, seen = node.queue.joined, node.queue.add, list[tuple[str, float]]()

    def other_comes(membership: Membership, patient: str) -> Membership:
        found = joined(membership, patient)
        monkeypatch.setattr(node.queue, "joined", joined)
        assert send(node.port, study(1, **same)) == [0]
        return found

    def looking(*given: Any) -> None:
        series = given[5].series
        seen.append((series, node.queue.quiet(series)))
        add(*given)

    monkeypatch.setattr(node.queue, "joined", other_comes)
    monkeypatch.setattr(node.queue, "add", looking)
    assert send(node.port, study(2, **same, **ISSUED)) == [0]
    (first, second) = seen
    assert first == second == (first[0], 0.0)


def test_a_queue_of_the_version_before_is_gone_on_with(tmp_path: Path) -> None:
    config = configuration(tmp_path / "node", dicom=[{"ae_title": "A", "host": "x", "port": 1}])
    scan = study(IssuerOfPatientID="HOSPITAL")
    with Node(config, StandIn()) as node:
        assert send(node.port, scan) == [0]
        answered(node)
        ((patient,),) = node.queue._read("SELECT patient FROM origin")
    with contextlib.closing(sqlite3.connect(node.folder.queue)) as database:
        database.executescript(
            f"""DROP INDEX object_any_issuer;
            ALTER TABLE object DROP COLUMN any_issuer;
            ALTER TABLE delivery DROP COLUMN refused;
            UPDATE origin SET patient = '{patient.split()[1]}';
            PRAGMA user_version = 3;"""
        )
    with Node(config, StandIn()) as node:
        assert node.queue.counts() == {"waiting": 0, "answered": 1, "failed": 0, "unsent": 1}
        assert send(node.port, scan) == [0]  # known
        assert node.queue.counts()["waiting"] == 0
        assert send(node.port, study(2, StudyInstanceUID=scan.StudyInstanceUID, **ISSUED)) == [0]
        answered(node, 2)
        assert node.desk.status(config)["set_aside"] == {}
    assert warnings_of(node) == [[], []]


def test_what_was_given_up_is_tried_again_when_it_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Node(configuration(tmp_path / "node"), StandIn()) as node:
        with monkeypatch.context() as patch:
            patch.setattr(node.answering, "_ask", raising(ImageError("", "")))
            assert send(node.port, study()) == [0]
            wait_for(lambda: node.queue.counts()["failed"] == 1)
        assert send(node.port, study()) == [0]
        answered(node)
        assert node.queue.counts()["failed"] == 0


def test_what_nothing_was_asked_of_is_asked_when_it_is_sent_again(tmp_path: Path) -> None:
    none = [{"modalities": ["CT"], "ask": ["a"]}]
    with Node(configuration(tmp_path / "node", questions=none), StandIn()) as node:
        assert send(node.port, study()) == [0]
        assert list(node.folder.images.iterdir()) == []
    engine = StandIn()
    with Node(configuration(tmp_path / "node"), engine) as node:
        assert send(node.port, study()) == [0]
        wait_for(lambda: engine.asked == 1)


OLD_QUEUE = """
CREATE TABLE object (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL,
    peer TEXT NOT NULL, questions TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'waiting' CHECK
    (state IN ('waiting', 'answered', 'failed')), attempts INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE INDEX object_state ON object (state, attempts, number);
CREATE TABLE answer (key TEXT NOT NULL REFERENCES object (key), question TEXT NOT NULL,
    answer TEXT NOT NULL, PRIMARY KEY (key, question)) STRICT;
CREATE TABLE delivery (number INTEGER PRIMARY KEY, document TEXT NOT NULL,
    destination TEXT NOT NULL, sent INTEGER NOT NULL DEFAULT 0,
    UNIQUE (document, destination)) STRICT;
CREATE TABLE origin (key TEXT PRIMARY KEY, uid TEXT NOT NULL, content TEXT NOT NULL,
    patient TEXT NOT NULL, study TEXT NOT NULL) STRICT;
"""


@pytest.mark.parametrize("has_origins", [True, False])  # the first version kept none
def test_a_queue_of_an_earlier_version_is_gone_on_with(tmp_path: Path, has_origins: bool) -> None:
    """One object answered, one waiting, one given up, and one of which nothing was asked."""
    root = tmp_path / "node"
    (root / "images").mkdir(parents=True)
    with sqlite3.connect(root / "queue.sqlite") as database:
        database.executescript(OLD_QUEUE)
        states = ["answered", "waiting", "failed", "answered"]
        for number, state in enumerate(states, 1):
            dataset = study(number)
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            path = root / "images" / f"{key_of(dataset.SOPInstanceUID)}.dcm"
            path.write_bytes(fake_event(_implicit(dataset)).encoded_dataset())
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            questions = "[]" if number == 4 else '["q"]'
            row = (path.stem, sha256, PEER, questions, state)
            database.execute(
                "INSERT INTO object (key, sha256, peer, questions, state) VALUES (?, ?, ?, ?, ?)",
                row,
            )
            if has_origins:
                header, pixels = listen_receiving._parts(path.read_bytes())
                origin = origin_of(header, pixels[8:])
                statement = "INSERT INTO origin VALUES (?, ?, ?, ?, ?)"
                database.execute(statement, (path.stem, *origin[:4]))
        answered_key = key_of(study(1).SOPInstanceUID)
        database.execute("INSERT INTO answer VALUES (?, 'q', '{}')", (answered_key,))
        database.execute("INSERT INTO delivery VALUES (1, 'x/y.dcm', 'gone', 0)")
    engine = StandIn()
    with Node(configuration(root), engine) as node:
        answered(node, 2)  # and the second
        assert node.queue.counts() == {"waiting": 0, "answered": 2, "failed": 1, "unsent": 1}
        assert node.queue.asides() == {"no_question": 1}
        if has_origins:
            assert send(node.port, study(1), study(2)) == [0, 0]  # known
            assert node.queue.counts()["waiting"] == 0
        assert send(node.port, study(3), study(1, PatientID="MRN-0815")) == [0, 0]
        answered(node, 4)
    assert engine.asked == 3
    Queue(root / "queue.sqlite").close()
    with sqlite3.connect(root / "queue.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ResourceError, match="later version"):
        Node(configuration(root), engine)


def test_the_picture_that_the_model_saw_goes_with_the_report(node: Node) -> None:
    assert send(node.port, study()) == [0]
    answered(node)
    (report,), (picture,) = reports(node), reports(node, "picture")
    assert (picture.pixel_array == SOME[::2, ::2, None]).all()
    assert picture.PatientID == "MRN-4711"
    assert picture.SourceImageSequence[0].ReferencedSOPInstanceUID == study().SOPInstanceUID
    assert str(picture.SOPInstanceUID).encode() in encoded(report)
    assert str(picture.SOPInstanceUID).encode() in encoded(reports(node, "basic-text-sr")[0])


@given(data=st.data(), keyword=st.sampled_from(SHARED))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_through(data: st.DataObject, keyword: str) -> None:
    """Whatever a header holds, what is made of it can be written, and holds the same."""
    codec = "utf-8" if dictionary_VR(keyword) in CUSTOMIZABLE_CHARSET_VR else "latin-1"
    marks = st.characters(codec=codec, exclude_characters="\0")
    value = data.draw(st.text(marks, max_size=90)).strip("\0 ")
    dataset = odd(1, **{keyword: value}, SpecificCharacterSet="ISO_IR 192")
    evidence = Evidence.of(_read(_implicit(dataset)), Image.from_array(SOME), "0" * 64)
    document = Dataset()
    document.SpecificCharacterSet = "ISO_IR 192"
    evidence.take_over(document)
    assert text_of(_read(_implicit(document)), keyword).value == value


def _implicit(dataset: Dataset) -> bytes:
    data = encode(dataset, is_implicit_vr=True, is_little_endian=True)
    assert data is not None
    return data


def _read(data: bytes) -> Dataset:
    return dcmread(io.BytesIO(data), force=True)


def _receive(node: Node, dataset: Dataset, old: bytes = b"", new: bytes = b"") -> int:
    """Give it to the handlers, bytes in it exchanged; the status."""
    receiving = listen_receiving.Receiving(
        node.configuration, node.folder, node.queue, lambda: None
    )
    data = _implicit(dataset)
    event = fake_event(data.replace(old, new) if old else data)
    event.request.AffectedSOPInstanceUID = dataset.SOPInstanceUID
    return int(receiving.store(event).Status)  # type: ignore[arg-type]


def test_a_queue_that_is_closed_says_so(tmp_path: Path) -> None:
    """As to a source that outlives the node's patience."""
    queue = Queue(tmp_path / "queue.sqlite")
    queue.close()
    with pytest.raises(ResourceError, match="cannot be used"):
        queue.counts()
