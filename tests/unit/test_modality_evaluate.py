"""MedMoE's figures, against models whose answers are known and against scikit-learn."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command_line import Run
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from medmoe_edge._types import Floats
from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.evaluate import (
    Task,
    average_precision,
    best_prompts,
    evaluate_modality,
    fit_scores,
    mean_of,
    retrieval,
    routing,
    share_of,
    zero_shot_tasks,
)
from medmoe_edge.contrastive.features import entropy, evidence
from medmoe_edge.data.captions import GroundedPhrase, read_grounded
from medmoe_edge.data.datasets import LabelledImage
from medmoe_edge.errors import DataError
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.runtimes.contrastive import ImageFeatures, TextFeatures

CONFIG: ModalityConfig = MODALITY_PRESETS["modality-tiny"]
SIZE, GRID = CONFIG.size, 8
SEEN = {"round": 0, "flat": 1, "liver": 2, "ct": 3, "x-ray": 4}  # word -> direction


class Colours:
    """A stand-in model: an image's colour is its finding, its brightest quarter the liver."""

    name, config = "stand-in", CONFIG

    def encode_images(self, pixels: Floats) -> ImageFeatures:
        small = pixels.reshape(len(pixels), 3, GRID, 4, GRID, 4).mean((3, 5))  # [B, 3, h, w]
        regions = np.zeros((len(pixels), GRID, GRID, SIZE), np.float32)
        regions[..., 0], regions[..., 1], regions[..., 2] = small.transpose(1, 0, 2, 3) + 3
        logits = np.zeros((len(pixels), len(CONFIG.modalities)), np.float32)
        logits[:, CONFIG.modalities.index("ct")] = 5
        return ImageFeatures(regions, regions.mean((1, 2)), logits)

    def check_whole(self, texts: Sequence[str]) -> None:
        """Texts of any length."""

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        words = np.zeros((len(texts), 8, SIZE), np.float32)
        mask = np.zeros((len(texts), 8), np.bool_)
        for row, text in enumerate(texts):
            for at, word in enumerate(text.replace(",", "").split()):
                words[row, at, SEEN.get(word, 5)], mask[row, at] = 1, True
        return TextFeatures(words, words.sum(1) / mask.sum(1, keepdims=True), mask)


def picture(path: Path, finding: str, liver: tuple[int, int] | None = None) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[..., {"round": 0, "flat": 1}[finding]] = 150
    if liver:
        x, y = liver
        pixels[y : y + 8, x : x + 8, 2] = 255
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    labels, questions = [], []
    for number in range(8):
        finding = "round" if number < 4 else "flat"
        picture(folder / f"{number}.png", finding, (8, 16))
        common = {"image": f"{number}.png", "body": "head", "source": "slake"}
        labelled = common | {"finding": finding, "modality": "ct", "split": "val"}
        if number == 3:  # the one that the stand-in cannot get right
            labelled["finding"] = "flat"
        labels += [labelled, labelled | {"split": "train", "finding": "unused"}]
        asked = {"id": str(number), "answer": "Yes", "answer_type": "CLOSED", "modality": "xray"}
        questions.append(common | asked | {"question": f"Is there a {finding}?"})
    boxes = {
        "0.png": [{"label": "Liver", "xywh": [8, 16, 8.0, 8.0]}],
        "1.png": [{"label": "Liver", "xywh": [20, 2, 5, 5]}],
        "elsewhere.png": [{"label": "Liver", "xywh": [0, 0, 5, 5]}],
    }
    for name, rows in ("labels", labels), ("vqa_val", questions):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "slake_boxes.json").write_text(json.dumps(boxes))
    return folder


def engine() -> ModalityEngine:
    return ModalityEngine(Colours(), "stand-in", "0" * 64)


