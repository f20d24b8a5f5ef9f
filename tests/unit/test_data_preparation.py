"""Tiny downloads in the official forms, whole, incomplete and hostile."""

import builtins
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medmoe_edge.data import prepare as downloads
from medmoe_edge.data.datasets import read_examples
from medmoe_edge.data.prepare import Dataset, prepare
from medmoe_edge.errors import DataError, InputError, MissingDependencyError, ResourceError

JPEG = b"\xff\xd8\xff\xe0 not really an image"
PNG = b"\x89PNG not really an image"

SLAKE = {
    "img_id": 1,
    "img_name": "xmlab1/source.jpg",
    "question": "What modality is used to take this image?",
    "answer": "X-Ray",
    "q_lang": "en",
    "location": "Lung",
    "modality": "X-Ray",
    "answer_type": "OPEN",
    "base_type": "vqa",
    "content_type": "Modality",
    "triple": ["vhead", "_", "_"],
    "qid": 0,
}
RAD = {
    "qid": "3",
    "phrase_type": "freeform",
    "image_name": "synpic1.jpg",
    "image_organ": "ABD",
    "question": "How many stones?",
    "question_type": "COUNT, PRES",
    "answer": 4,
    "answer_type": "OPEN",
}


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


def zipped(file: Path, files: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes) else json.dumps(content))
    return file


def slake(prefix: str = "", **changes: Any) -> dict[str, Any]:
    chinese = SLAKE | {"q_lang": "zh", "img_name": "xmlab9/source.jpg", "qid": 1}
    closed = SLAKE | {"answer_type": "CLOSED", "answer": "Yes", "modality": "MRI", "qid": 2}
    closed |= {"img_name": "xmlab3/source.jpg"}
    return {
        f"{prefix}imgs/xmlab1/source.jpg": JPEG,
        f"{prefix}imgs/xmlab1/mask.png": PNG,
        f"{prefix}imgs/xmlab2/source.jpg": PNG,
        f"{prefix}imgs/xmlab3/source.jpg": PNG + b" of another patient",
        f"{prefix}train.json": [chinese, SLAKE | changes],
        f"{prefix}validate.json": [closed],
        f"{prefix}test.json": [SLAKE | {"img_name": "xmlab2/source.jpg", "qid": 3}],
    }


def as_folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", slake())


def as_zip(tmp_path: Path) -> Path:
    resource_fork = {"__MACOSX/Slake1.0/._train.json": b"\0", "Slake1.0/._train.json": b"\0"}
    return zipped(tmp_path / "Slake1.0.zip", resource_fork | slake("Slake1.0/"))


def as_folder_with_zipped_images(tmp_path: Path) -> Path:
    files = slake()
    zipped(tmp_path / "hf/imgs.zip", {k: v for k, v in files.items() if k.startswith("imgs/")})
    return write(tmp_path / "hf", {k: v for k, v in files.items() if k.endswith(".json")})


@pytest.mark.parametrize("form", [as_folder, as_zip, as_folder_with_zipped_images])
def test_slake(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    out = tmp_path / "deep" / "out"
    prepared = prepare("slake", form(tmp_path), out)
    assert (prepared.folder, prepared.images, prepared.left_out) == (out, 3, 0)
    assert prepared.questions == {"train": 1, "val": 1, "test": 1}

    (train,) = read_examples(out / "train.jsonl", check_images=True)
    assert (train.id, train.question, train.answer) == ("slake-0", SLAKE["question"], "X-Ray")
    assert (train.answer_type, train.modality, train.body) == ("OPEN", "xray", "Lung")
    assert (train.content, train.source) == ("Modality", "slake")
    assert train.image == out / "images/slake/xmlab1/source.jpg"
    assert train.image.read_bytes() == JPEG
    (val,) = read_examples(out / "val.jsonl", check_images=True)
    assert (val.answer_type, val.modality) == ("CLOSED", "mri")
    (test,) = read_examples(out / "test.jsonl", check_images=True)
    assert test.image.read_bytes() == PNG
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        *("train.jsonl", "val.jsonl", "test.jsonl", "dataset.json"),
        *(f"images/slake/xmlab{number}/source.jpg" for number in (1, 2, 3)),
    }
    assert json.loads((out / "dataset.json").read_text()) == {
        "sets": {
            "slake": {
                "questions": {"train": 1, "val": 1, "test": 1},
                "labels": {},
                "images": 3,
                "modalities": {},
                "as_published": False,
            }
        }
    }
    assert list(out.parent.iterdir()) == [out]


