import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_edge.data.datasets import (
    FormName,
    UniqueIds,
    read_examples,
    read_findings,
    read_labels,
    schema,
)
from medmoe_edge.errors import DataError

QUESTION = {
    "id": "q1",
    "image": "images/a.jpg",
    "modality": "ct",
    "body": "Lung",
    "question": "Is it normal?",
    "answer": "No",
    "answer_type": "CLOSED",
    "content": "Abnormality",
    "source": "slake",
}
ITEM = {
    "id": 7,
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": "lung"},
    ],
    "answer_type": "OPEN",
}
LABEL = {
    "image": "a.jpg",
    "modality": "mri",
    "body": "head",
    "finding": "glioma",
    "source": "tumours",
    "split": "val",
}


def write_lines(file: Path, *values: Any) -> Path:
    file.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values) + "\n")
    return file


def write_list(file: Path, *items: Any) -> Path:
    file.write_text(json.dumps(items, indent=1))
    return file


def test_jsonl_is_read_as_written(tmp_path: Path) -> None:
    bare = {k: v for k, v in QUESTION.items() if k not in ("modality", "body", "content")}
    file = write_lines(tmp_path / "q.jsonl", QUESTION, "", bare | {"id": "q2", "answer": ""})
    first, second = read_examples(file)
    assert first.image == tmp_path / "images/a.jpg"
    assert (first.id, first.question, first.answer) == ("q1", "Is it normal?", "No")
    assert (first.answer_type, first.source) == ("CLOSED", "slake")
    assert (first.modality, first.body, first.content) == ("ct", "Lung", "Abnormality")
    assert (second.modality, second.body, second.content, second.answer) == (None, None, None, "")


