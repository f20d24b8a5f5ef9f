"""Real peers: DCMTK sends and reads, Orthanc takes reports and gives them back; FHIR over HTTP."""

import http.server
import io
import json
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hl7
import numpy as np
import pytest
from command_line import answer_to
from dicom_files import saved
from dicom_peers import call, get, orthanc_at, post_to, put_to, tool
from fhir.resources.bundle import Bundle
from fhir.resources.R4B.bundle import Bundle as BundleR4B
from highdicom.sr import MeasurementReport, srread
from listen_process import (
    PEER,
    QUESTION,
    SOME,
    StandIn,
    configuration,
    located,
    send,
    study,
    wait_for,
)
from pydicom import Dataset, dcmread
from pydicom.sr.coding import Code
from pydicom.uid import BasicTextSRStorage, CTImageStorage, EncapsulatedPDFStorage

from medmoe_edge.bedside.listen import evidence
from medmoe_edge.bedside.listen.answering import encoded
from medmoe_edge.bedside.listen.config import Certainty, Finding
from medmoe_edge.bedside.listen.evidence import Evidence, Result, coded
from medmoe_edge.bedside.listen.hl7 import fhir, oru, oru_withdrawn
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.bedside.listen.report_sr import (
    basic_text_sr,
    comprehensive_3d_sr,
    heat_map,
    withdrawal,
)
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.features import Location
from medmoe_edge.contrastive.heatmap import heat_picture
from medmoe_edge.errors import Notice
from medmoe_edge.image.pixels import Image

# pynetdicom leaves a socket to the garbage collector where its peer hung up first.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
KINDS = ["comprehensive-3d-sr", "basic-text-sr"]
RESULT = Result(
    Evidence.of(study(), Image.from_array(SOME), "0" * 64),
    answer_to("Is there é effusion?", "No."),
    "2026-01-02T03:04:05+00:00",
)
EFFUSION = Finding.model_validate(
    {
        "ask": [QUESTION],
        "code": ["60046008", "SCT", "Pleural effusion"],
        "same": [["RID34539", "RADLEX", "pleural effusion"]],
        "site": ["3120008", "SCT", "Pleural structure"],
    }
)
CODED = replace(
    RESULT, coded=coded(EFFUSION, RESULT.answer, Certainty(), agreed=True, is_whole=True)
)


class Middle:
    """Everything is in the middle."""

    def locate(self, image: Image, phrase: str) -> Location:
        assert phrase == "é effusion"  # the words that can be seen
        return located(image, phrase)


def pictured(result: Result) -> Dataset:
    return heat_map(result, Image.from_array(SOME), Middle())


def of_several(result: Result) -> Dataset:
    """A report about three slices of a hundred, all of one series."""
    same = {"StudyInstanceUID": "1.2.826.0.4711.1.1", "SeriesInstanceUID": "1.2.826.0.4711.1.2"}
    others = tuple(
        Evidence.of(study(number, InstanceNumber=number, **same), Image.from_array(SOME), "0" * 64)
        for number in (1, 2, 3)
    )
    return comprehensive_3d_sr(replace(result, evidence=others[1], others=others, of=100))


def in_codes(_: Result) -> Dataset:
    """A report whose answer is coded too."""
    return comprehensive_3d_sr(CODED)


def taken_back(result: Result) -> Dataset:
    """The withdrawal of a report, a text and a picture."""
    made = (comprehensive_3d_sr(result), basic_text_sr(result), pictured(result))
    return withdrawal([dcmread(io.BytesIO(encoded(each))) for each in made])


def test_dcmtk_finds_and_feeds_the_node(tmp_path: Path) -> None:
    echo, store = tool("echoscu"), tool("storescu")
    path = saved(tmp_path, study())
    with Node(configuration(tmp_path / "node", documents=KINDS), StandIn()) as node:
        who = ["-aet", PEER, "-aec", "MEDMOE", "127.0.0.1", str(node.port)]
        call(echo, *who)
        call(store, *who, str(path))
        wait_for(lambda: node.queue.counts()["answered"] == 1)
        stranger = subprocess.run(
            [echo, "-aet", "NOBODY", *who[2:]], capture_output=True, timeout=60, check=False
        )
        assert stranger.returncode != 0


