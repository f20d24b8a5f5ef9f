"""The model that ships inside: that it is what its card says, and answers."""

import os
from pathlib import Path

import numpy as np
import pytest
from command_line import start

import medmoe_edge
from medmoe_edge.bundle.bundle import NOTICE, Bundle
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.data.datasets import read_examples
from medmoe_edge.embedded import bundle_path, checkpoint_path
from medmoe_edge.evaluation.evaluate import evaluate
from medmoe_edge.evaluation.inspection import inspect_model
from medmoe_edge.export.build import BuildOptions, export_bundle
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image

ROOT = Path(__file__).parents[2]
SCAN = ROOT / "scan.png"
QUESTIONS = (
    "Is there effusion?",
    "What modality is used to take this image?",
    "Which part of the body does this image belong to?",
    "Is the heart enlarged?",
    "What organ system is pictured?",
    "Is this a study of the head?",
    "Does the lung look abnormal?",
    "Where is the heart in this image?",
    "What color does the right lung show in the picture?",
    "Which is bigger in this image, heart or right lung?",
)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_it_is_small() -> None:
    assert size(bundle_path("nano")) <= 25e6
    assert size(checkpoint_path("nano")) <= 45e6
    parameters = inspect_model(checkpoint_path("nano")).parameters_total
    assert parameters is not None
    assert parameters <= 22e6


def test_the_bundle_is_made_from_the_checkpoint() -> None:
    checkpoint, bundle = read_checkpoint(checkpoint_path("nano")), Bundle.open(bundle_path("nano"))
    assert bundle.config == checkpoint.config
    assert bundle.manifest["source"]["checkpoint_sha256"] == checkpoint.sha256()
    assert "research use only" in bundle.manifest["licence"]
    cards = [folder / "README.md" for folder in (bundle.folder, checkpoint.folder)]
    assert cards[0].read_bytes() == cards[1].read_bytes()


def test_asked_twice_it_answers_the_same_bytes() -> None:
    first, again = (medmoe_edge.load("nano").ask(SCAN, QUESTIONS[0]).to_json() for _ in range(2))
    timings = [answer.pop("timings") for answer in (first, again)]
    assert first == again
    assert first["answer"] in ("Yes", "No")
    assert first["modality"] == "xray"
    assert max(first["experts"], key=lambda name: first["experts"][name]) == "xray"
    assert first["notice"] == NOTICE
    assert all(timing["first_token"] <= timing["total"] for timing in timings)


def test_asking_tells_nobody(tmp_path: Path) -> None:
    """ONNX Runtime keeps what it would tell Microsoft in the user's cache, unless it may not."""
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    environment |= dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), str(tmp_path))
    result = start("ask", str(SCAN), "Is there effusion?", environment=environment)
    assert result.returncode == 0, result.stderr
    assert [path for path in tmp_path.rglob("*") if "medmoe" not in str(path)] == []


def test_the_fp32_bundle_answers_as_torch_does(tmp_path: Path) -> None:
    export_bundle(checkpoint_path("nano"), tmp_path / "fp32", BuildOptions(precision="fp32"))
    ours, reference = medmoe_edge.load(tmp_path / "fp32"), medmoe_edge.load("nano", runtime="torch")
    pixels = load_image(SCAN).pixels
    views = [pixels, pixels[:, ::-1], pixels[::-1], pixels[:256], np.rot90(pixels)]
    for view in views:
        image = Image.from_array(np.ascontiguousarray(view))
        answers, expected = (engine.ask_all(image, QUESTIONS) for engine in (ours, reference))
        assert [answer.text for answer in answers] == [answer.text for answer in expected]
        for answer, other in zip(answers, expected, strict=True):
            assert answer.confidence == pytest.approx(other.confidence, rel=1e-3)
            assert answer.experts == other.experts


def test_it_is_as_good_as_its_card_says(data_dir: Path) -> None:
    examples = read_examples(data_dir / "vqa_val.jsonl")
    chosen = sorted({example.image for example in examples})[:40]
    result = evaluate(medmoe_edge.load("nano"), [e for e in examples if e.image in chosen])
    slake = result.by_source["slake"].overall
    assert slake.n > 300
    assert slake.exact_match > 0.75  # all 96 images: 0.82
    assert result.router.accuracy is not None
    assert result.router.accuracy > 0.98