def test_a_model_whose_answers_are_known(data: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    found = evaluate_modality(engine(), data, lambda *step: heard.append(step))
    assert found.routing["labelled images"].overall.share == 1.0
    slake = found.routing["slake"]
    assert (slake.overall.share, slake.named) == (0.0, {"xray": {"ct": 8}})
    task = found.zero_shot.tasks["head ct"]
    assert {name: (s.right, s.count) for name, s in task.findings.items()} == {
        "flat": (4, 5),
        "round": (3, 3),
    }
    assert task.balanced == found.zero_shot.mean
    assert task.balanced.share == pytest.approx(0.9)
    assert task.balanced.interval[0] < 0.9 < task.balanced.interval[1] < 1
    assert found.text_for_image.candidates == 2
    assert found.text_for_image.recall[1].share == 1.0, "equal captions count"
    assert found.image_for_text.candidates == 8
    assert found.image_for_text.recall[1].count == 2
    places = found.localisation
    assert places.places == 2
    hit = places.model.hits
    assert (hit.right, hit.count) == (1, 2)
    assert places.model.phrases == {"liver": hit}
    assert places.centre.hits.right == 0
    assert places.model.precision > places.centre.precision
    assert heard[-1] == ("places", 2, 2)
    assert json.loads(json.dumps(found.to_json()))["notice"] == found.notice


def test_the_command(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(model: str, *, runtime: str) -> ModalityEngine:
        asked.append((model, runtime))
        return engine()

    monkeypatch.setattr("medmoe_edge.contrastive.engine.load_modality", load)
    command = ["eval", "modality-nano", "--data", str(data), "--runtime", "torch"]
    shown = run(*command)
    assert shown.exit_code == 0, shown.stderr
    for words in ("Modality of slake", "head ct", "90.0%", "text for an image", "liver"):
        assert words in shown.stdout
    found = json.loads(run(*command, "--json").stdout)
    assert found["zero_shot"]["mean"]["share"] == pytest.approx(0.9)
    assert asked == [("modality-nano", "torch")] * 2
    assert run(*command, "--labels", "labels.jsonl").exit_code == 2
    assert run(*command[:-1], "tensorrt").exit_code == 2


def test_images_that_are_compared_have_to_be_there(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "labels.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"image": "gone.png", "modality": "ct"}))
    assert evaluate_modality(engine(), tmp_path).zero_shot.mean.share == pytest.approx(0.9)
    (tmp_path / "7.png").unlink()
    heard: list[str] = []
    with pytest.raises(DataError, match=r"labels\.jsonl: the image .*7\.png does not exist \(1 "):
        evaluate_modality(engine(), tmp_path, lambda *step: heard.append(step[0]))
    assert not heard


def test_a_folder_without_boxes_is_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    with pytest.raises(DataError, match=r"boxes\.json"):
        evaluate_modality(engine(), tmp_path)
    (tmp_path / "slake_boxes.json").write_text("{}")
    with pytest.raises(DataError, match="boxes"):
        evaluate_modality(engine(), tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"0.png": 3}', '{"0.png": [{"label": "a"}]}', '{"0.png": [{"xywh": [0, 0, 1]}]}',
     '{"0.png": [{"label": "a", "xywh": [0, 0, 1, "1"]}]}', '{"0.png": [[]]}'],
)  # fmt: skip
def test_boxes_of_another_form_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(DataError, match=r"boxes\.json"):
        read_grounded(tmp_path / "boxes.json", [tmp_path / "0.png"])


# --- tasks ------------------------------------------------------------------------------------


def labelled(finding: str, modality: str = "xray", body: str = "chest") -> LabelledImage:
    return LabelledImage(Path("i"), modality, body, finding, "few", "val")


def test_a_task_is_the_findings_of_one_kind_of_image() -> None:
    images = [labelled("mass"), labelled("none", "ct"), labelled("clear"), labelled("mass")]
    (task,) = zero_shot_tasks(images)
    assert task.name == "chest x-ray", "a single finding is no task"
    assert task.findings == ("clear", "mass")
    assert task.texts == ["clear", "chest x-ray, clear", "mass", "chest x-ray, mass"]
    assert task.answers.tolist() == [1, 0, 1]


def test_a_finding_is_as_similar_as_its_best_prompt() -> None:
    task = Task("t", ("a", "b"), (("a", "x"), ("b", "y", "z")), ())
    similarities = np.array([[0.1, 0.4, 0.2, 0.0, 0.3], [0.5, 0.1, 0.0, 0.0, 0.9]], np.float32)
    np.testing.assert_array_equal(
        best_prompts(similarities, task), np.array([[0.4, 0.3], [0.5, 0.9]], np.float32)
    )


def test_routing_counts_what_was_named() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2]]
    found = routing(["a", "b", "b", "b", "c"], logits, ("a", "b", "c"))
    assert found.overall.right == 3
    assert found.named == {"a": {"a": 1}, "b": {"a": 1, "b": 1, "c": 1}, "c": {"c": 1}}
    assert found.modalities["b"].share == pytest.approx(1 / 3)