def test_a_report_about_several_slices_names_them_all() -> None:
    report = dcmread(io.BytesIO(encoded(of_several(RESULT))))
    found = [item for _, item in _items(report)]
    images = [item for item in found if item.ValueType == "IMAGE"][3:]  # after the library
    assert [str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for item in images] == [
        study(number).SOPInstanceUID for number in (1, 2, 3)
    ]
    texts = [item.TextValue for item in found if item.ValueType == "TEXT"]
    assert "3 of 100 (number 1, 2, 3)" in texts


@pytest.mark.parametrize(
    "make", [comprehensive_3d_sr, basic_text_sr, of_several, in_codes, taken_back]
)
def test_dcmtk_opens_the_reports(tmp_path: Path, make: Any) -> None:
    dump = tool("dsrdump")
    path = tmp_path / "report.dcm"
    path.write_bytes(encoded(make(RESULT)))
    # All text, and an error for what breaks the rules of the kind of report.
    told = call(dump, "--print-long-values", str(path))
    if make is taken_back:
        assert "Rejected for Patient Safety Reasons" in told
        return
    for words in ("UNVERIFIED", "PRELIMINARY", "No.", NOTICE, "0" * 64):
        assert words in told


@pytest.mark.parametrize(
    "make", [comprehensive_3d_sr, basic_text_sr, pictured, of_several, in_codes, taken_back]
)
def test_the_standards_own_rules_are_kept(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "report.dcm"
    path.write_bytes(encoded(make(RESULT)))
    done = subprocess.run(
        [tool("dciodvfy"), str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Error" not in done.stderr
    assert make in (pictured, taken_back) or "SR" in done.stderr


def test_a_report_refers_to_what_it_is_about() -> None:
    report = dcmread(io.BytesIO(encoded(comprehensive_3d_sr(RESULT))))
    found = [item for _, item in _items(report)]
    texts = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in found}
    assert texts["Finding"].TextValue == "No."
    assert texts["Algorithm Name"].TextValue == "fake"
    number = texts["Model's own probability of its answer"].MeasuredValueSequence[0]
    assert float(number.NumericValue) == pytest.approx(0.934)
    (listed, image) = [item for item in found if item.ValueType == "IMAGE"]
    assert listed.ConceptNameCodeSequence[0].CodeMeaning.startswith("Source")  # the image library
    assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == study().SOPInstanceUID
    assert report.PatientID == "MRN-4711"
    assert report.SOPInstanceUID == RESULT.uid("comprehensive-3d-sr")


def test_every_format_says_whether_the_confidence_is_calibrated() -> None:
    calibrated = replace(RESULT, answer=replace(RESULT.answer, confidence_kind="calibrated"))
    for result, value, meaning in (
        (RESULT, "probability", "Model's own probability of its answer"),
        (calibrated, "chance", "Calibrated chance that the answer is right"),
    ):
        report = dcmread(io.BytesIO(encoded(comprehensive_3d_sr(result))))
        numbers = [item for _, item in _items(report) if item.ValueType == "NUM"]
        names = [item.ConceptNameCodeSequence[0] for item in numbers]
        (name,) = [each for each in names if each.CodingSchemeDesignator == "99MEDMOE"]
        assert (name.CodeValue, name.CodeMeaning) == (value, meaning)
        observation = json.loads(fhir(result, "R5"))["entry"][1]["resource"]
        told = observation["component"][0]
        assert told["code"]["coding"][0]["code"] == value
        assert told["code"]["text"] == meaning
        assert told["valueQuantity"]["value"] == pytest.approx(0.934)
        (segment,) = [row for row in oru(result, "M").decode().split("\r") if "|NM|" in row]
        assert segment.split("|")[3] == f"{value}^{meaning}^99MEDMOE"
    assert calibrated.uid("Observation") != RESULT.uid("Observation")  # it says something else


def test_highdicom_reads_what_was_found_and_where_and_how_certainly(tmp_path: Path) -> None:
    path = tmp_path / "report.dcm"
    path.write_bytes(encoded(in_codes(RESULT)))
    content = srread(path).content
    assert isinstance(content, MeasurementReport)
    (group,) = content.get_image_measurement_groups()
    values = {item.name.meaning: item.value for item in group.get_qualitative_evaluations()}
    assert values["Pleural effusion"] == Code(*evidence.ABSENT)
    assert values["Certainty of Finding"] == Code(*evidence.PROBABLY_ABSENT)
    assert [site.value for site in group.finding_sites] == [Code("3120008", "SCT", "")]
    assert group.finding_type is None  # nobody shall take what is absent for found
    (named,) = [
        item.ConceptNameCodeSequence[0]
        for _, item in _items(dcmread(path))
        if item.ConceptNameCodeSequence[0].CodeValue == "60046008"
    ]
    assert named.EquivalentCodeSequence[0].CodeValue == "RID34539"
    modality = [item for _, item in _items(dcmread(path)) if item.ValueType == "CODE"]
    assert "CR" in {item.ConceptCodeSequence[0].CodeValue for item in modality}


@pytest.mark.parametrize(
    ("text", "confidence", "agreed", "presence", "certainty"),
    [
        ("Yes", 0.95, True, evidence.PRESENT, evidence.PROBABLY_PRESENT),
        (" yes .\n", 0.95, True, evidence.PRESENT, evidence.PROBABLY_PRESENT),
        ("yes, on the left.", 0.95, True, evidence.UNDETERMINED, None),
        ("Yes. No", 0.95, True, evidence.UNDETERMINED, None),
        ("No, but cannot exclude", 0.95, True, evidence.UNDETERMINED, None),
        ("No. Yes", 0.95, True, evidence.UNDETERMINED, None),
        ("No: see above", 0.95, True, evidence.UNDETERMINED, None),
        ("No.", 0.95, True, evidence.ABSENT, evidence.PROBABLY_ABSENT),
        ("No.", 0.7, True, evidence.ABSENT, evidence.POSSIBLE),
        ("No.", 0.4, True, evidence.UNDETERMINED, None),
        ("No.", 0.95, False, evidence.UNDETERMINED, None),  # a slice said otherwise
        ("No change", 0.95, True, evidence.UNDETERMINED, None),
        ("Nothing.", 0.95, True, evidence.UNDETERMINED, None),
        ("left lung", 0.95, True, evidence.UNDETERMINED, None),
        ("", 0.95, True, evidence.UNDETERMINED, None),
    ],
)
def test_only_a_clear_answer_says_that_a_finding_is_there_or_not(
    text: str, confidence: float, agreed: bool, presence: Any, certainty: Any
) -> None:
    answer = replace(answer_to(QUESTION, text), confidence=confidence)
    found = coded(EFFUSION, answer, Certainty(), agreed=agreed, is_whole=True)
    assert (found.presence, found.certainty) == (presence, certainty)
    unsure = replace(answer, unsure=True)
    doubted = coded(EFFUSION, unsure, Certainty(), agreed=agreed, is_whole=True)
    assert doubted.presence == evidence.UNDETERMINED
    cut = coded(
        EFFUSION, replace(answer, complete=False), Certainty(), agreed=agreed, is_whole=True
    )
    assert cut.presence == evidence.UNDETERMINED
    part = coded(EFFUSION, answer, Certainty(), agreed=agreed, is_whole=False)
    assert part.presence == (presence if presence == evidence.PRESENT else evidence.UNDETERMINED)


@pytest.mark.parametrize(("version", "bundle"), [("R4", BundleR4B), ("R5", Bundle)])
def test_fhir_has_the_same_codes(version: Any, bundle: Any) -> None:
    data = fhir(CODED, version)
    assert bundle.model_validate_json(data)
    _, observation, _ = (entry["resource"] for entry in json.loads(data)["entry"])
    assert observation["code"]["text"] == QUESTION
    assert [(each["system"], each["code"]) for each in observation["code"]["coding"]] == [
        ("http://snomed.info/sct", "60046008"),
        ("http://radlex.org", "RID34539"),
    ]
    value = observation["valueCodeableConcept"]
    assert (value["text"], value["coding"][0]["code"]) == ("No.", "272519000")
    assert observation["bodySite"]["coding"][0]["code"] == "3120008"
    (certainty,) = [
        part["valueCodeableConcept"]["coding"][0]["code"]
        for part in observation["component"]
        if part["code"].get("coding") and "valueCodeableConcept" in part
    ]
    assert certainty == "410593006"


def test_hl7_version_2_says_the_same() -> None:
    message = hl7.parse(oru(CODED, "MEDMOE").decode())
    assert str(message.segment("PID")[3]) == "MRN-4711"
    assert (str(message.segment("MSH")[9]), str(message.segment("MSH")[12])) == (
        "ORU^R01^ORU_R01",
        "2.5.1",
    )
    assert str(message.segment("MSH")[7]) == "20260102030405+0000"
    assert str(message.segment("OBR")[7]) == "20240506"
    assert str(message.segment("OBR")[25]) == "R"  # stored, not yet verified
    found = {str(each[3][0][1]): each for each in message.segments("OBX")}
    assert {str(each[11]) for each in message.segments("OBX")} == {"R"}
    assert str(found["Pleural effusion"][5]) == "272519000^Absent^SCT"
    assert str(found["Finding"][5]) == "No."
    assert message.unescape(str(found["Question"][5])) == QUESTION
    odd = replace(RESULT, answer=answer_to("a|b^c&d~e\\f\ng", "x"))
    written = hl7.parse(oru(odd, "MEDMOE").decode())
    (asked,) = [each for each in written.segments("OBX") if str(each[3][0][1]) == "Question"]
    assert written.unescape(str(asked[5])).replace("\r", "\n") == "a|b^c&d~e\\f\ng"
    several = [Notice(code, f"Beware of {code}.") for code in ("frames", "slices")]
    warned = replace(RESULT, answer=replace(RESULT.answer, warnings=tuple(several)))
    other = replace(RESULT, answer=answer_to("Another question?", "No"))  # of the same order
    names = [
        (str(each[3]), str(each[4]))
        for result in (warned, other)
        for each in hl7.parse(oru(result, "MEDMOE").decode()).segments("OBX")
    ]
    assert len(set(names)) == len(names)  # or a receiver takes the later one for a correction
    assert len(str(message.segment("MSH")[10])) == 20  # the longest that 2.5.1 allows
    values = {**RESULT.evidence.values, "PatientName": "=山田^太郎=やまだ^たろう"}
    foreign = replace(RESULT, evidence=replace(RESULT.evidence, values=values))
    named = hl7.parse(oru(foreign, "MEDMOE").decode())
    assert str(named.segment("PID")[5]) == "山田^太郎"
    withdrawn = hl7.parse(oru_withdrawn(oru(CODED, "MEDMOE")).decode())
    assert {str(each[11]) for each in withdrawn.segments("OBX")} == {"W"}
    assert str(withdrawn.segment("MSH")[10]) != str(message.segment("MSH")[10])


def _items(item: Any, depth: int = 0) -> Iterator[tuple[int, Any]]:
    for each in item.get("ContentSequence", []):
        yield depth, each
        yield from _items(each, depth + 1)


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """An Orthanc of the tests' own; its DICOM port and its HTTP port."""
    with orthanc_at(tmp_path_factory.mktemp("orthanc")) as found:
        yield found


def test_orthanc_takes_the_reports_and_gives_them_back(
    tmp_path: Path, orthanc: tuple[int, int]
) -> None:
    dicom, rest = orthanc
    destination = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": dicom}
    config = configuration(tmp_path / "node", documents=KINDS, dicom=[destination])
    with Node(config, StandIn()) as node:
        assert send(node.port, study()) == [0]
        wait_for(lambda: node.queue.counts()["answered"] == 1)
        wait_for(lambda: node.queue.counts()["unsent"] == 0)
        written = {path.read_bytes() for path in node.folder.documents.glob("*/*.dcm")}
    instances = json.loads(get(rest, "/instances"))
    kept = {get(rest, f"/instances/{each}/file") for each in instances}
    tags = [json.loads(get(rest, f"/instances/{each}/simplified-tags")) for each in instances]
    classes = {each["SOPClassUID"] for each in tags}
    assert len(kept) == len(written) == 2
    assert {dcmread(io.BytesIO(data)).to_json() for data in kept} == {
        dcmread(io.BytesIO(data)).to_json() for data in written
    }
    assert classes == {"1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.11"}


def whole_study(slices: int) -> list[Dataset]:
    """A study as a CT sends it: its slices, in no order, two localizers, a report and a PDF."""
    study_uid, series_uid = "1.2.826.0.4711.50", "1.2.826.0.4711.50.1"
    named: dict[str, Any] = {
        "StudyInstanceUID": study_uid,
        "BodyPartExamined": "THORAX",
        "Modality": "CT",
    }
    found = []
    for number in range(1, slices + 1):
        found.append(
            study(
                **named,
                SOPClassUID=CTImageStorage,
                SeriesInstanceUID=series_uid,
                SOPInstanceUID=f"{series_uid}.{number}",
                InstanceNumber=number,
                ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
                ImagePositionPatient=[0, 0, 5 * number],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            )
        )
    for number in (1, 2):
        uid = f"{study_uid}.2.{number}"
        kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        found.append(
            study(
                **named,
                SOPClassUID=CTImageStorage,
                SeriesInstanceUID=f"{study_uid}.2",
                SOPInstanceUID=uid,
                ImageType=kind,
            )
        )
    for number, (sop_class, modality) in enumerate(
        [(BasicTextSRStorage, "SR"), (EncapsulatedPDFStorage, "DOC")], 3
    ):
        document = study(
            **named | {"Modality": modality},
            SOPClassUID=sop_class,
            SeriesInstanceUID=f"{study_uid}.{number}",
            SOPInstanceUID=f"{study_uid}.{number}.1",
        )
        del document.PixelData
        found.append(document)
    return found[::2] + found[1::2]


def test_orthanc_forwards_a_whole_study(tmp_path: Path, orthanc: tuple[int, int]) -> None:
    """With its default settings, which give a study up at the first object that is refused."""
    dicom, rest = orthanc
    forwards_a_whole_study(tmp_path, dicom, rest, StandIn(), slices=30)


def forwards_a_whole_study(
    folder: Path, dicom: int, rest: int, engine: Any, slices: int
) -> dict[str, float]:
    """Twice, then with the middle slice corrected; gives seconds and memory."""
    sent = whole_study(slices)
    destination = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": dicom}
    config = configuration(
        folder / "node",
        peers=[{"ae_title": "ORTHANC"}],
        questions=[{"modalities": ["CT"], "body_parts": ["CHEST"], "ask": [QUESTION]}],
        series={"quiet": 2},
        dicom=[destination],
    )
    with Node(config, engine) as node:
        place = json.dumps(["MEDMOE", "127.0.0.1", node.port]).encode()
        put_to(rest, "/modalities/node", place)
        for dataset in sent:
            post_to(rest, "/instances", (saved(folder, dataset)).read_bytes())
        (identifier,) = [
            each
            for each in json.loads(get(rest, "/studies"))
            if "1.2.826.0.4711.50" in get(rest, f"/studies/{each}").decode()
        ]
        before, start = _memory(), time.monotonic()
        told = json.loads(post_to(rest, "/modalities/node/store", identifier.encode()))
        assert (told["FailedInstancesCount"], told["InstancesCount"]) == (0, len(sent))
        wait_for(lambda: node.queue.counts()["answered"] == 1, 60)
        figures = {"seconds": time.monotonic() - start, "mb": (_memory() - before) / 1e6}
        wait_for(lambda: node.queue.counts()["unsent"] == 0, 60)
        assert node.queue.asides() == {"localizer": 2, "no_pixels": 2}

        (path,) = node.folder.documents.glob("*/*.dcm")
        report = dcmread(path)
        middle = f"1.2.826.0.4711.50.1.{(slices + 1) // 2}"
        (_, image) = [item for _, item in _items(report) if item.ValueType == "IMAGE"]
        assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == middle
        texts = [item.TextValue for _, item in _items(report) if item.ValueType == "TEXT"]
        assert f"1 of {slices} (number {(slices + 1) // 2})" in texts

        # Again: now with our report in the study, which is not answered either.
        told = json.loads(post_to(rest, "/modalities/node/store", identifier.encode()))
        assert (told["FailedInstancesCount"], told["InstancesCount"]) == (0, len(sent) + 1)
        assert node.queue.counts() == {"waiting": 0, "answered": 1, "failed": 0, "unsent": 0}
        assert node.queue.asides()["own_result"] == 1

        corrected = next(each for each in sent if each.SOPInstanceUID == middle)
        corrected.PixelData = SOME[::-1].tobytes()
        assert send(node.port, corrected, title="ORTHANC") == [0]
        wait_for(lambda: node.queue.counts()["answered"] == 2, 60)
        old, new = sorted(
            map(dcmread, node.folder.documents.glob("*/*.dcm")),
            key=lambda each: "PredecessorDocumentsSequence" in each,
        )
        series = new.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
        assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID
        assert [int(each.InstanceNumber) for each in (old, new)] == [1, 2]
    return figures


def _memory() -> float:
    """Bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


class FhirServer(http.server.BaseHTTPRequestHandler):
    """Refuses the first time, then takes what it is sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen = self.server.seen  # type: ignore[attr-defined]
        seen.append((self.headers["Authorization"], self.headers["Content-Type"], body))
        self.send_response(503 if len(seen) == 1 else 200)
        self.end_headers()

    def log_message(self, format: str, *_: object) -> None:
        """Not to stderr."""


def test_fhir_is_posted_until_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FhirServer)
    seen: list[tuple[str, str, bytes]] = []
    server.seen = seen  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/fhir"
    target = {"url": url, "version": "R4", "token_file": str(tmp_path / "token")}
    try:
        with Node(
            configuration(tmp_path / "node", fhir=[target]), StandIn(), first_delay=0.05
        ) as node:
            assert send(node.port, study()) == [0]
            wait_for(lambda: node.queue.counts()["answered"] == 1)
            wait_for(lambda: node.queue.counts()["unsent"] == 0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0][:2] == ("Bearer secret", "application/fhir+json")
    assert json.loads(seen[0][2])["type"] == "transaction"


@pytest.mark.parametrize(("version", "bundle"), [("R4", BundleR4B), ("R5", Bundle)])
def test_fhir_says_what_the_report_says(version: Any, bundle: Any) -> None:
    data = fhir(RESULT, version)
    assert bundle.model_validate_json(data)
    device, observation, report = (entry["resource"] for entry in json.loads(data)["entry"])
    assert (observation["status"], report["status"]) == ("preliminary", "preliminary")
    assert observation["valueString"] == "No."
    assert observation["code"]["text"] == RESULT.answer.question
    assert observation["subject"]["identifier"]["value"] == "MRN-4711"
    assert "Doe" not in data.decode()
    assert {"type": {"text": "SHA-256 of the model"}, "value": "0" * 64} in device["version"]
    study_key = "imagingStudy" if version == "R4" else "study"
    uid = report[study_key][0]["identifier"]["value"]
    assert uid == f"urn:oid:{study().StudyInstanceUID}"
    urls = {entry["fullUrl"] for entry in json.loads(data)["entry"]}
    assert {observation["device"]["reference"], report["result"][0]["reference"]} < urls
    assert NOTICE in report["conclusion"]


def test_the_pixels_of_a_map_say_what_it_is() -> None:
    """Other than the picture with its heat alone: phrase, scale and notices stand below it."""
    shown, image = pictured(RESULT).pixel_array, Image.from_array(SOME)
    whole = np.asarray(heat_picture(image.pixels, located(image, "é effusion")))
    assert np.array_equal(shown, whole)
    assert shown.shape[0] > shown.shape[1]  # of a square picture: there is a legend