def test_vqa_rad(tmp_path: Path) -> None:
    tested = RAD | {"qid": 4, "phrase_type": "test_para", "answer_type": "CLOSED ", "answer": "No"}
    source = write(
        tmp_path / "osf",
        {
            "VQA_RAD Dataset Public.json": [RAD, tested],
            "VQA_RAD Image Folder/synpic1.jpg": JPEG,
            "Readme.docx": b"PK not a zip we read",
        },
    )
    prepared = prepare("vqa-rad", source, tmp_path / "out", as_published=True)
    assert prepared.questions == {"train": 1, "test": 1}
    assert (prepared.images, prepared.left_out) == (1, 0)
    (train,) = read_examples(tmp_path / "out/train.jsonl", check_images=True)
    assert (train.id, train.answer, train.content) == ("rad-3", "4", "COUNT, PRES")
    assert (train.modality, train.body, train.source) == (None, "abdomen", "vqa_rad")
    (test,) = read_examples(tmp_path / "out/test.jsonl", check_images=True)
    assert (test.id, test.answer_type, test.image) == ("rad-4", "CLOSED", train.image)
    assert not (tmp_path / "out/val.jsonl").exists()

    apart = prepare("vqa-rad", source, tmp_path / "apart")
    assert (apart.questions, apart.left_out) == ({"test": 1}, 1), "the picture is in the test"
    assert not (tmp_path / "apart/train.jsonl").exists()
    assert read_examples(tmp_path / "apart")[0].id == "rad-4"


PATHVQA = [
    {"image": "train_0422", "question": "Where are cells?", "answer": "in the canals"},
    {"image": "train_0422", "question": "Are there cells?", "answer": "Yes"},
]


def test_pathvqa_as_json(tmp_path: Path) -> None:
    source = write(
        tmp_path / "split",
        {
            "qas/train/train_qa.json": PATHVQA,
            "qas/train/train_qa.pkl": b"never opened",
            "images/train/train_0422.jpg": JPEG,
        },
    )
    prepared = prepare("pathvqa", source, tmp_path / "out")
    assert prepared.questions == {"train": 2}
    where, whether = read_examples(tmp_path / "out/train.jsonl", check_images=True)
    assert (where.id, where.answer_type, where.modality) == ("pathvqa-train-1", "OPEN", "pathology")
    assert (whether.id, whether.answer_type, whether.image) == (
        "pathvqa-train-2",
        "CLOSED",
        where.image,
    )


