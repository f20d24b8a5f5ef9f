"""MedMoE's model that ships inside: that it is what its card says, and finds its way."""

from pathlib import Path

import numpy as np
import pytest

from medmoe_edge.bundle.bundle import NOTICE, ModalityBundle
from medmoe_edge.checkpoint.contrastive import modality_sha256, read_modality_checkpoint
from medmoe_edge.contrastive.engine import ModalityEngine, load_modality
from medmoe_edge.data.captions import fact_captions
from medmoe_edge.data.datasets import read_examples, read_labels
from medmoe_edge.embedded import FOLDER, bundle_path, checkpoint_path

SCAN = Path(__file__).parents[2] / "scan.png"
PHOTOGRAPHS = (  # of scikit-image: people, animals, things, a text
    *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "color.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "motorcycle_left.png", "page.png"),
    *("rocket.jpg", "text.png"),
)


@pytest.fixture(scope="module")
def engine() -> ModalityEngine:
    return load_modality("modality-nano")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_it_is_small() -> None:
    assert size(bundle_path("modality-nano")) <= 25e6
    assert size(checkpoint_path("modality-nano")) <= 45e6


def test_no_embedded_file_is_too_large_for_where_the_code_is_kept() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert "model-00001-of-00002.safetensors" in sizes
    assert [name for name, size in sizes.items() if size > 25e6] == []


def test_the_bundle_is_made_from_the_checkpoint_and_verified(engine: ModalityEngine) -> None:
    folder = checkpoint_path("modality-nano")
    bundle = ModalityBundle.open(bundle_path("modality-nano"))
    checkpoint = read_modality_checkpoint(folder)
    assert bundle.config == checkpoint.config
    assert bundle.manifest["source"]["checkpoint_sha256"] == modality_sha256(folder)
    assert engine.verification == "passed"
    assert "research use only" in bundle.manifest["licence"]
    cards = [path / "README.md" for path in (bundle.folder, folder)]
    assert cards[0].read_bytes() == cards[1].read_bytes()


def test_the_scan_is_an_xray_of_a_chest(engine: ModalityEngine) -> None:
    labels = ["chest X-Ray", "brain MRI", "abdomen CT", "eye Fundus"]
    found, again = (engine.classify(SCAN, labels).to_json() for _ in range(2))
    for each in (found, again):
        each.pop("timings")
        each["reading"].pop("timings")
    assert found == again
    assert next(iter(found["scores"])) == "chest X-Ray"
    assert found["reading"]["modality"] == "xray"
    assert found["reading"]["unfamiliar"] is False
    assert found["notice"] == NOTICE


def test_photographs_are_less_familiar_than_scans(engine: ModalityEngine, data_dir: Path) -> None:
    skimage = pytest.importorskip("skimage", reason="needs scikit-image's photographs")
    folder = Path(skimage.__file__).parent / "data"
    strange = [engine.read(folder / name).unfamiliar for name in PHOTOGRAPHS]
    scans = [item for item in read_labels(data_dir / "labels.jsonl") if item.split != "train"]
    known = [engine.read(item.image).unfamiliar for item in scans[::8]]
    assert np.mean(known) < 0.05
    assert np.mean(strange) > 0.35


def test_it_routes_as_its_card_says(engine: ModalityEngine, data_dir: Path) -> None:
    captioned = fact_captions(read_examples(data_dir / "vqa_val.jsonl"))
    slake = [item for item in captioned if item.source == "slake"][:48]
    right = [engine.read(item.image).modality == item.modality for item in slake]
    assert len(right) == 48
    assert np.mean(right) > 0.95
