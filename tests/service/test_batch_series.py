"""A batch by series: one row for each and question, about the slices that the node would ask."""

import csv
import hashlib
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bombs import deflated_dicom
from command_line import Run, answer_to
from PIL import Image as Pillow
from pydicom import Dataset, dcmwrite
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ImplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
)
from test_batch import StandIn
from test_listen_odd import issued_by
from test_listen_series import slice_of

from medmoe_edge.bedside.audit.log import AuditLog
from medmoe_edge.bedside.batch import run as batch_asking
from medmoe_edge.bedside.batch.inputs import header_of
from medmoe_edge.bedside.batch.run import BatchReport, run_batch
from medmoe_edge.bedside.listen.config import Series
from medmoe_edge.engine.answer import Answer
from medmoe_edge.errors import InputError, MedMoEError, ModelError, ResourceError
from medmoe_edge.image.loading import load_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUESTION = "Is there effusion?"


class Reading(StandIn):
    """Answers with the brightness of the picture's corner; the brighter the surer."""

    def ask_all(self, path: str, questions: Sequence[str], *, max_new_tokens: int) -> list[Answer]:
        if len(self.asked) == self.dies:
            self.how()
        value = int(load_image(path).pixels[0, 0, 0])
        self.asked.append(Path(path).name)
        model = {"name": self.name, "sha256": self.sha256}
        sure = 0.5 + value / 1000
        return [answer_to(each, str(value), confidence=sure, model=model) for each in questions]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Reading:
    engine = Reading()
    monkeypatch.setattr(batch_asking, "load", lambda *_, **__: engine)
    return engine


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Seven slices in no order, two localizers, a report, and a picture that is no DICOM."""
    folder = tmp_path / "archive"
    folder.mkdir()
    for place, number in enumerate((4, 1, 7, 2, 6, 3, 5)):
        save(folder / f"{place}.dcm", slice_of(number))
    for number in (8, 9):
        kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        save(folder / f"{number}.dcm", slice_of(number, ImageType=kind))
    report = slice_of(10, Modality="SR")
    del report.PixelData
    save(folder / "report.dcm", report)
    Pillow.new("L", (8, 8), 90).save(folder / "x.png")
    (tmp_path / "questions.txt").write_text(QUESTION)
    return folder


def save(path: Path, dataset: Dataset) -> None:
    dcmwrite(path, dataset, enforce_file_format=True)


def asked(folder: Path, series: Series, **options: Any) -> tuple[BatchReport, list[dict[str, str]]]:
    """The report and the rows of a batch by series."""
    output = folder.parent / "out.csv"
    questions = folder.parent / "questions.txt"
    report = run_batch(folder, output, questions, series=series, force=True, **options)
    with output.open(encoding="utf-8-sig", newline="") as file:
        return report, list(csv.DictReader(file))


def test_a_series_is_asked_about_its_middle(engine: Reading, archive: Path) -> None:
    report, rows = asked(archive, Series())
    assert [row["image"] for row in rows] == ["0.dcm", "x.png"]
    assert (rows[0]["slices"], rows[0]["slices_of"]) == ('["0.dcm"]', "7")
    assert "Of the 7 slices" in rows[0]["warnings"]
    assert (rows[1]["slices"], rows[1]["slices_of"], rows[1]["warnings"]) == ("", "", "")
    assert engine.asked == ["0.dcm", "x.png"]
    assert (report.images, report.series, report.rows) == (11, 2, 2)
    assert report.left_out == {"localizer": 2, "no_pixels": 1}


def test_a_series_is_one_where_some_of_it_lacks_the_issuer(
    engine: Reading, archive: Path, tmp_path: Path
) -> None:
    for place, issuer in enumerate(("A", "", "A", "", "", "B", "B")):
        save(archive / f"{place}.dcm", slice_of(place, IssuerOfPatientID=issuer))
    _, rows = asked(archive, Series())
    found = {row["image"]: row["slices_of"] for row in rows if row["slices_of"]}
    assert sorted(found.values()) == ["2", "2", "3"]  # without one it may be of A or of B
    for place in (5, 6):
        (archive / f"{place}.dcm").unlink()
    _, rows = asked(archive, Series())
    assert [row["slices_of"] for row in rows] == ["5", ""]


def test_a_series_of_several_patients_is_told_apart_or_told_of(
    engine: Reading, archive: Path
) -> None:
    save(archive / "4.dcm", slice_of(6, PatientName="Roe^Richard"))
    _, rows = asked(archive, Series())
    assert "differ in PatientName: look whose images they are" in rows[0]["warnings"]
    save(archive / "4.dcm", issued_by("1.2.3", slice_of(6)))
    save(archive / "5.dcm", issued_by("1.2.4", slice_of(3)))
    _, rows = asked(archive, Series())
    assert sorted(row["slices_of"] for row in rows) == ["", "1", "1", "5"]


def test_slices_vote(engine: Reading, archive: Path) -> None:
    for place, value in enumerate((50, 50, 10, 10, 50, 200, 50)):
        save(archive / f"{place}.dcm", slice_of(place, value=value))
    _, rows = asked(archive, Series(slices="all"))
    said = [int(load_image(archive / f"{place}.dcm").pixels[0, 0, 0]) for place in range(7)]
    most = max(set(said), key=said.count)
    assert rows[0]["answer"] == str(most)
    assert json.loads(rows[0]["slices"]) == [f"{place}.dcm" for place in range(7)]
    assert said[int(rows[0]["image"][0])] == most
    assert "4 of 7 pictures gave this answer" in rows[0]["warnings"]
    single = answer_to(QUESTION).timings.total
    assert float(rows[0]["seconds"]) == pytest.approx(7 * single)


def test_some_slices_or_those_that_were_marked(engine: Reading, archive: Path) -> None:
    _, rows = asked(archive, Series(slices="every", every=3))
    assert json.loads(rows[0]["slices"]) == ["3.dcm", "6.dcm"]  # slices 2 and 5
    key = slice_of(11, Modality="KO", SOPClassUID=KeyObjectSelectionDocumentStorage)
    del key.PixelData
    reference, item = Dataset(), Dataset()
    reference.ReferencedSOPInstanceUID = slice_of(6).SOPInstanceUID
    item.ReferencedSOPSequence = [reference]
    key.ContentSequence = [item]
    save(archive / "key.dcm", key)
    _, rows = asked(archive, Series(slices="key"))
    assert json.loads(rows[0]["slices"]) == ["4.dcm"]


def test_patients_and_series_are_not_mixed(engine: Reading, archive: Path) -> None:
    for number in range(3):
        save(archive / f"other{number}.dcm", slice_of(number, series=2))
        same = slice_of(number + 20, PatientID="another")  # the same UID of the series
        save(archive / f"patient{number}.dcm", same)
    save(archive / "copy.dcm", slice_of(1))
    report, rows = asked(archive, Series(slices="all"))
    members = [json.loads(row["slices"] or "[]") for row in rows]
    assert sorted(map(len, members)) == [0, 3, 3, 7]
    assert {"other0.dcm", "other1.dcm", "other2.dcm"} in map(set, members)
    assert {"patient0.dcm", "patient1.dcm", "patient2.dcm"} in map(set, members)
    assert report.left_out["twice"] == 1


def test_two_patients_with_the_same_uid_are_both_asked(engine: Reading, archive: Path) -> None:
    other = slice_of(1, PatientID="another", StudyInstanceUID="1.2.826.0.4711.9.1")
    save(archive / "other.dcm", other)
    report, rows = asked(archive, Series(slices="all"))
    assert "other.dcm" in {row["image"] for row in rows}
    assert "twice" not in report.left_out


def test_only_the_same_content_is_there_twice(engine: Reading, archive: Path) -> None:
    implicit = slice_of(1)
    implicit.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    save(archive / "implicit.dcm", implicit)
    save(archive / "other.dcm", slice_of(1, value=77))  # under the same UID
    save(archive / "third.dcm", slice_of(1, value=77))
    report, rows = asked(archive, Series(slices="all"))
    assert rows[0]["slices_of"] == "8"
    assert "other.dcm" in json.loads(rows[0]["slices"])
    assert report.left_out["twice"] == 2


def test_a_file_without_its_preamble_is_of_its_series(engine: Reading, archive: Path) -> None:
    whole = (archive / "2.dcm").read_bytes()
    (archive / "2.dcm").write_bytes(whole[132:])
    report, rows = asked(archive, Series(slices="all"))
    assert rows[0]["slices_of"] == "7"
    assert report.series == 2


def test_a_bomb_is_not_inflated_to_see_where_it_belongs(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.dcm"
    bomb.write_bytes(deflated_dicom(64, 64, 1, tail=2**28))
    tracemalloc.start()
    try:
        assert header_of(str(bomb)) == {}
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("issuers", [("", ""), ("A", ""), ("", "A")])
def test_what_is_for_processing_is_left_out_where_it_is_shown(
    engine: Reading, tmp_path: Path, issuers: tuple[str, str]
) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    (tmp_path / "questions.txt").write_text(QUESTION)
    kinds = {
        "presentation": DigitalXRayImageStorageForPresentation,
        "processing": DigitalXRayImageStorageForProcessing,
    }
    for number, (intent, kind) in enumerate(kinds.items()):
        values: dict[str, Any] = {"Modality": "DX", "SOPClassUID": kind, "ViewPosition": "PA"}
        values["PresentationIntentType"] = f"FOR {intent.upper()}"
        values["IssuerOfPatientID"] = issuers[number]
        values["SeriesInstanceUID"] = f"1.2.826.0.4711.9.{number}"
        save(folder / f"{intent}.dcm", slice_of(number + 1, **values))
        values["ViewPosition"] = "LL"
        if intent == "processing":  # of another view, which nothing shows
            values["SeriesInstanceUID"] = "1.2.826.0.4711.9.7"
            save(folder / "alone.dcm", slice_of(7, **values))
    report, rows = asked(folder, Series())
    assert sorted(row["image"] for row in rows) == ["alone.dcm", "presentation.dcm"]
    assert report.left_out == {"for_processing": 1}


def test_a_slice_that_cannot_be_read_is_told_of(engine: Reading, archive: Path) -> None:
    whole = (archive / "2.dcm").read_bytes()
    (archive / "2.dcm").write_bytes(whole[:-10])
    _, rows = asked(archive, Series(slices="all"))
    assert rows[0]["answer"]
    assert "could not be read" in rows[0]["warnings"]
    assert "2.dcm" not in engine.asked
    for place in range(7):
        path = archive / f"{place}.dcm"
        path.write_bytes(path.read_bytes()[:-10])
    report, rows = asked(archive, Series(slices="all"))
    assert (rows[0]["answer"], report.errors) == ("", 1)
    assert rows[0]["error"]


@pytest.mark.parametrize("kind", [ModelError, ResourceError])
def test_what_is_wrong_with_the_model_is_not_blamed_on_a_slice(
    engine: Reading, archive: Path, monkeypatch: pytest.MonkeyPatch, kind: type[MedMoEError]
) -> None:
    ask = engine.ask_all

    def fails(path: str, questions: Sequence[str], *, max_new_tokens: int) -> list[Answer]:
        if path.endswith("2.dcm"):
            raise kind("An expert is damaged.", "Copy the model again.")
        return ask(path, questions, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(engine, "ask_all", fails)
    report, rows = asked(archive, Series(slices="all"))
    assert (rows[0]["answer"], report.errors) == ("", 1)
    assert rows[0]["error"] == "An expert is damaged. Copy the model again."


def test_interrupted_it_goes_on(engine: Reading, archive: Path, tmp_path: Path) -> None:
    engine.dies = 7
    with pytest.raises(KeyboardInterrupt):
        asked(archive, Series(slices="all"))
    engine.dies = None
    with pytest.raises(InputError, match="other images, questions or options"):
        run_batch(archive, tmp_path / "out.csv", tmp_path / "questions.txt", series=Series())
    report, rows = asked(archive, Series(slices="all"))
    assert (report.resumed, len(rows)) == (1, 2)
    assert engine.asked.count("0.dcm") == 1


def test_the_audit_names_the_image_of_the_row(
    engine: Reading, archive: Path, tmp_path: Path
) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    _, rows = asked(archive, Series(slices="all"), audit=audit)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    found = [line["input_sha256"] for line in lines if line.get("input_sha256")]
    files = [(archive / row["image"]).read_bytes() for row in rows]
    assert found == [hashlib.sha256(content).hexdigest() for content in files]


def test_a_table_with_questions_of_its_own_has_no_series(engine: Reading, archive: Path) -> None:
    table = archive.parent / "in.csv"
    table.write_text("image,question\narchive/0.dcm,Where?\narchive/1.dcm,What?\n")
    with pytest.raises(InputError, match="all be asked the same"):
        run_batch(table, archive.parent / "out.csv", series=Series())


def test_the_command(engine: Reading, archive: Path, run: Run) -> None:
    line = ["batch", str(archive), "--questions", str(archive.parent / "questions.txt")]
    done = run(*line, "-o", "out.csv", "--series", "middle", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["series"], report["left_out"]) == (2, {"localizer": 2, "no_pixels": 1})
    shown = run(*line, "-o", "again.csv", "--series", "middle")
    assert "not asked: is a localizer" in " ".join(shown.stdout.split())