def test_pathvqa_as_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which reads parquet files")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": JPEG, "path": None}, "question": "Where?", "answer": "in canals"},
        {"image": {"bytes": PNG, "path": None}, "question": "Any?", "answer": "no"},
        {"image": {"bytes": JPEG, "path": None}, "question": "What?", "answer": "cells"},
    ]
    for name in ("data/train-00000-of-00001-ab12.parquet", "default/validation/0000.parquet"):
        path = tmp_path / "hf" / name
        path.parent.mkdir(parents=True)
        split = name.split("/")[1][:5].encode()
        own = [row | {"image": {"bytes": row["image"]["bytes"] + split}} for row in rows]
        parquet.write_table(arrow.Table.from_pylist(own), path)
    prepared = prepare("pathvqa", tmp_path / "hf", tmp_path / "out")
    assert prepared.questions == {"train": 3, "val": 3}
    assert prepared.images == 4
    first, second, third = read_examples(tmp_path / "out/train.jsonl", check_images=True)
    assert first.image == third.image
    assert first.image.read_bytes() == JPEG + b"train"
    assert second.image.suffix == ".png"
    assert (second.answer_type, third.answer_type) == ("CLOSED", "OPEN")

    write(tmp_path / "hf", {"data/train-00000-of-00001-ab12.parquet": b"version https://git-lfs"})
    with pytest.raises(DataError, match="git lfs pull"):
        prepare("pathvqa", tmp_path / "hf", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dataset", ["slake", "vqa-rad"])
def test_all_sets_as_parquet(tmp_path: Path, dataset: Dataset) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which reads parquet files")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "image": {"bytes": JPEG + text.encode(), "path": None},
            "question": text,
            "answer": "yes",
            "q_lang": language,
            "modality": "X-Ray",
            "location": "Lung",
        }
        for language, text in (("en", "Is it?"), ("zh", "\u662f\u5417"))
    ]
    (tmp_path / "hf").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "hf/test-00000-of-00001.parquet")
    assert prepare(dataset, tmp_path / "hf", tmp_path / "out").questions == {"test": 1}
    (asked,) = read_examples(tmp_path / "out", check_images=True)
    assert (asked.question, asked.answer_type) == ("Is it?", "CLOSED")
    assert (asked.modality, asked.body) == ("xray", "Lung")
    if dataset == "slake":
        both = prepare(dataset, tmp_path / "hf", tmp_path / "both", languages=("en", "zh"))
        assert both.questions == {"test": 2}


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source = write(tmp_path / "hf", {"test-00000-of-00001.parquet": b"PAR1"})
    with pytest.raises(MissingDependencyError, match="pyarrow"):
        prepare("pathvqa", source, tmp_path / "out")
    strange = write(tmp_path / "strange", {"rows.parquet": b"PAR1"})
    with pytest.raises(DataError, match="does not tell its split"):
        prepare("pathvqa", strange, tmp_path / "out")
    with pytest.raises(DataError, match="Unpack the zip"):
        prepare("pathvqa", zipped(tmp_path / "z.zip", {"test.parquet": b""}), tmp_path / "out")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.open, ("bomb-went-off", "w")


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "split", {"qas/train/train_qa.pkl": pickle.dumps(Bomb())})
    with pytest.raises(DataError, match="pickles") as caught:
        prepare("pathvqa", source, tmp_path / "out")
    assert "parquet" in caught.value.remedy
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("name", ["../../evil.jpg", "/evil.jpg", "a\\..\\..\\evil.jpg", "C:evil"])
@pytest.mark.parametrize("dataset", ["slake", "vqa-rad"])
def test_names_that_leave_the_folder(tmp_path: Path, dataset: Dataset, name: str) -> None:
    public = "VQA_RAD Dataset Public.json"
    files = {public: [RAD | {"image_name": name}]} if dataset == "vqa-rad" else slake(img_name=name)
    source = zipped(tmp_path / "in/evil.zip", files | {name: JPEG, f"imgs/{name}": JPEG})
    with pytest.raises(DataError, match="outside the dataset"):
        prepare(dataset, source, tmp_path / "in/out")
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "evil.zip"]