def test_line_separators_inside_strings_do_not_break_a_line(tmp_path: Path) -> None:
    line = json.dumps(QUESTION | {"answer": "left\u2028right"}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text("\ufeff" + line + "\r\n", encoding="utf-8")
    (example,) = read_examples(tmp_path / "q.jsonl")
    assert example.answer == "left\u2028right"


def test_official_list(tmp_path: Path) -> None:
    file = write_list(tmp_path / "test.json", ITEM)
    (example,) = read_examples(file)
    assert (example.id, example.question, example.answer) == ("7", "What is shown?", "lung")
    assert (example.image, example.source) == (tmp_path / "a.jpg", "test")


def test_official_list_with_turns_and_repeated_ids(tmp_path: Path) -> None:
    turns = [
        *ITEM["conversations"],  # type: ignore[misc]
        {"from": "human", "value": "Is it?"},
        {"from": "gpt", "value": "yes"},
    ]
    misspelt = {k: v for k, v in ITEM.items() if k != "conversations"} | {"conversatons": turns}
    examples = read_examples(write_list(tmp_path / "test.json", misspelt, ITEM))
    assert [example.id for example in examples] == ["7", "7-2", "7-3"]
    assert [example.answer for example in examples] == ["lung", "yes", "lung"]


@pytest.mark.parametrize(
    ("written", "read"),
    [("open", "OPEN"), ("close", "CLOSED"), ("Closed", "CLOSED"), ("OPEN ", "OPEN")],
)
def test_answer_types(tmp_path: Path, written: str, read: str) -> None:
    in_list = write_list(tmp_path / "q.json", ITEM | {"answer_type": written})
    in_lines = write_lines(tmp_path / "q.jsonl", QUESTION | {"answer_type": written})
    assert [example.answer_type for example in read_examples(in_list)] == [read]
    assert [example.answer_type for example in read_examples(in_lines)] == [read]


SECRET = "Secret"
BAD_LINES = {
    "bad JSON": '{"id": "Secret',
    "not an object": '"Secret"',
    "nested": "[" * 3 + "{",
    "deep": '{"id":' * 100_000,
    "missing": {k: v for k, v in QUESTION.items() if k != "answer"},
    "answer type": QUESTION | {"id": "q2", "answer_type": SECRET},
    "null image": QUESTION | {"id": "q2", "image": None},
    "no image in a list": QUESTION | {"id": "q2", "image": []},
    "null answer": QUESTION | {"id": "q2", "answer": None},
    "list": QUESTION | {"id": "q2", "question": [SECRET]},
    "empty question": QUESTION | {"id": "q2", "question": " "},
    "repeated id": QUESTION,
    "lone surrogate": QUESTION | {"id": "q2", "question": "Secret \ud800"},
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named_but_not_quoted(tmp_path: Path, line: Any) -> None:
    file = write_lines(tmp_path / "q.jsonl", QUESTION, line)
    with pytest.raises(DataError) as caught:
        read_examples(file)
    assert f"{file}, line 2" in caught.value.what
    assert SECRET not in str(caught.value)


BAD_ITEMS = {
    "no conversation": {k: v for k, v in ITEM.items() if k != "conversations"},
    "half a turn": ITEM | {"conversations": [{"from": "human", "value": SECRET}]},
    "no turns": ITEM | {"conversations": []},
    "not turns": ITEM | {"conversations": SECRET},
    "wrong order": ITEM
    | {"conversations": [{"from": "gpt", "value": SECRET}, {"from": "human", "value": "b"}]},
    "only the image": ITEM
    | {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": SECRET}]},
    "string": SECRET,
}


@pytest.mark.parametrize("item", BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_bad_item_is_named_but_not_quoted(tmp_path: Path, item: Any) -> None:
    file = write_list(tmp_path / "q.json", ITEM, item)
    with pytest.raises(DataError) as caught:
        read_examples(file)
    assert f"{file}, item 2" in caught.value.what
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"[1", b"\xff\xd8\xff\xe0 an image"])
def test_useless_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"q\.jsonl"):
        read_examples(file)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for read in (read_examples, read_labels, read_findings):
        with pytest.raises(DataError, match="does not exist"):
            read(tmp_path / "none.jsonl")


def test_absent_images_are_found_when_asked(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", QUESTION, QUESTION | {"id": "2", "image": "b.jpg"})
    assert len(read_examples(file)) == 2
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").touch()
    with pytest.raises(DataError, match=r"the image .*b\.jpg does not exist \(1 "):
        read_examples(file, check_images=True)
    (tmp_path / "b.jpg").touch()
    assert len(read_examples(file, check_images=True)) == 2


def test_labels(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "labels.jsonl", LABEL)
    (image,) = read_labels(file)
    assert image.image == tmp_path / "a.jpg"
    assert (image.modality, image.body, image.finding) == ("mri", "head", "glioma")
    assert (image.source, image.split) == ("tumours", "val")
    with pytest.raises(DataError, match="does not exist"):
        read_labels(file, check_images=True)
    with pytest.raises(DataError, match="line 2: unknown 'split'"):
        read_labels(write_lines(file, LABEL, LABEL | {"split": "holdout"}))
    with pytest.raises(DataError, match="holds no labelled images"):
        read_labels(write_lines(file))


def test_findings(tmp_path: Path) -> None:
    row = {
        "image": "a.jpg",
        "modality": "X-ray",
        "body": "chest",
        "view": "pa",
        "findings": ["Pleural effusion"],
        "negatives": ["fracture"],
        "implied_negatives": ["nodule", "airspace opacity"],
        "adjudicated": {"nodule or mass": True, "fracture": False, "airspace opacity": False},
        "patient": "p1",
        "split": "val",
        "source": "films",
    }
    cat = {"image": "cat.png", "modality": "none", "kind": "photo"}
    file = write_lines(tmp_path / "findings.jsonl", row, cat)
    film, picture = read_findings(file)
    assert film.image == tmp_path / "a.jpg"
    assert (film.modality, film.body, film.view) == ("xray", "chest", "pa")
    assert film.present == ("pleural effusion", "nodule or mass")
    assert film.absent == ("fracture", "airspace opacity")
    assert film.implied_absent == ("nodule",)  # what a panel decided is stated
    assert (film.patient, film.split, film.source, film.kind) == ("p1", "val", "films", None)
    assert (picture.modality, picture.present, picture.absent) == ("none", (), ())
    assert (picture.kind, picture.split, picture.source) == ("photo", "train", "findings")
    with pytest.raises(DataError, match="does not exist"):
        read_findings(file, check_images=True)
    with pytest.raises(DataError, match="line 1: 'fracture' is both present and absent"):
        read_findings(write_lines(file, row | {"findings": ["Fracture"]}))
    with pytest.raises(DataError, match="line 1: 'findings' is not a list"):
        read_findings(write_lines(file, row | {"findings": "effusion"}))
    with pytest.raises(DataError, match="holds no images with findings"):
        read_findings(write_lines(file))


def test_the_findings_of_the_shared_data(data_dir: Path) -> None:
    """No patient is in two splits, and every image is there."""
    findings = read_findings(data_dir / "findings.jsonl", check_images=True)
    splits: dict[str, set[str]] = {}
    for one in findings:
        splits.setdefault(one.patient or str(one.image), set()).add(one.split)
    assert {len(held) for held in splits.values()} == {1}
    effusion = [one for one in findings if one.split == "val" and "pleural effusion" in one.present]
    assert len(effusion) == 33


def test_what_may_be_left_out(tmp_path: Path) -> None:
    bare = {key: QUESTION[key] for key in ("image", "question", "answer")}
    file = write_lines(
        tmp_path / "mine.jsonl", bare, bare | {"answer": "Two"}, bare | {"modality": "X-Ray"}
    )
    first, second, third = read_examples(file)
    assert (first.id, second.id, third.id) == ("1", "2", "3")
    assert (first.answer_type, second.answer_type) == ("CLOSED", "OPEN")
    assert (first.source, third.modality) == ("mine", "xray")
    (label,) = read_labels(write_lines(file, {"image": "a.jpg", "modality": "MR"}))
    assert (label.modality, label.body, label.finding) == ("mri", "", "")
    assert (label.source, label.split) == ("mine", "train")


def test_all_missing_keys_are_named_at_once_with_their_meaning(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_examples(write_lines(tmp_path / "q.jsonl", {"image": "a.jpg"}))
    assert "line 1 lacks the keys 'question', 'answer'" in caught.value.what
    assert "the reference answer" in caught.value.remedy
    with pytest.raises(DataError, match="'image', 'modality'"):
        read_labels(write_lines(tmp_path / "l.jsonl", {"finding": "none"}))


def test_the_official_list_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No answer types, several images, turns about no image: as LLaVA's trainers take them."""
    bare = {k: v for k, v in ITEM.items() if k != "answer_type"}
    text = {k: v for k, v in bare.items() if k != "image"}
    items = [bare | {"image": ["a.jpg", "b.jpg"]}, text, bare | {"modality": "MRI"}]
    examples = read_examples(write_list(tmp_path / "q.json", *items))
    assert [example.image.name for example in examples] == ["a.jpg", "a.jpg"]
    assert [example.answer_type for example in examples] == ["OPEN", "OPEN"]
    assert examples[1].modality == "mri"
    assert "1 entries have several images; the first of each is used" in caplog.text
    assert "1 entries have no image and are left out" in caplog.text
    lines = write_lines(tmp_path / "q.jsonl", *items)
    assert [e.answer for e in read_examples(lines)] == [e.answer for e in examples]


def test_a_dataset_folder_is_read_where_it_is_tested(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_lines(tmp_path / f"{name}.jsonl", QUESTION | {"source": name})
    assert read_examples(tmp_path)[0].source == "val"
    write_lines(tmp_path / "test.jsonl", QUESTION | {"source": "test"})
    assert read_examples(tmp_path)[0].source == "test"
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no test\.jsonl") as caught:
        read_examples(tmp_path / "none")
    assert "medmoe-edge data" in caught.value.remedy


ROWS = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from(["a.jpg", " ", 3, None, ["a.jpg"], [], [None]]),
        "question": st.sampled_from(["Is it?", "", 3, None, ["x"]]),
        "answer": st.sampled_from(["No", "", 4, None, True]),
        "answer_type": st.sampled_from(["OPEN", "close", "", None, "maybe"]),
        "id": st.sampled_from(["7", 7, None, "", True]),
        "modality": st.sampled_from(["ct", "", None, []]),
        "source": st.sampled_from(["mine", "", None]),
        "split": st.sampled_from(["train", "Validation", "", None, "holdout"]),
        "findings": st.sampled_from([["Effusion"], [], None, "effusion", [" "], [None]]),
        "adjudicated": st.sampled_from([{"fracture": False}, {}, [], None, {"fracture": "no"}]),
        "kind": st.sampled_from(["photo", "", None, []]),
    },
)


@given(ROWS)
def test_the_schemas_say_what_is_read(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    """Held against the package jsonschema."""
    validate = pytest.importorskip("jsonschema", reason="needs jsonschema").validate
    invalid = pytest.importorskip("jsonschema").ValidationError
    file = tmp_path_factory.getbasetemp() / "row.jsonl"
    readers: dict[FormName, Any] = {
        "questions": read_examples,
        "labels": read_labels,
        "findings": read_findings,
    }
    for name, read in readers.items():
        try:
            read(write_lines(file, row))
            readable = True
        except DataError:
            readable = False
        try:
            validate(row, schema(name))
            valid = True
        except invalid:
            valid = False
        assert readable == valid, (name, row)


@given(st.lists(st.sampled_from(["a", "a-2", "a-2-2", "b"]), max_size=30))
def test_unique_ids(bases: list[str]) -> None:
    unique = UniqueIds()
    given_out = [unique(base) for base in bases]
    assert len(set(given_out)) == len(bases)
    assert all(one.startswith(base) for one, base in zip(given_out, bases, strict=True))
    if len(set(bases)) == len(bases):
        assert given_out == bases


def test_the_research_data(data_dir: Path) -> None:
    train = read_examples(data_dir / "vqa_train.jsonl", check_images=True)
    val = read_examples(data_dir / "vqa_val.jsonl", check_images=True)
    labels = read_labels(data_dir / "labels.jsonl", check_images=True)
    assert (len(train), len(val), len(labels)) == (7636, 1400, 2141)
    assert not {example.image for example in train} & {example.image for example in val}
    assert Counter(example.source for example in val) == {"slake": 1053, "vqa_rad": 347}
    assert {example.modality for example in train} == {"ct", "mri", "xray", None}
