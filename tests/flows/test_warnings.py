"""What an answer warns of, wherever it appears; and the picture that the model saw.

The first user is an image unlike its label: a chest X-ray whose DICOM file says ultrasound.
"""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ROOT, Run, two_lines
from dicom_files import made, saved
from listen_process import configuration, send, wait_for
from PIL import Image as Pillow
from pyarrow import parquet
from pydicom import Dataset, dcmread
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)
from serving import app_over, client_of

import medmoe_edge
from medmoe_edge.bedside.batch.run import run_batch
from medmoe_edge.bedside.listen.config import Certainty, Finding
from medmoe_edge.bedside.listen.evidence import PRESENT, UNDETERMINED, coded
from medmoe_edge.bedside.listen.node import Node
from medmoe_edge.contrastive.engine import load_modality
from medmoe_edge.engine.engine import Engine
from medmoe_edge.errors import Notice
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.image.pixels import Image, labels_of, modality_of, unlike_label

CHEST = np.asarray(Pillow.open(ROOT / "scan.png").convert("L"))
QUESTION = "Is there effusion?"
CODE = "unlike_label"


def film(number: int = 1, **attributes: Any) -> Dataset:
    """The chest X-ray as a DICOM file."""
    uids = {
        "SOPInstanceUID": f"1.2.826.0.4711.{number}.3",
        "SeriesInstanceUID": f"1.2.826.0.4711.{number}.2",
        "StudyInstanceUID": f"1.2.826.0.4711.{number}.1",
    }
    given = {"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "US"}
    return made(CHEST, **(uids | given | attributes))


@pytest.fixture(scope="module")
def nano() -> Engine:
    return medmoe_edge.load("nano")


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    return saved(tmp_path, film(), "odd.dcm")


@pytest.mark.parametrize(
    "question", ["What is the name of the patient?", "How old is the patient?"]
)
def test_what_no_picture_answers(nano: Engine, question: str) -> None:
    answer = nano.ask(ROOT / "scan.png", question)
    assert [reason.code for reason in answer.reasons] == ["not_answerable"]


def test_python(nano: Engine, odd: Path) -> None:
    (warning,) = nano.ask(odd, QUESTION).warnings
    assert warning.code == CODE
    assert "ultrasound" in warning.message
    assert "X-ray" in warning.message
    assert nano.ask(odd, QUESTION).to_json()["warnings"] == [
        {"code": CODE, "message": warning.message}
    ]
    denied = nano.ask(odd, QUESTION)
    assert (denied.unsure, denied.reasons) == (True, (warning,))
    assert denied.logged == f"{denied.shown} [{CODE}]"
    sure = replace(denied, text="Yes", confidence=0.99)
    finding = Finding.model_validate({"ask": [QUESTION], "code": ["1", "SCT", "Finding"]})
    coding = {"agreed": True, "is_whole": True}
    assert coded(finding, sure, Certainty(), **coding).presence == UNDETERMINED
    assert coded(finding, replace(sure, unsure=False), Certainty(), **coding).presence == PRESENT
    plain = nano.ask(ROOT / "scan.png", QUESTION)
    assert (plain.warnings, plain.unsure) == ((), False)
    # The same picture is known by now; its label is not the file's before.
    same = saved(odd.parent, film(Modality="CR", SOPClassUID=ComputedRadiographyImageStorage))
    assert nano.ask(same, QUESTION).warnings == ()


def test_a_kept_prefix_does_not_keep_the_label(odd: Path, tmp_path: Path) -> None:
    engine = medmoe_edge.load("nano", prefix_cache=tmp_path / "kept")
    plain = saved(tmp_path, film(Modality="CR"), "plain.dcm")
    answers = [engine.ask(path, "What?") for path in (odd, plain, odd)]
    told = [CODE in {each.code for each in answer.warnings} for answer in answers]
    assert told == [True, False, True]


def test_command_line(run: Run, odd: Path) -> None:
    told = run("ask", "odd.dcm", QUESTION)
    assert "Warning: The file says that it is ultrasound" in told.stdout
    told = run("ask", "odd.dcm", QUESTION, "--json")
    (answer,) = json.loads(told.stdout)["answers"]
    assert [each["code"] for each in answer["warnings"]] == [CODE]
    told = run("classify", "odd.dcm", "--labels", "effusion,normal", "--json")
    assert [each["code"] for each in json.loads(told.stdout)["warnings"]] == [CODE]
    told = run("locate", "odd.dcm", "heart", "-o", "heart.png")
    assert "Warning: The file says" in told.stdout


def test_service(nano: Engine, odd: Path) -> None:
    engine: Any = nano
    data = odd.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    chat = {"model": "nano", "messages": [{"role": "user", "content": content}]}
    with client_of(app_over(engine)) as client:
        files, form = {"image": data}, {"question": QUESTION}
        told = client.post("/v1/ask", files=files, data=form).json()["answers"][0]
        events = client.post("/v1/ask", files=files, data=form | {"stream": "true"}).text
        whole = client.post("/v1/chat/completions", json=chat).json()["medmoe"]
        chunks = client.post("/v1/chat/completions", json=chat | {"stream": True}).text
        seen = client.post("/v1/seen", files=files)
    assert [each["code"] for each in told["warnings"]] == [CODE]
    assert whole["warnings"] == told["warnings"]
    assert json.dumps(told["warnings"][0]) in events
    assert json.dumps(told["warnings"][0]) in chunks
    assert seen.headers["content-type"] == "image/png"
    picture = np.asarray(Pillow.open(io.BytesIO(seen.content)))
    assert (picture == nano.seen(odd)).all()


def test_batch(odd: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "scans"
    inputs.mkdir()
    odd.rename(inputs / "a.dcm")
    (inputs / "b.png").write_bytes((ROOT / "scan.png").read_bytes())
    (inputs / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "questions.txt").write_text(QUESTION)
    report = run_batch(inputs, tmp_path / "out.parquet", tmp_path / "questions.txt")
    assert (report.rows, report.warned, report.errors) == (3, 1, 1)
    warnings = parquet.read_table(tmp_path / "out.parquet")["warnings"].to_pylist()
    assert [each["code"] for each in warnings[0]] == [CODE]
    assert warnings[1:] == [[], None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_reports(nano: Engine, tmp_path: Path) -> None:
    kinds = ["comprehensive-3d-sr", "basic-text-sr", "fhir-r4", "fhir-r5", "picture"]
    with Node(configuration(tmp_path / "node", documents=kinds), nano) as node:
        assert send(node.port, film()) == [0]
        wait_for(lambda: node.queue.counts()["answered"] == 1)
    paths = {path.name.split(".")[1]: path for path in node.folder.documents.glob("*/*")}
    assert set(paths) == set(kinds)
    for kind in kinds[:2]:
        assert f"({CODE})".encode() in paths[kind].read_bytes()
    for kind in kinds[2:4]:
        _, observation, report = (
            entry["resource"] for entry in json.loads(paths[kind].read_text())["entry"]
        )
        told = [each.get("valueCodeableConcept") for each in observation["component"]]
        (coded,) = [each for each in told if each and each["coding"][0]["code"] == CODE]
        assert coded["text"] in report["conclusion"]
        assert any(coded["text"] in note["text"] for note in observation["note"])
    assert (dcmread(paths["picture"]).pixel_array == nano.seen(Image.from_array(CHEST))).all()


# --- what a file states ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "labels", "codes"),
    [
        ({"Modality": "US", "SOPClassUID": UltrasoundImageStorage}, ("ultrasound",), []),
        ({"Modality": "", "SOPClassUID": UltrasoundImageStorage}, ("ultrasound",), []),
        ({"Modality": "OT", "SOPClassUID": CTImageStorage}, ("ct",), []),
        ({"Modality": "US\\IVUS"}, ("ultrasound",), []),
        ({"Modality": "us "}, ("ultrasound",), []),
        ({"Modality": "PX"}, ("xray",), []),
        ({"Modality": "OPT"}, ("fundus",), []),
        ({"Modality": "OT"}, (), []),
        ({"Modality": "NM"}, (), ["unknown_modality"]),
        ({"Modality": "PT"}, (), ["unknown_modality"]),
        (
            {"Modality": "MR", "SOPClassUID": UltrasoundImageStorage},
            ("mri", "ultrasound"),
            ["contradictory_label"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_says_by_attribute_and_by_class_what_it_shows(
    tmp_path: Path, values: dict[str, Any], labels: tuple[str, ...], codes: list[str]
) -> None:
    image = load_image(saved(tmp_path, film(**values)))
    assert image.labels == labels
    assert [notice.code for notice in image.notices] == codes


def test_an_image_is_unlike_its_label_if_it_is_read_as_none_it_states() -> None:
    assert unlike_label((), "ct") == ()
    assert unlike_label(("ct",), None) == ()
    assert unlike_label(("mri", "ct"), "ct") == ()
    (notice,) = unlike_label(("ultrasound",), "pathology")
    assert isinstance(notice, Notice)
    assert notice.code == CODE


# --- the picture that the model saw -------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A picture of another shape than the model's, so that it is padded."""
    values = np.arange(300 * 200, dtype=np.uint32).reshape(200, 300) % 251
    path = tmp_path / "wide.png"
    Pillow.fromarray(values.astype(np.uint8)).save(path)
    return path


def test_show_writes_exactly_what_enters_the_tower(run: Run, wide: Path, nano: Engine) -> None:
    done = run("ask", "wide.png", QUESTION, "--show", "seen.png", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["picture"] == "seen.png"
    with Pillow.open(wide.with_name("seen.png")) as picture:
        assert picture.info == {}  # nothing but the picture
        seen = np.asarray(picture)
    vision = nano.config.vision
    assert seen.shape == (vision.image_size, vision.image_size, 3)
    mean, std = (np.asarray(each, np.float32) for each in (vision.pixel_mean, vision.pixel_std))
    entered = preprocess(load_image(wide), vision)
    assert (((seen.astype(np.float32) - mean) / std).transpose(2, 0, 1)[None] == entered).all()


def test_show_says_where_the_picture_is(run: Run, wide: Path) -> None:
    done = run("ask", wide.name, QUESTION, "--show", "seen.PNG")
    assert "Wrote what the model saw seen.PNG" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--show", "seen.jpg"], "not named as a PNG"),
        (["--show", "there.png"], "exists already"),
        (["--show", "wide.png", "--force"], "own input"),
        (["--show", "gone/seen.png"], "not a folder"),
        (["--show", "folder.png", "--force"], "is a folder"),
        (["--show", "a.png", "--explain", "a.png"], "name one file"),
    ],
)
def test_show_refuses_before_anything_is_asked(
    run: Run, wide: Path, arguments: list[str], what: str
) -> None:
    wide.with_name("there.png").write_bytes(b"mine")
    wide.with_name("folder.png").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in wide.parent.iterdir()}
    done = run("ask", "wide.png", QUESTION, *arguments)
    assert done.exit_code == 2
    assert what in two_lines(done)[0]
    assert before == {path: path.is_file() and path.read_bytes() for path in wide.parent.iterdir()}


def test_show_leaves_nothing_where_nothing_is_answered(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run("ask", "bad.png", QUESTION, "--show", "seen.png").exit_code == 2
    assert run("ask", "gone.png", QUESTION, "--show", "seen.png").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad.png"]


def test_show_names_what_it_cannot_write(run: Run, wide: Path) -> None:
    name = "s" * 246 + ".png"  # too long for what is written beside it first
    done = run("ask", wide.name, QUESTION, "--show", name)
    assert done.exit_code == 5
    assert f"{name} cannot be written (File name too long)." in two_lines(done)[0]


def test_show_replaces_with_force(run: Run, wide: Path) -> None:
    target = wide.with_name("seen.png")
    target.write_bytes(b"old")
    assert run("ask", "wide.png", QUESTION, "--show", "seen.png", "--force").exit_code == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_one_mapping_serves_all() -> None:
    for code in ("CR", "DX", "MG", "RG", "XA", "RF", "IO", "PX"):
        header: Any = _Header(code)
        assert modality_of(header) == "xray"
        assert labels_of(header) == ("xray",)


class _Header:
    def __init__(self, modality: str) -> None:
        self.modality = modality

    def text(self, keyword: str) -> str:
        return self.modality if keyword == "Modality" else ""


def test_contrastive_results_warn_too(odd: Path) -> None:
    engine = load_modality("modality-nano")
    results = (engine.read(odd), engine.classify(odd, ["a", "b"]), engine.locate(odd, "heart"))
    for result in results:
        assert CODE in [warning["code"] for warning in result.to_json()["warnings"]]