def test_members_nobody_asked_for_stay_inside(tmp_path: Path) -> None:
    evil = {"../evil.json": b"{}", "/tmp/evil.jpg": JPEG, "imgs/../../evil.jpg": JPEG}
    prepare("slake", zipped(tmp_path / "s.zip", slake() | evil), tmp_path / "out")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_linked_member_becomes_an_ordinary_file(tmp_path: Path) -> None:
    file = zipped(tmp_path / "s.zip", {k: v for k, v in slake().items() if "xmlab1/so" not in k})
    link = zipfile.ZipInfo("imgs/xmlab1/source.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    prepare("slake", file, tmp_path / "out")
    image = tmp_path / "out/images/slake/xmlab1/source.jpg"
    assert not image.is_symlink()
    assert image.read_bytes() == b"/etc/passwd"


def test_a_huge_member_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_MAX_BYTES", 10_000)
    files = slake() | {"imgs/xmlab1/source.jpg": bytes(20_000)}
    with pytest.raises(DataError, match="too large"):
        prepare("slake", zipped(tmp_path / "s.zip", files), tmp_path / "out")


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_MAX_FILES", 5)
    for source in (as_folder(tmp_path), as_zip(tmp_path)):
        with pytest.raises(DataError, match="more than 5 files"):
            prepare("slake", source, tmp_path / "out")


def damaged(content: bytes) -> bytes:
    at = content.index(JPEG)
    return content[:at] + b"\0" + content[at + 1 :]


def encrypted(content: bytes) -> bytes:
    # Bit 0 of the flags, in each local header and each directory entry.
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content = content[: at + offset] + b"\1" + content[at + offset + 1 :]
    return content


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (damaged, "damaged"),
        (encrypted, "cannot be unpacked"),
        (lambda content: content[:-40], "not a readable zip"),
        (lambda content: b"", "not a readable zip"),
    ],
)
def test_spoilt_zips(tmp_path: Path, spoil: Callable[[bytes], bytes], complaint: str) -> None:
    file = zipped(tmp_path / "s.zip", slake())
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DataError, match=complaint):
        prepare("slake", file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "holds no questions"),
        ({"train.json": {}}, "not a JSON list"),
        ({"train.json": b"[{"}, "not valid JSON"),
        ({"train.json": b"\xff\xfe"}, "not UTF-8"),
        ({"train.json": ["text"]}, "item 1 is not a JSON object"),
        ({"train.json": [{"q_lang": "en"}]}, "item 1 lacks the key 'img_name'"),
        (slake(modality="Ultrasound"), "item 2: unknown 'modality'"),
        (slake(answer_type="MAYBE"), "item 2: unknown 'answer_type'"),
        (slake(img_name="xmlab7/source.jpg"), "lacks 1 images"),
    ],
)
def test_bad_downloads_leave_nothing(tmp_path: Path, files: dict[str, Any], complaint: str) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", files)
    with pytest.raises(DataError, match=complaint):
        prepare("slake", tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_missing_source_and_wrong_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare("slake", tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match="holds no questions"):
        prepare("vqa-rad", as_folder(tmp_path), tmp_path / "out")


def test_existing_output(tmp_path: Path) -> None:
    source, out = as_folder(tmp_path), tmp_path / "out"
    prepare("slake", source, out)
    with pytest.raises(InputError, match="holds the set 'slake' already"):
        prepare("slake", source, out)
    old, other = out / "images/slake/old.jpg", out / "images/other.jpg"
    old.touch()
    other.touch()
    prepare("slake", source, out, force=True)
    assert (old.exists(), other.exists()) == (False, True), "the set alone is replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    for other in (precious, source):
        before = sorted(other.rglob("*"))
        with pytest.raises(InputError, match=r"holds no dataset\.json, so it will not be replaced"):
            prepare("slake", source, other, force=True)
        assert sorted(other.rglob("*")) == before


def test_a_failure_keeps_the_earlier_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare("slake", as_folder(tmp_path), out)
    write(tmp_path / "bad", slake(img_name="xmlab7/source.jpg"))
    with pytest.raises(DataError):
        prepare("slake", tmp_path / "bad", out, force=True)
    assert len(read_examples(out / "train.jsonl", check_images=True)) == 1


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        prepare("slake", as_folder(tmp_path), tmp_path / "file" / "out")


def test_official_list_needs_no_preparation(tmp_path: Path) -> None:
    item = {"image": "a", "conversations": []}
    with pytest.raises(DataError, match="train or eval as it is"):
        prepare("pathvqa", write(tmp_path / "in", {"test_qa.json": [item]}), tmp_path / "out")
