"""Both families of models behind one interface."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.errors import DataError, ImageError, InputError
from medmoe_edge.families import (
    FAMILIES,
    ContrastiveFamily,
    MedMoEFamily,
    family_of,
)
from medmoe_edge.pipeline import EvaluateOptions, ExportOptions, VerifyOptions

CONTRASTIVE = FAMILIES["modality-moe"]


def silent(step: str, done: int, total: int) -> None:
    pass


def test_a_model_is_of_the_family_that_it_says() -> None:
    for model in ("nano", bundle_path("nano"), checkpoint_path("nano"), "no such folder"):
        assert isinstance(family_of(model), MedMoEFamily)
    for model in ("modality-nano", bundle_path("modality-nano"), checkpoint_path("modality-nano")):
        assert isinstance(family_of(model), ContrastiveFamily)


@pytest.mark.parametrize("model", ["nano", "modality-nano"])
def test_either_family_verifies_and_inspects(model: str) -> None:
    family, folder = family_of(model), bundle_path(model)
    assert family.verify(folder, VerifyOptions(), silent).faults == []
    found = family.inspect(folder, None)
    assert found.kind == "bundle"
    assert found.verification in ("passed", "not decided")  # nano: by too few questions


@pytest.mark.parametrize(
    ("options", "target", "what"),
    [
        ({"group": 64}, "onnxruntime", "--group-size does not go with"),
        ({"vision": "tokens"}, "onnxruntime", "--vision does not go with"),
        ({"stats": Path("s")}, "onnxruntime", "--stats does not go with"),
        ({"vision_tower": Path("t")}, "onnxruntime", "--vision-tower does not go with"),
        ({}, "tensorrt", "--target does not go with"),
        ({"precision": "int4"}, "onnxruntime", "is not exported in int4"),
    ],
)
def test_what_a_contrastive_model_is_not_exported_with(
    options: dict[str, Any], target: str, what: str
) -> None:
    with pytest.raises(InputError, match=what):
        CONTRASTIVE.check_export(ExportOptions(**options), target)
    FAMILIES["med-moe"].check_export(ExportOptions(**options), target)
    CONTRASTIVE.check_export(ExportOptions(precision="fp32"), "onnxruntime")


def test_what_a_contrastive_model_is_not_measured_with() -> None:
    folder = bundle_path("modality-nano")
    with pytest.raises(InputError, match="--beside does not go with"):
        CONTRASTIVE.verify(folder, VerifyOptions(Path("checkpoint"), beside=["other"]), silent)
    for options, what in (
        (EvaluateOptions(Path("data"), labels=Path("labels.jsonl")), "--labels does not go with"),
        (EvaluateOptions(Path("data"), runtime="tensorrt"), "does not run on tensorrt"),
    ):
        with pytest.raises(InputError, match=what):
            CONTRASTIVE.evaluate("modality-nano", options, silent)


def asked_and_labelled(folder: Path, split: str) -> tuple[Path, Path]:
    """A question about a picture, and a label of one that is damaged."""
    picture = {"image": "1.png", "modality": "ct"}
    Pillow.new("L", (64, 64), 90).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"no picture")
    questions, labels = folder / "q.jsonl", folder / "l.jsonl"
    questions.write_text(json.dumps(picture | {"question": "Is it?", "answer": "No"}))
    labels.write_text(json.dumps(picture | {"image": "2.png", "split": split}))
    return questions, labels


def test_labels_without_a_held_out_image_are_refused_at_once(tmp_path: Path) -> None:
    questions, labels = asked_and_labelled(tmp_path, "train")
    with pytest.raises(DataError, match=r"l\.jsonl holds no image to validate or to test on"):
        FAMILIES["med-moe"].evaluate("no such folder", EvaluateOptions(questions, labels), silent)


def test_images_that_are_asked_about_have_to_be_there(tmp_path: Path) -> None:
    """Others may be absent: those to train on, and questions beyond the limit."""
    questions, labels = asked_and_labelled(tmp_path, "train")
    question, absent = json.loads(questions.read_text()), {"image": "0.png", "modality": "ct"}
    rows = [question, question | absent]
    questions.write_text("\n".join(map(json.dumps, rows)))
    labels.write_text("\n".join(map(json.dumps, (absent, question | {"split": "val"}))))

    def scored(limit: int | None, findings: Path | None = None) -> Any:
        options = EvaluateOptions(
            questions, labels, limit=limit, seed=1, findings=findings, max_new_tokens=2
        )
        return FAMILIES["med-moe"].evaluate("nano", options, silent)

    found = scored(1)
    assert len(found.questions.predictions) == 1
    with pytest.raises(DataError, match=r"q\.jsonl: the image .*0\.png does not exist"):
        scored(None)
    findings = tmp_path / "f.jsonl"
    findings.write_text(json.dumps(absent | {"findings": ["nodule"], "split": "test"}))
    with pytest.raises(DataError, match=r"f\.jsonl: the image .*0\.png does not exist"):
        scored(1, findings)
    labels.write_text(json.dumps(absent | {"split": "val"}))
    with pytest.raises(DataError, match=r"l\.jsonl: the image .*0\.png does not exist"):
        FAMILIES["med-moe"].evaluate("no such folder", EvaluateOptions(None, labels), silent)


def test_answers_are_saved_before_anything_else_is_done(tmp_path: Path) -> None:
    questions, labels = asked_and_labelled(tmp_path, "test")
    options = EvaluateOptions(questions, labels, tmp_path / "answers.jsonl", max_new_tokens=2)
    with pytest.raises(ImageError):
        FAMILIES["med-moe"].evaluate("nano", options, silent)
    (answer,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["question"] == "Is it?"
