"""Sets that are added to one dataset folder, and image labels made of folders and tables."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import saved
from hypothesis import given
from hypothesis import strategies as st
from listen_process import study
from PIL import Image as Pillow
from pydicom.uid import (
    BasicTextSRStorage,
    EnhancedUSVolumeStorage,
    ParametricMapStorage,
    RTDoseStorage,
    SegmentationStorage,
)

from medmoe_edge.calibration.data import read_calibration
from medmoe_edge.data.datasets import read_examples, read_labels, split_evenly
from medmoe_edge.data.folder import LabelOptions, add_labels
from medmoe_edge.data.prepare import add_questions, prepare
from medmoe_edge.errors import DataError, InputError
from medmoe_edge.image.loading import dicom_origin


def picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    Pillow.fromarray(pixels).save(path)
    return path


def labels(source: Path, out: Path, *, force: bool = False, **options: Any) -> Any:
    return add_labels(source, out, LabelOptions(**options), header=dicom_origin, force=force)


def question(image: str, **more: Any) -> dict[str, Any]:
    return {"image": image, "question": "Is it?", "answer": "No"} | more


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty pictures each of two modalities, with two findings."""
    folder = tmp_path / "mine"
    for number in range(40):
        modality, finding = ("ct", "oct")[number % 2], ("normal", "odd")[number // 2 % 2]
        picture(folder / modality / finding / f"{number}.png", number)
    (folder / "ct" / "notes.txt").write_text("not a picture")
    (folder / "ct" / "normal" / "broken.png").write_text("no picture either")
    return folder


def test_a_folder_says_modality_and_finding(tmp_path: Path, pictures: Path) -> None:
    prepared = labels(pictures, tmp_path / "data")
    assert prepared.modalities == {"ct": 20, "oct": 20}
    assert prepared.labels == {"train": 32, "val": 4, "test": 4}, "a tenth of every finding each"
    found = read_labels(tmp_path / "data/labels.jsonl", check_images=True)
    assert {(item.modality, item.finding) for item in found} == {
        (modality, finding) for modality in ("ct", "oct") for finding in ("normal", "odd")
    }
    assert {item.source for item in found} == {"mine"}


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refused(path: str) -> Any:
        if Path(path).name == "odd":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(DataError, match="The folder 'odd' cannot be read"):
        labels(pictures, tmp_path / "data")
    with pytest.raises(DataError, match="The folder 'odd' cannot be read"):
        read_calibration(pictures)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        ("ct/1.png", {}, ("ct", "", "", "train")),
        ("CT/chest/normal/1.png", {}, ("ct", "chest", "normal", "train")),
        ("Test/mri/glioma/1.png", {}, ("mri", "", "glioma", "test")),
        ("glioma/valid/1.png", {"modality": "MR"}, ("mri", "", "glioma", "val")),
        ("1.png", {"modality": "oct", "body": "eye", "split": "val"}, ("oct", "eye", "", "val")),
        ("p7/odd/us/1.png", {"levels": ("patient", "finding", "modality")},
         ("ultrasound", "", "odd", "train")),
    ],
)  # fmt: skip
def test_what_folders_mean(
    tmp_path: Path, path: str, options: dict[str, Any], expected: tuple[str, ...]
) -> None:
    picture(tmp_path / "in" / path, 1)
    labels(tmp_path / "in", tmp_path / "out", **options)
    (found,) = read_labels(tmp_path / "out/labels.jsonl", check_images=True)
    assert (found.modality, found.body, found.finding, found.split) == expected


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table(tmp_path: Path, delimiter: str) -> None:
    rows = [("Image", "Modality", "Diagnosis", "patient_id", "split")]
    for number in range(4):
        picture(tmp_path / "pictures" / f"{number}.png", number)
        name = f"pictures/{number}.png" if number else "pictures/0"  # also without its suffix
        rows.append((name, "CT", f"odd {number}", str(number // 2), "training" if number else ""))
    table = tmp_path / "table.csv"
    table.write_text("\n".join(delimiter.join(row) for row in rows), encoding="utf-8-sig")
    labels(table, tmp_path / "out", body="chest")
    found = read_labels(tmp_path / "out/labels.jsonl", check_images=True)
    assert [(item.modality, item.body, item.finding) for item in found] == [
        ("ct", "chest", f"odd {number}") for number in range(4)
    ]
    assert {item.split for item in found} == {"train"}


def test_dicom_says_modality_and_patient_but_not_whose(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    saved(tmp_path / "in", study(), "scan")  # archives leave suffixes out
    labels(tmp_path / "in", tmp_path / "out")
    (row,) = map(json.loads, (tmp_path / "out/labels.jsonl").read_text().splitlines())
    assert row["modality"] == dicom_origin(tmp_path / "in" / "scan")[1]
    assert len(row["patient"]) == 16
    assert row["patient"] != study().PatientID


def test_dicom_is_known_by_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not by its name, which may be a UID; what holds no image is left out, and told of."""
    (tmp_path / "in").mkdir()
    saved(tmp_path / "in", study(), "1.2.840.10008.7")
    report = study()
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    del report.PixelData
    saved(tmp_path / "in", report, "report.dcm")
    (tmp_path / "in" / "notes.1.txt").write_text("no DICOM")
    labels(tmp_path / "in", tmp_path / "out", modality="ct")
    (row,) = map(json.loads, (tmp_path / "out/labels.jsonl").read_text().splitlines())
    assert row["image"] == "images/in/1.2.840.10008.7"
    assert "1 DICOM objects without an image" in caplog.text


def test_dicom_with_pixels_is_an_image_but_for_marks(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    kinds = (EnhancedUSVolumeStorage, ParametricMapStorage, SegmentationStorage, RTDoseStorage)
    for number, kind in enumerate(kinds):
        scan = study()
        scan.SOPClassUID = scan.file_meta.MediaStorageSOPClassUID = kind
        scan.PatientID, scan.SOPInstanceUID = f"{number}", f"1.2.3.{number}"
        saved(tmp_path / "in", scan, f"{number}.dcm")
    labels(tmp_path / "in", tmp_path / "out", modality="ct")
    found = read_labels(tmp_path / "out/labels.jsonl")
    assert {item.image.name for item in found} == {"0.dcm", "1.dcm"}


def test_slices_of_a_study_without_a_patient_stay_together(tmp_path: Path) -> None:
    """As in archives that took the identifiers out."""
    (tmp_path / "in").mkdir()
    for number in range(24):
        scan = study()
        scan.PatientID, scan.StudyInstanceUID = "", f"1.2.{number // 12}"
        scan.SOPInstanceUID = f"1.2.3.{number}"
        saved(tmp_path / "in", scan, f"{number}.dcm")
    labels(tmp_path / "in", tmp_path / "out", modality="ct")
    rows = map(json.loads, (tmp_path / "out/labels.jsonl").read_text().splitlines())
    found = {(row["patient"], row["split"]) for row in rows}
    assert len(found) == len({patient for patient, _ in found}) == 2


@pytest.mark.parametrize(
    ("make", "options", "complaint"),
    [
        ({}, {}, "no picture"),
        ({"1.png": 1}, {}, "modality is not known"),
        ({"ct/1.png": 1}, {"levels": ("modalities",)}, "no level 'modalities'"),
        ({"ct/fold9/1.png": 1}, {"levels": ("modality", "split")}, "no split 'fold9'"),
        ({"t.csv": "file\nnone.png"}, {}, "no such image"),
        ({"t.csv": "name\n1.png"}, {}, "no column 'image'"),
        ({"t.csv": "image,finding\n1.png,effusion, left"}, {}, "more cells than columns"),
        ({"t.csv": 'image,finding\n"1.png,effusion'}, {}, r"t\.csv, line 2: this is no CSV"),
        ({"t.csv": f"image,finding\n1.png,{'x' * 2**17}y"}, {}, r"t\.csv, line 2: this is no CSV"),
        ({"t.csv": 'image,finding\n\n"1\n.png",x'}, {}, r"t\.csv, line 4: there is no such image"),
    ],
)
def test_what_labels_nothing(
    tmp_path: Path, make: dict[str, Any], options: dict[str, Any], complaint: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in make.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            picture(folder / name, content)
    source = folder / "t.csv" if "t.csv" in make else folder
    with pytest.raises((DataError, InputError), match=complaint):
        labels(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_picture_of_two_modalities_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", 1)
    rows = ["image,modality,finding", "1.png,CT,mass", "1.png,ct,effusion", "1.png,mri,mass"]
    (tmp_path / "t.csv").write_text("\n".join(rows[:3]))
    labels(tmp_path / "t.csv", tmp_path / "out")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match="of line 4 is labelled mri, and ct in line 2"):
        labels(tmp_path / "t.csv", tmp_path / "out", force=True)
    folder = tmp_path / "more"
    picture(folder / "mri" / "b.png", 1)  # the same under another name, in another set
    with pytest.raises(DataError, match=r"'mri/b.png' is labelled mri, and ct in '.*-1.png'"):
        labels(folder, tmp_path / "out")
    picture(folder / "ct" / "a.png", 1)
    with pytest.raises(DataError, match=r"'mri/b.png' is labelled mri, and ct in 'ct/a.png'"):
        labels(folder, tmp_path / "new")
    assert "mri" not in (tmp_path / "out" / "labels.jsonl").read_text()


def test_questions_and_labels_name_one_modality_of_a_picture(tmp_path: Path) -> None:
    data, file = tmp_path / "data", tmp_path / "asked.jsonl"
    picture(tmp_path / "in" / "imgs" / "xmlab1" / "source.jpg", 1)
    asked = {"img_name": "xmlab1/source.jpg", "location": "Lung", "q_lang": "en", "question": "?"}
    asked |= {"answer_type": "OPEN", "content_type": "Organ", "answer": "Lung", "modality": "CT"}
    (tmp_path / "in" / "train.json").write_text(json.dumps([asked | {"qid": 1}]))
    prepare("slake", tmp_path / "in", data)
    picture(tmp_path / "mine" / "MRI" / "1.jpg", 1)  # the same bytes
    with pytest.raises(DataError, match=r"'MRI/1.jpg' is labelled mri, and ct in '.*source.jpg'"):
        labels(tmp_path / "mine", data)
    file.write_text(json.dumps(question("mine/MRI/1.jpg", id="q7", modality="MR")))
    with pytest.raises(DataError, match=r"asked\.jsonl: the picture of question 'q7' is labelled"):
        add_questions(file, data)
    labels(tmp_path / "mine", tmp_path / "other")
    with pytest.raises(DataError, match="of question 'slake-1' is labelled ct, and mri in"):
        prepare("slake", tmp_path / "in", tmp_path / "other")
    assert not (tmp_path / "other" / "train.jsonl").exists()


@pytest.mark.parametrize("first", ["labels", "questions"])
def test_labels_and_questions_of_a_picture_are_in_one_split(tmp_path: Path, first: str) -> None:
    """Neither is left out for the sake of the other, nor moved when it is added anew."""
    rows = [
        question(str(picture(tmp_path / "mine/ct" / f"{n}.png", n)), patient=n // 2)
        for n in range(60)
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    add: dict[str, Callable[[bool], Any]] = {
        "labels": lambda force: labels(tmp_path / "mine", tmp_path / "data", force=force),
        "questions": lambda force: add_questions(
            tmp_path / "asked.jsonl", tmp_path / "data", force=force
        ),
    }
    splits: list[dict[bytes, str]] = []
    for names in (sorted(add, reverse=first == "questions"), [first]):
        for name in names:
            assert add[name](bool(splits)).left_out == 0
        found = read_labels(tmp_path / "data/labels.jsonl")
        splits.append({item.image.read_bytes(): item.split for item in found})
        for split in ("train", "val", "test"):
            asked = read_examples(tmp_path / "data" / f"{split}.jsonl")
            assert {splits[-1][each.image.read_bytes()] for each in asked} == {split}
    assert splits[0] == splits[1]


def test_sets_merge_and_no_picture_is_in_two_splits(tmp_path: Path, pictures: Path) -> None:
    data = tmp_path / "data"
    labels(pictures, data)
    found = read_labels(data / "labels.jsonl")
    held = next(item for item in found if item.split == "test")
    learned = next(item for item in found if item.split == "train")
    rows = [question(str(held.image), id=1), question(str(learned.image), id=2)]
    asked = tmp_path / "asked.json"
    asked.write_text("\n".join(map(json.dumps, rows)))
    prepared = add_questions(asked, data, split="train")
    assert (prepared.questions, prepared.left_out) == ({"train": 1}, 1)
    (kept,) = read_examples(data / "train.jsonl", check_images=True)
    assert kept.id == "2"
    assert read_labels(data / "labels.jsonl", check_images=True) == found

    with pytest.raises(InputError, match="holds the set 'asked' already"):
        add_questions(asked, data, split="train")
    add_questions(asked, data, split="test", force=True)
    assert len(read_examples(data / "test.jsonl", check_images=True)) == 2
    assert not (data / "train.jsonl").exists(), "the set has replaced itself"
    moved = read_labels(data / "labels.jsonl", check_images=True)
    assert next(i for i in moved if i.image == learned.image).split == "test"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.json", "data", "mine"]


def test_a_patients_pictures_stay_together(tmp_path: Path) -> None:
    """Patients 0 to 9 have two pictures each; their splits were given picture by picture."""
    lines = ["image,modality,patient,split"]
    for number in range(20):
        picture(tmp_path / f"{number}.png", number)
        split = ("train", "test")[number // 10] if number < 12 else "train"
        lines.append(f"{number}.png,ct,{number % 10},{split}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    labels(tmp_path / "t.csv", tmp_path / "out")
    rows = [json.loads(row) for row in (tmp_path / "out/labels.jsonl").read_text().splitlines()]
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["patient"], set()).add(row["split"])
    assert splits == {str(n): {"test"} if n < 2 else {"train"} for n in range(10)}


def test_a_patients_questions_stay_together(tmp_path: Path) -> None:
    rows = [question(str(picture(tmp_path / f"{n}.png", n)), patient=n % 30) for n in range(60)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = add_questions(tmp_path / "q.jsonl", tmp_path / "out")
    assert prepared.questions == {"train": 48, "val": 6, "test": 6}
    seen: dict[str, str] = {}
    for split in ("train", "val", "test"):
        for example in read_examples(tmp_path / "out" / f"{split}.jsonl"):
            assert example.patient is not None
            assert seen.setdefault(example.patient, split) == split


def test_several_languages(tmp_path: Path) -> None:
    common = {"img_name": "xmlab1/source.jpg", "location": "Lung", "modality": "CT"}
    common |= {"answer_type": "OPEN", "content_type": "Organ", "answer": "Lung"}
    asked = [
        common | {"qid": number, "q_lang": language, "question": text}
        for number, (language, text) in enumerate([("en", "What?"), ("zh", "这是什么?")])
    ]
    picture(tmp_path / "in/imgs/xmlab1/source.jpg", 1)
    (tmp_path / "in/train.json").write_text(json.dumps(asked))
    for languages, expected in ((("en",), 1), (("zh",), 1), (("en", "zh"), 2)):
        out = tmp_path / "-".join(languages)
        assert prepare("slake", tmp_path / "in", out, languages=languages).questions == {
            "train": expected
        }
    with pytest.raises(InputError, match="no questions in 'de'"):
        prepare("slake", tmp_path / "in", tmp_path / "out", languages=("de",))


@given(st.dictionaries(st.integers(), st.sampled_from("ab"), max_size=60))
def test_splits_depend_on_the_groups_alone(groups: dict[int, str]) -> None:
    splits = split_evenly(groups)  # type: ignore[arg-type]
    assert splits == split_evenly(dict(reversed(groups.items())))
    for stratum in "ab":
        mine = [splits[group] for group, of in groups.items() if of == stratum]
        assert mine.count("test") == len(mine) // 10
        assert mine.count("val") == (len(mine) + 5) // 10


def test_what_else_lies_in_the_folder_stays(tmp_path: Path, pictures: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    labels(pictures, data)
    elsewhere.mkdir()
    (data / "slake_boxes.json").write_text("{}")
    (data / "run" / "checkpoint").mkdir(parents=True)
    (data / "run" / "alignment.safetensors").write_bytes(b"epochs")
    (data / "run").chmod(0o700)
    (data / "images" / "mine" / "notes.txt").write_text("of the set mine")
    (data / "elsewhere").symlink_to(elsewhere)
    (data / "gone").symlink_to("nowhere")
    before = {path.relative_to(data): path.lstat().st_mode for path in data.rglob("*")}
    picture(tmp_path / "more" / "mri" / "1.png", 99)
    labels(tmp_path / "more", data)
    after = {path.relative_to(data): path.lstat().st_mode for path in data.rglob("*")}
    assert before.items() <= after.items()
    assert (data / "run" / "alignment.safetensors").read_bytes() == b"epochs"
    assert (data / "elsewhere").resolve() == elsewhere
    assert len(read_labels(data / "labels.jsonl", check_images=True)) == 41

    labels(pictures, data, force=True)
    assert (data / "run" / "alignment.safetensors").exists()
    assert not (data / "images" / "mine" / "notes.txt").exists(), "a set is replaced as a whole"


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("train.jsonl", {"image": "a.png"}, "no picture in images/SET/"),
        ("train.jsonl", {"image": "images/mine/none.png"}, "no picture in images/SET/"),
        ("train.jsonl", {"image": "images/mine/../../../out.png"}, "outside the dataset"),
        ("train.jsonl", {"image": ["a.png", "b.png"]}, "'image' is not text"),
        ("train.jsonl", {}, "lacks the key 'image'"),
        ("labels.jsonl", {"image": "GIVEN"}, "lacks the key 'modality'"),
        ("labels.jsonl", {"image": "GIVEN", "modality": "ct", "split": "all"}, "unknown 'split'"),
        ("train.jsonl", {"image": "GIVEN", "question": "Is it?"}, "lacks the key 'answer'"),
    ],
)
def test_a_line_edited_by_hand_is_refused_by_its_number(
    tmp_path: Path, file: str, line: dict[str, Any], message: str
) -> None:
    picture(tmp_path / "mine" / "ct" / "1.png", 1)
    picture(tmp_path / "more" / "ct" / "2.png", 2)
    picture(tmp_path / "out.png", 3)
    data = tmp_path / "data"
    labels(tmp_path / "mine", data, split="train")
    if line.get("image") == "GIVEN":
        line = line | {"image": "images/mine/ct/1.png"}
    with (data / file).open("a") as stream:
        stream.write("\n" + json.dumps(line) + "\n")
    number = len((data / file).read_text().splitlines())
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=f"{file}, line {number}.*{message}"):
        labels(tmp_path / "more", data)
    assert before == {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "more", "out.png", "data"}


def test_a_good_line_written_by_hand_is_kept(tmp_path: Path) -> None:
    picture(tmp_path / "mine" / "ct" / "1.png", 1)
    picture(tmp_path / "more" / "ct" / "2.png", 2)
    data = tmp_path / "data"
    labels(tmp_path / "mine", data, split="train")
    (data / "train.jsonl").write_text(json.dumps(question("./images/mine/ct/1.png")))
    picture(data / "images" / "hand" / "3.png", 3)
    with (data / "labels.jsonl").open("a") as stream:
        stream.write(json.dumps({"image": "images/hand/3.png", "modality": 7}) + "\n")
    labels(tmp_path / "more", data)
    (asked,) = read_examples(data / "train.jsonl", check_images=True)
    assert (asked.id, asked.image) == ("1", data / "images/mine/ct/1.png")
    found = read_labels(data / "labels.jsonl", check_images=True)
    assert {item.modality for item in found} == {"ct", "7"}
    with pytest.raises(InputError, match="holds the set 'hand' already"):
        labels(tmp_path / "more", data, name="hand")
