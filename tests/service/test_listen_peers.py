"""Real peers: DCMTK sends and reads, Orthanc takes reports and gives them back; FHIR over HTTP."""

import http.server
import io
import json
import resource
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import answer_to
from dicom_files import saved
from fhir.resources.bundle import Bundle
from fhir.resources.R4B.bundle import Bundle as BundleR4B
from listen_process import (
    PEER,
    QUESTION,
    SOME,
    StandIn,
    configuration,
    free_port,
    located,
    send,
    study,
    wait_for,
)
from pydicom import Dataset, dcmread
from pydicom.uid import BasicTextSRStorage, CTImageStorage, EncapsulatedPDFStorage

from medmoe_edge.bedside.listen.answering import encoded
from medmoe_edge.bedside.listen.evidence import Evidence, Result
from medmoe_edge.bedside.listen.fhir import fhir
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
from medmoe_edge.image.pixels import Image

# pynetdicom leaves a socket to the garbage collector where its peer hung up first.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
KINDS = ["comprehensive-3d-sr", "basic-text-sr"]
RESULT = Result(
    Evidence.of(study(), Image.from_array(SOME), "0" * 64),
    answer_to("Is there é effusion?", "No, there is none."),
    "2026-01-02T03:04:05+00:00",
)


class Middle:
    """Everything is in the middle."""

    def locate(self, image: Image, phrase: str) -> Location:
        assert phrase == "é effusion none"  # the words that can be seen
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


def taken_back(result: Result) -> Dataset:
    """The withdrawal of a report, a text and a picture."""
    made = (comprehensive_3d_sr(result), basic_text_sr(result), pictured(result))
    return withdrawal([dcmread(io.BytesIO(encoded(each))) for each in made])


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (Debian: dcmtk, dicom3tools or orthanc)")
    return path


def call(*command: str) -> str:
    """What a command says on stdout; it must end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    images = [item for item in found if item.ValueType == "IMAGE"]
    assert [str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for item in images] == [
        study(number).SOPInstanceUID for number in (1, 2, 3)
    ]
    texts = [item.TextValue for item in found if item.ValueType == "TEXT"]
    assert "3 of 100 (number 1, 2, 3)" in texts


@pytest.mark.parametrize("make", [comprehensive_3d_sr, basic_text_sr, of_several, taken_back])
def test_dcmtk_opens_the_reports(tmp_path: Path, make: Any) -> None:
    dump = tool("dsrdump")
    path = tmp_path / "report.dcm"
    path.write_bytes(encoded(make(RESULT)))
    # All text, and an error for what breaks the rules of the kind of report.
    told = call(dump, "--print-long-values", str(path))
    if make is taken_back:
        assert "Rejected for Patient Safety Reasons" in told
        return
    for words in ("UNVERIFIED", "PRELIMINARY", "No, there is none.", NOTICE, "0" * 64):
        assert words in told


@pytest.mark.parametrize(
    "make", [comprehensive_3d_sr, basic_text_sr, pictured, of_several, taken_back]
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
    assert texts["Finding"].TextValue == "No, there is none."
    assert texts["Algorithm Name"].TextValue == "fake"
    number = texts["Model's own probability of its answer"].MeasuredValueSequence[0]
    assert float(number.NumericValue) == pytest.approx(0.934)
    (image,) = [item for item in found if item.ValueType == "IMAGE"]
    assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == study().SOPInstanceUID
    assert report.PatientID == "MRN-4711"
    assert report.SOPInstanceUID == RESULT.uid("comprehensive-3d-sr")


def _items(item: Any, depth: int = 0) -> Iterator[tuple[int, Any]]:
    for each in item.get("ContentSequence", []):
        yield depth, each
        yield from _items(each, depth + 1)


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """An Orthanc of the tests' own; its DICOM port and its HTTP port."""
    binary = tool("Orthanc")
    folder = tmp_path_factory.mktemp("orthanc")
    dicom, rest = free_port(), free_port()
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "DicomPort": dicom,
        "HttpPort": rest,
        "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowStore": True,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not _answers(rest):
            assert time.monotonic() < end, "Orthanc does not start"
            assert process.poll() is None, "Orthanc has ended"
            time.sleep(0.1)
        yield dicom, rest
    finally:
        process.terminate()
        process.wait(30)


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return bytes(answer.read())


def _post(port: int, path: str, data: bytes, method: str = "POST") -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def _put(port: int, path: str, data: bytes) -> None:
    _post(port, path, data, "PUT")


def _answers(port: int) -> bool:
    try:
        return bool(_get(port, "/system"))
    except OSError:
        return False


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
    instances = json.loads(_get(rest, "/instances"))
    kept = {_get(rest, f"/instances/{each}/file") for each in instances}
    tags = [json.loads(_get(rest, f"/instances/{each}/simplified-tags")) for each in instances]
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
        _put(rest, "/modalities/node", place)
        for dataset in sent:
            _post(rest, "/instances", (saved(folder, dataset)).read_bytes())
        (identifier,) = [
            each
            for each in json.loads(_get(rest, "/studies"))
            if "1.2.826.0.4711.50" in _get(rest, f"/studies/{each}").decode()
        ]
        before, start = _memory(), time.monotonic()
        told = json.loads(_post(rest, "/modalities/node/store", identifier.encode()))
        assert (told["FailedInstancesCount"], told["InstancesCount"]) == (0, len(sent))
        wait_for(lambda: node.queue.counts()["answered"] == 1, 60)
        figures = {"seconds": time.monotonic() - start, "mb": (_memory() - before) / 1e6}
        wait_for(lambda: node.queue.counts()["unsent"] == 0, 60)
        assert node.queue.asides() == {"localizer": 2, "no_pixels": 2}

        (path,) = node.folder.documents.glob("*/*.dcm")
        report = dcmread(path)
        middle = f"1.2.826.0.4711.50.1.{(slices + 1) // 2}"
        (image,) = [item for _, item in _items(report) if item.ValueType == "IMAGE"]
        assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == middle
        texts = [item.TextValue for _, item in _items(report) if item.ValueType == "TEXT"]
        assert f"1 of {slices} (number {(slices + 1) // 2})" in texts

        # Again: now with our report in the study, which is not answered either.
        told = json.loads(_post(rest, "/modalities/node/store", identifier.encode()))
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


def test_fhir_is_posted_until_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmoe_edge.bedside.listen.queue.FIRST_DELAY", 0.05)
    (tmp_path / "token").write_text("secret\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FhirServer)
    seen: list[tuple[str, str, bytes]] = []
    server.seen = seen  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/fhir"
    target = {"url": url, "version": "R4", "token_file": str(tmp_path / "token")}
    try:
        with Node(configuration(tmp_path / "node", fhir=[target]), StandIn()) as node:
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
    assert observation["valueString"] == "No, there is none."
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
    whole = np.asarray(heat_picture(image.pixels, located(image, "é effusion none")))
    assert np.array_equal(shown, whole)
    assert shown.shape[0] > shown.shape[1]  # of a square picture: there is a legend
