"""Calibration data: folders, question files and the built-in set; even, repeatable draws."""

import json
import os
import random
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
)

from medmoe_edge.calibration import data as calibration_data
from medmoe_edge.calibration.data import (
    CalibrationData,
    Sample,
    Skipped,
    folder_samples,
    modality_of_folders,
    read_calibration,
)
from medmoe_edge.errors import DataError, InputError, MissingDependencyError

ASKED = len(calibration_data.QUESTIONS)


def write_png(file: Path, shade: int = 9) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("L", (4, 4), shade).save(file, "PNG")
    return file


def write_dicom(
    file: Path,
    modality: str,
    *,
    kind: UID = CTImageStorage,
    syntax: UID = ExplicitVRLittleEndian,
    image: bool = True,
) -> Path:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PatientName = "Secret^Patient"
    dataset.Modality = modality
    if image:
        dataset.Rows = dataset.Columns = 4
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.PixelData = bytes(range(16))
    dataset.save_as(file, enforce_file_format=True)
    return file


def write_lines(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(good=19, bad=1)`: a folder of PNG files, the bad ones cut off."""

    def make(good: int, bad: int = 0) -> Path:
        for number in range(good):
            write_png(tmp_path / "scans" / f"good{number}.png", number)
        for number in range(bad):
            file = write_png(tmp_path / "scans" / f"bad{number}.png")
            file.write_bytes(file.read_bytes()[:40])
        return tmp_path / "scans"

    return make


# A folder


def test_a_folder_s_pictures_get_the_bedside_questions(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    write_png(tmp_path / "deep" / "er" / "no suffix")
    data = read_calibration(tmp_path)
    assert {s.image for s in data.samples} == {
        tmp_path / "a.png",
        tmp_path / "deep" / "er" / "no suffix",
    }
    asked = [(s.question, s.answer_type) for s in data.samples if s.image.name == "a.png"]
    assert sorted(asked) == sorted(calibration_data.QUESTIONS)
    assert {(s.answer, s.modality) for s in data.samples} == {("", None)}
    assert data.name == tmp_path.name


def test_only_pictures_of_a_folder_count(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    for name in ("notes.txt", ".hidden.png", "._a.png", "list.csv.gz"):
        (tmp_path / name).write_bytes(b"\x1f\x8bnot a picture")
    write_png(tmp_path / ".cache" / "thumbnail.png")
    write_dicom(tmp_path / "report", "SR", kind=BasicTextSRStorage, image=False)
    directory = get_testdata_file("DICOMDIR")
    assert isinstance(directory, str)
    shutil.copy(directory, tmp_path / "DICOMDIR")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle").symlink_to(tmp_path)
    assert {s.image.name for s in folder_samples(tmp_path)} == {"a.png"}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_dicom_says_its_modality(tmp_path: Path, syntax: UID) -> None:
    write_dicom(tmp_path / "one", "MR", syntax=syntax)
    write_dicom(tmp_path / "two", "NM", syntax=syntax)
    write_dicom(tmp_path / "three", "CT", syntax=syntax, kind=UID("1.2.3.4"))  # a private class
    assert {(s.image.name, s.modality) for s in folder_samples(tmp_path)} == {
        ("one", "mri"),
        ("two", None),
        ("three", "ct"),
    }
    assert read_calibration(tmp_path).draw(3, modalities=["MRI"])[0].load().modality == "mri"


def test_a_deflated_header_is_inflated_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dicom(tmp_path / "bomb", "MR", syntax=DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr("medmoe_edge.image.dicom_container.MAX_INFLATED", 50)
    monkeypatch.setattr("medmoe_edge.image.dicom_container.STEP", 20)
    assert {s.modality for s in folder_samples(tmp_path)} == {None}


def test_a_damaged_dicom_header_is_met_only_when_it_is_drawn(tmp_path: Path) -> None:
    for number in range(20):
        write_png(tmp_path / f"{number}.png")
    (tmp_path / "old").write_bytes(b"\x08\0\x60\0" + b"\xff" * 300)  # no preamble, no sense
    data = read_calibration(tmp_path)
    assert len(data.draw(200)) == 20 * ASKED
    assert [image.image for image in data.skipped] == ["old"]


def test_the_order_depends_on_names_and_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["b/1.png", "a.png", "c.png", "b/2.png"]
    for root, order in (("first", names), ("second/of/two", names[::-1])):
        for name in order:
            write_png(tmp_path / root / name)
    here = read_calibration(tmp_path / "first")
    walk = os.walk

    def shuffled(*arguments: Any, **options: Any) -> Any:
        for parent, folders, files in walk(*arguments, **options):
            yield parent, folders, files[::-1]

    monkeypatch.setattr("os.walk", shuffled)
    there = read_calibration(tmp_path / "second" / "of" / "two")
    assert [s.id for s in here.samples] == [s.id for s in there.samples]
    assert here.sha256 == there.sha256
    other = read_calibration(tmp_path / "first", seed=1)
    assert [s.id for s in here.samples] != [s.id for s in other.samples]
    assert here.sha256 == other.sha256


def test_the_fingerprint_tells_sources_apart(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    before = read_calibration(tmp_path).sha256
    with (tmp_path / "a.png").open("ab") as file:
        file.write(b"more")
    longer = read_calibration(tmp_path).sha256
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({before, longer, read_calibration(tmp_path).sha256}) == 3


def test_every_picture_is_drawn_before_any_is_drawn_twice(folder: Callable[..., Path]) -> None:
    drawn = read_calibration(folder(good=6)).draw(12)
    assert len({s.image for s in drawn[:6]}) == len({s.image for s in drawn[6:]}) == 6


# Unreadable images


def test_one_bad_image_among_twenty_is_skipped_and_listed(folder: Callable[..., Path]) -> None:
    data = read_calibration(folder(good=19, bad=1))
    assert data.skipped == []  # nothing is decoded before it is drawn
    drawn = data.draw(20)
    assert len(drawn) == 20
    assert "bad0.png" not in {s.image.name for s in drawn}
    assert len(data.draw(1000)) == 19 * ASKED
    assert data.skipped == [Skipped("bad0.png", data.skipped[0].reason)]
    assert "'bad0.png' is damaged" in data.skipped[0].reason


@pytest.mark.parametrize(("good", "bad", "count"), [(9, 1, 10), (18, 2, 20), (95, 6, 101)])
def test_more_than_one_in_twenty_is_refused(
    folder: Callable[..., Path], good: int, bad: int, count: int
) -> None:
    data = read_calibration(folder(good, bad))
    with pytest.raises(DataError, match=r"cannot be read, more than 5%: 'bad\d.png' is damaged"):
        data.draw(count)


def test_where_no_image_can_be_read_few_are_tried(folder: Callable[..., Path]) -> None:
    data = read_calibration(folder(good=0, bad=60))
    with pytest.raises(DataError, match="'scans' cannot be read"):
        data.draw(10)
    assert len(data.skipped) == 2


def test_the_share_is_that_of_the_images_decoded(folder: Callable[..., Path]) -> None:
    file = folder(good=98, bad=2) / "questions.jsonl"
    lines = [
        {"image": f"{name}.png", "modality": modality, "question": question}
        for name, modality in (
            *((f"bad{number}", "ct") for number in range(2)),
            *((f"good{number}", "ct" if number < 28 else "mri") for number in range(98)),
        )
        for question in ("One?", "Two?")
    ]
    write_lines(file, *lines)
    assert len(read_calibration(file).draw(1000)) == 196  # 2 of 100
    with pytest.raises(DataError, match="2 of 30 images"):
        read_calibration(file).draw(1000, modalities=["ct"])


def test_a_bad_image_among_the_first_few_of_many_is_no_reason_to_stop(tmp_path: Path) -> None:
    for number in range(40):
        write_png(tmp_path / f"{number}.png")
    first = read_calibration(tmp_path).samples[0].image
    first.write_bytes(first.read_bytes()[:40])
    data = read_calibration(tmp_path)
    assert len(data.draw(1)) == 1
    assert [image.image for image in data.skipped] == [first.name]


def test_each_image_is_decoded_once(folder: Callable[..., Path]) -> None:
    data = read_calibration(folder(good=5))
    drawn = {sample.image for sample in data.draw(2)}
    for image in drawn:
        image.write_bytes(b"")  # who decoded it again would not take it
    assert len({sample.image for sample in data.draw(1000)}) == 5
    assert data.skipped == []


def test_no_patient_data_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_dicom(tmp_path / "scan.dcm", "CT")
    file.write_bytes(file.read_bytes()[:-9])
    data = read_calibration(tmp_path)
    caplog.set_level("INFO")
    with pytest.raises(DataError) as caught:
        data.draw(1)
    assert "scan.dcm" in caplog.text
    assert "Secret" not in f"{caught.value} {caplog.text} {data!r}"


def test_file_names_are_logged_only_to_those_who_ask(
    folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    data = read_calibration(folder(good=30, bad=1))
    data.draw(1000)
    data.draw(1000)
    assert caplog.messages == ["Skipped images that cannot be read: 1."]


def test_a_missing_decoder_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "a.png")

    def absent(*_: object, **__: object) -> None:
        raise MissingDependencyError("imagecodecs", "images")

    monkeypatch.setattr(calibration_data, "load_image", absent)
    with pytest.raises(MissingDependencyError):
        read_calibration(tmp_path).draw(1)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError, match="holds no image"):
        read_calibration(tmp_path)
    with pytest.raises(DataError, match="The folder 'absent' cannot be read"):
        list(folder_samples(tmp_path / "absent"))


# A file of questions


def test_a_line_needs_no_more_than_an_image(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "questions.jsonl",
        {"image": "a.png", "question": "Is there air?"},
        {"image": "a.png", "question": "Is there air?", "answer": "No", "modality": "X-Ray"},
        {"image": "a.png", "question": "What?", "answer": "Air", "answer_type": "closed", "id": 7},
        {"image": "b.png", "modality": "ct", "source": "here", "finding": "none"},
    )
    read = {s.id: s for s in read_calibration(file).samples}
    image = tmp_path / "a.png"
    assert read["1"] == Sample("1", image, "Is there air?", "", None, "OPEN")
    assert read["2"] == Sample("2", image, "Is there air?", "No", "xray", "CLOSED")
    assert read["7"] == Sample("7", image, "What?", "Air", None, "CLOSED")
    assert {(s.question, s.modality) for s in read.values() if s.image.name == "b.png"} == {
        (question, "ct") for question, _ in calibration_data.QUESTIONS
    }
    assert len(read) == 3 + ASKED


def test_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    line = {"image": "a.png", "question": "What?", "id": "2"}
    file = write_lines(tmp_path / "q.jsonl", line, {**line, "id": ""}, line)
    assert sorted(s.id for s in read_calibration(file).samples) == ["2", "2-2", "2-3"]


def test_the_official_list_is_read(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A lung"}]
    item = {"id": 1, "image": "a.png", "conversations": turns, "answer_type": "OPEN"}
    (tmp_path / "list.json").write_text(json.dumps([item]))
    (drawn,) = read_calibration(tmp_path / "list.json").draw(5)
    assert drawn == Sample("1", tmp_path / "a.png", "What?", "A lung", None, "OPEN")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no image"),
        (b"\xff\xd8\xff\xe0", "cannot be read as a list of questions"),
        (b'{"image": "a.png"}\n{', "line 2 is not valid JSON"),
        (b'{"question": "What?"}', "line 1 lacks the key 'image'"),
        (b'{"image": "a.png", "question": [1]}', "'question' is not text"),
        (b'{"image": "a.png", "question": "?", "answer_type": "maybe"}', "unknown 'answer_type'"),
        (b'[{"id": 1}]', "item 1 lacks the key"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_calibration(tmp_path / "q.jsonl")


@pytest.mark.parametrize("image", ["absent.png", "nul\0.png", "x" * 5000])
def test_an_absent_image_is_an_unreadable_one(tmp_path: Path, image: str) -> None:
    data = read_calibration(write_lines(tmp_path / "q.jsonl", {"image": image, "question": "?"}))
    with pytest.raises(DataError, match=r"1 of 1 images of 'q.jsonl' cannot be read"):
        data.draw(1)


def test_labels_must_be_known_to_the_model(tmp_path: Path) -> None:
    known = ("MRI", "ct")
    lines = [{"image": "a.png", "question": "?", "modality": m} for m in ("Mars", "venus")]
    file = write_lines(tmp_path / "q.jsonl", *lines)
    with pytest.raises(DataError, match=r"not know: mars, venus\. Use: MRI, ct;"):
        read_calibration(file, known_modalities=known)
    assert len(read_calibration(file).samples) == 2
    some = write_lines(tmp_path / "some.jsonl", *lines, {**lines[0], "modality": "mri"})
    assert len(read_calibration(some, known_modalities=known).samples) == 3
    none = write_lines(tmp_path / "none.jsonl", {"image": "a.png", "question": "?"})
    assert len(read_calibration(none, known_modalities=known).samples) == 1


# The built-in set


def test_the_built_in_set_is_real_pictures_of_four_modalities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data = read_calibration("builtin", known_modalities=("mri", "ct", "pathology", "xray"))
    pictures = {s.picture: s for s in data.samples}
    counts = Counter(s.modality for s in pictures.values())
    assert counts == {"ct": 4, "mri": 6, "xray": 2, "pathology": 4}
    assert len(data.samples) == ASKED * counts.total()
    images = [s.load() for s in pictures.values()]
    assert len({image.pixels.tobytes() for image in images}) == counts.total()
    for image, sample in zip(images, pictures.values(), strict=True):
        assert image.modality in (sample.modality, None)
        assert min(image.pixels.shape[:2]) >= 64
        assert np.ptp(image.pixels) > 128
    assert {image.pixels.shape for image in images if image.modality is None} == {(256, 256, 3)}


def test_the_built_in_set_is_drawn_evenly_and_repeatably() -> None:
    drawn = read_calibration("builtin").draw(24)
    assert Counter(s.modality for s in drawn) == dict.fromkeys(
        ("ct", "mri", "xray", "pathology"), 6
    )
    assert read_calibration("builtin") == read_calibration("builtin")
    assert read_calibration("builtin").samples != read_calibration("builtin", seed=1).samples


@pytest.mark.parametrize("module", calibration_data.PACKAGES)
def test_a_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> ModuleSpec | None:
        return None if name == module else find_spec(name)

    monkeypatch.setattr(calibration_data, "find_spec", without)
    with pytest.raises(MissingDependencyError, match=f"'{calibration_data.PACKAGES[module][0]}'"):
        read_calibration("builtin")


def test_a_package_without_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_data, "PICTURES", (("skimage", "gone.png", "ct", None, None),))
    with pytest.raises(DataError, match=r"'scikit-image' lacks its file 'gone.png'"):
        read_calibration("builtin")


@pytest.mark.parametrize("source", ["bultin", "no/such/folder", "nul\0", "x" * 5000, "/dev/null"])
def test_an_unknown_name_lists_the_known_ones(source: str) -> None:
    with pytest.raises(InputError, match="a set's name: builtin"):
        read_calibration(source)


def test_a_path_is_never_a_set_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "builtin" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(read_calibration(Path("builtin")).samples) == ASKED
    assert len(read_calibration("./builtin").samples) == ASKED
    assert len(read_calibration("builtin").samples) > ASKED


# Draws


class Readable(Sample):
    """A sample whose picture is never in the way."""

    def load(self) -> Any:
        return None


def stratified(counts: Sequence[int]) -> CalibrationData:
    """So many samples of each modality; the last one's modality is unknown."""
    drawable: list[Sample] = []
    for index, count in enumerate(counts):
        modality = f"m{index}" if index < len(counts) - 1 else None
        drawable += (
            Readable(f"{index}-{number}", Path(f"{number}"), "?", "", modality, "OPEN")
            for number in range(count)
        )
    random.Random(0).shuffle(drawable)
    return CalibrationData("made", tuple(drawable), "")


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 40))
def test_modalities_take_turns(counts: list[int], wanted: int) -> None:
    data = stratified(counts)
    drawn = data.draw(wanted)
    assert drawn == data.draw(wanted)
    assert len(drawn) == len(set(drawn)) == min(wanted, sum(counts))
    got = Counter(int(s.id.partition("-")[0]) for s in drawn)
    most = max(got.values(), default=0)
    for index, count in enumerate(counts):  # short of the others by more than one: used up
        assert got[index] >= most - 1 or got[index] == count


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=5),
    st.lists(st.integers(0, 9), max_size=4),
    st.sets(st.sampled_from(["m0", "m1", "M2", "absent"])),
)
def test_further_draws_bring_only_new_samples(
    counts: list[int], draws: list[int], modalities: set[str]
) -> None:
    data = stratified(counts)
    seen: list[Sample] = []
    for wanted in draws:
        seen += data.draw(wanted, exclude=seen)
    assert len(seen) == len(set(seen)) == min(sum(draws), sum(counts))
    allowed = {name.lower() for name in modalities}
    rest = data.draw(1000, modalities=modalities, exclude=seen)
    assert set(rest) == {s for s in data.samples if s.modality in allowed} - set(seen)


# --- who says the modality ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "modality"),
    [
        (["ct"], "ct"),
        (["CT scans", "patient 7"], "ct"),
        (["chest_xray"], "xray"),
        (["X-Ray"], "xray"),
        (["x-ray chest", "normal"], "xray"),
        (["brain-MR"], "mri"),
        (["mri", "ct"], "ct"),  # the innermost
        (["ct_and_mri"], None),  # which?
        (["direct"], None),  # no word of it is ct
        (["endoscopy"], "endoscopy"),  # of the model
        ([], None),
    ],
)
def test_a_folder_says_its_modality(folders: list[str], modality: str | None) -> None:
    assert modality_of_folders(folders, ("endoscopy",)) == modality


def test_dicom_goes_before_the_folder(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    write_png(tmp_path / "ct" / "a.png")
    write_dicom(tmp_path / "ct" / "b.dcm", "MR")
    write_png(tmp_path / "c.png")
    data = read_calibration(tmp_path)
    told = {s.image.name: (s.modality, s.labelled_by) for s in data.samples if s.modality}
    assert told == {"a.png": ("ct", "folder"), "b.dcm": ("mri", "dicom")}
    unknown = data.unlabelled(5)
    assert [sample.image.name for sample in unknown] == ["c.png"]
    data.label({unknown[0].picture: "xray"})
    named = {(s.image.name, s.labelled_by) for s in data.samples if s.modality == "xray"}
    assert named == {("c.png", "router")}
    assert {sample.modality for sample in data.draw(3)} == {"ct", "mri", "xray"}