def test_retrieval_by_hand() -> None:
    similarities = np.array([[0.9, 0.1, 0.5], [0.9, 0.2, 0.1], [0.3, 0.2, 0.1]], np.float32)
    belongs = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    recall = retrieval(similarities, belongs).recall
    assert [recall[k].right for k in (1, 5, 10)] == [1, 3, 3]
    belongs[2, 0] = True
    assert retrieval(similarities, belongs).recall[1].right == 2


# --- numbers ----------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_interval_of_a_share_is_wilsons(right: int, wrong: int) -> None:
    """Its ends are the shares from which what was seen is 1.96 standard errors away."""
    assume(right + wrong)
    found = share_of([True] * right + [False] * wrong)
    assert (found.count, found.right) == (right + wrong, right)
    for end in found.interval:
        error = (end * (1 - end) / found.count) ** 0.5
        assert abs(found.share - end) == pytest.approx(1.959964 * error, abs=1e-7)
    assert 0 <= found.interval[0] <= found.share <= found.interval[1] <= 1


def test_classes_and_tasks_weigh_the_same() -> None:
    many, few = share_of([True] * 90 + [False] * 10), share_of([True, False])
    mean = mean_of([many, few])
    assert mean.share == pytest.approx(0.7)
    assert mean_of([few]).interval == pytest.approx(few.interval)
    for end in (0, 1):
        widths = [each.share - each.interval[end] for each in (many, few)]
        assert abs(mean.share - mean.interval[end]) == pytest.approx(math.hypot(*widths) / 2)
    assert mean_of([mean] * 4).interval[1] - 0.7 == pytest.approx((mean.interval[1] - 0.7) / 2)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_average_precision_by_its_definition(pixels: list[tuple[int, bool]]) -> None:
    """The area under precision over recall, one step for each threshold."""
    scores, mask = (np.array(column) for column in zip(*pixels, strict=True))
    expected, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall = mask[chosen].sum() / max(mask.sum(), 1)
        expected += (recall - before) * mask[chosen].mean()
        before = recall
    assert average_precision(scores.astype(np.float32), mask) == pytest.approx(expected)


def test_a_place_holds_what_its_mask_covers() -> None:
    boxed = GroundedPhrase(Path("i"), "liver", ((1.0, 2.0, 2.0, 1.0), (0.0, 0.0, 1.0, 1.0)))
    mask = boxed.mask(4, 5)
    assert sorted(zip(*np.nonzero(mask), strict=True)) == [(0, 0), (2, 1), (2, 2)]
    held = [[boxed.holds(x + 0.5, y + 0.5) for x in range(5)] for y in range(4)]
    np.testing.assert_array_equal(mask, held)


def test_entropy_goes_from_none_to_all_and_evidence_with_the_logits() -> None:
    logits = np.array([[1e4, 0, 0], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(entropy(logits), [0, np.log(3)], atol=1e-12)
    np.testing.assert_allclose(evidence(logits), [1e4, np.log(3)], atol=1e-12)
    np.testing.assert_allclose(evidence(logits - 5), evidence(logits) - 5)
    np.testing.assert_allclose(entropy(logits - 5), entropy(logits))


def test_scores_are_the_most_likely(data: Path) -> None:
    """Found again by a search over the temperature alone, finer than the grid."""
    optimise = pytest.importorskip("scipy.optimize")
    images = [
        LabelledImage(data / f"{n}.png", "ct", "head", "round" if n < 3 else "flat", "few", "val")
        for n in range(8)
    ]
    scores = fit_scores(Colours(), images)
    (task,) = zero_shot_tasks(images)
    runtime = engine()
    found = [runtime.classify(i.image, task.texts).similarities for i in images]
    best = np.array([[max(f[p] for p in prompts) for prompts in task.prompts] for f in found])

    def loss(temperature: float) -> float:
        logits = temperature * best
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return float(-np.log(shares[np.arange(8), task.answers]).mean())

    exact = optimise.minimize_scalar(loss, bounds=(1, 200), method="bounded")
    assert 2 < exact.x < 190
    assert scores.temperature == pytest.approx(exact.x, rel=0.02)
    logits = np.array([5.0 if name == "ct" else 0.0 for name in CONFIG.modalities])
    shares = np.exp(logits) / np.exp(logits).sum()
    assert scores.entropy_limit == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-5)
    assert scores.evidence_limit == pytest.approx(np.log(np.exp(logits).sum()), rel=1e-5)


def test_scores_need_two_findings(data: Path) -> None:
    one = LabelledImage(data / "0.png", "ct", "head", "round", "few", "val")
    with pytest.raises(DataError):
        fit_scores(Colours(), [one, one])
