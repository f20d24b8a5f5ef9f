"""MedMoE asked: labels, places, and what it refuses; and that a heat map lies over its picture."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modality_models import TINY, tiny_model, write_tiny
from torch.nn.functional import interpolate

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.config_contrastive import Scores
from medmoe_edge.contrastive.engine import ModalityEngine, load_modality
from medmoe_edge.contrastive.features import TextCache
from medmoe_edge.engine.loading import Proven
from medmoe_edge.errors import CheckpointError, ConfigError, InputError, ModelError
from medmoe_edge.evaluation.inspection import inspect_modality
from medmoe_edge.image.pixels import Image
from medmoe_edge.models.contrastive import similarity
from medmoe_edge.pipeline import ExportOptions
from medmoe_edge.pipeline.contrastive import export_modality
from medmoe_edge.runtimes.contrastive import ImageFeatures, TextFeatures

LABELS = ["effusion", "no finding", "a mass"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scores = {"temperature": 20.0, "entropy_limit": 0.7}
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny", scores=scores)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> ModalityEngine:
    return load_modality(checkpoint)


def picture(height: int = 40, width: int = 56, seed: int = 0) -> Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.from_array(values)


class Fixed:
    """A runtime whose features are given; every text is one word of ones."""

    name, config = "fixed", TINY

    def __init__(self, regions: Any = None, logits: Sequence[float] = (9, 0, 0, 0, 0, 0)) -> None:
        self.regions = np.ones((8, 8, 16), np.float32) if regions is None else regions
        self.logits = np.array([logits], np.float32)
        self.encoded: list[list[str]] = []

    def encode_images(self, pixels: Any) -> ImageFeatures:
        regions = self.regions[None]
        return ImageFeatures(regions, regions.mean((1, 2)), self.logits)

    def check_whole(self, texts: Sequence[str]) -> None:
        """Texts of any length."""

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        self.encoded.append(list(texts))
        ones = np.ones((len(texts), 1, 16), np.float32)
        return TextFeatures(ones, ones[:, 0], np.ones((len(texts), 1), np.bool_))


def fixed(*arguments: Any, **options: Any) -> ModalityEngine:
    return ModalityEngine(Fixed(*arguments), "fixed", "0" * 64, **options)


def test_every_result_of_a_bundle_that_failed_its_verification_says_so() -> None:
    own = Scores(temperature=20.0)
    engine = fixed(proven=Proven("failed", None, here=False), scores=own)
    asked = picture()
    results = engine.read(asked), engine.classify(asked, LABELS), engine.locate(asked, "a mass")
    for found in results:
        assert [notice.code for notice in found.warnings] == ["verification_failed"]
    passed = fixed(proven=Proven("passed", None, here=True), scores=own)
    assert passed.read(asked).warnings == ()


# --- classify ---------------------------------------------------------------------------------


def test_labels_are_scored_by_the_softmax_of_their_similarities(engine: ModalityEngine) -> None:
    from medmoe_edge.contrastive.text import ModalityTokenizer
    from medmoe_edge.image.loading import preprocess

    found = engine.classify(picture(), LABELS)
    model = tiny_model()
    reader = engine.runtime._reader  # type: ignore[attr-defined]
    assert isinstance(reader, ModalityTokenizer)
    with torch.inference_mode():
        image = model.encode_image(torch.from_numpy(preprocess(picture(), TINY.vision)))
        text = model.encode_text(*map(torch.from_numpy, reader.encode(LABELS)))
        expected = similarity(image, text)[0]
    scores = (20.0 * expected).softmax(-1)
    for label, score, fit in zip(LABELS, scores.tolist(), expected.tolist(), strict=True):
        assert found.scores[label] == pytest.approx(score, abs=1e-4)
        assert found.similarities[label] == pytest.approx(fit, abs=1e-5)
    assert list(found.scores.values()) == sorted(found.scores.values(), reverse=True)
    assert list(found.scores) == list(found.similarities)
    assert sum(found.scores.values()) == pytest.approx(1)


def test_a_label_is_as_similar_as_its_best_prompt(engine: ModalityEngine) -> None:
    prompts = ["fluid in the chest", "effusion", "wet lung"]
    each = engine.classify(picture(), prompts).similarities
    found = engine.classify(picture(), ["effusion", "mass"], prompts={"effusion": prompts})
    assert found.similarities["effusion"] == pytest.approx(max(each.values()), abs=1e-6)
    alone = engine.classify(picture(), ["mass"])
    assert found.similarities["mass"] == pytest.approx(alone.similarities["mass"], abs=1e-6)


def test_a_text_that_would_be_cut_is_refused(engine: ModalityEngine) -> None:
    """Both would be read alike: what tells them apart stands at the end."""
    long = "a " * (TINY.text.max_pieces - 3)
    engine.classify(picture(), [f"{long} b", "effusion"])
    asked: list[Callable[[], object]] = [
        lambda: engine.classify(picture(), [f"{long} b c", f"{long} b"]),
        lambda: engine.locate(picture(), f"{long} b c"),
        lambda: engine.embed_text(f"{long} b c"),
        lambda: engine.embed_text("a" + " " * 10_000 + "b"),
    ]
    for ask in asked:
        with pytest.raises(InputError, match="more than the 23 word pieces"):
            ask()


def test_labels_given_twice_or_with_spaces_count_once(engine: ModalityEngine) -> None:
    found = engine.classify(picture(), ["mass", " mass ", "effusion", "mass"])
    assert set(found.scores) == {"mass", "effusion"}
    assert found.scores == engine.classify(picture(), ["mass", "effusion"]).scores


def test_one_label_scores_one_and_says_how_similar_it_is(engine: ModalityEngine) -> None:
    found = engine.classify(picture(), ["mass"])
    assert found.scores == {"mass": 1.0}
    assert -1 <= found.similarities["mass"] < 1


@pytest.mark.parametrize(
    ("labels", "prompts", "match"),
    [
        ([], {}, "no labels"),
        (["mass", " "], {}, "empty"),
        (["mass"], {"effusion": ["fluid"]}, "'effusion', which is no label"),
        (["mass"], {"mass": []}, "empty list"),
        (["mass"], {"mass": [""]}, "empty"),
        (["mass", "胸水"], {}, "no word"),
        (["mass", "?!"], {}, "no word"),
        (["mass", "\udcff"], {}, "Unicode"),
        (["mass"], {"mass": "lump"}, "prompts of 'mass' cannot be str"),
        (["mass", 5], {}, "A text cannot be int"),
        (5, {}, "labels cannot be int"),
        (["mass"], 5, "prompts cannot be int"),
    ],
)
def test_unusable_labels_are_refused(
    engine: ModalityEngine, labels: list[str], prompts: dict[str, list[str]], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        engine.classify(picture(), labels, prompts=prompts)


def test_a_result_stands_where_the_engine_is_closed_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = ModalityEngine(Fixed(), "fixed", "0" * 64)
    reading = engine._reading

    def closed_first(*given: Any) -> Any:  # as by another thread
        engine.close()
        return reading(*given)

    monkeypatch.setattr(engine, "_reading", closed_first)
    assert engine.classify(picture(), LABELS).model["runtime"] == "fixed"


def test_a_thousand_labels_are_encoded_in_parts_and_once() -> None:
    runtime = Fixed()
    engine = ModalityEngine(runtime, "fixed", "0" * 64)
    labels = [f"label {number}" for number in range(1000)]
    found = engine.classify(picture(), labels)
    assert found.scores == pytest.approx(dict.fromkeys(labels, 0.001), rel=1e-4)
    assert max(map(len, runtime.encoded)) <= 64
    assert sorted(text for part in runtime.encoded for text in part) == sorted(labels)
    engine.classify(picture(), labels[::-1])
    assert sum(map(len, runtime.encoded)) == 1000
    with pytest.raises(InputError, match="at most 10,000"):
        engine.classify(picture(), [str(number) for number in range(10_001)])


def test_texts_come_back_in_order_and_those_used_last_are_kept(
    engine: ModalityEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmoe_edge.contrastive.features.KEPT", 2)
    cache, texts = TextCache(engine.runtime), ["a long phrase", "mass", "a", "mass"]
    found, expected = cache.encode(texts), engine.runtime.encode_texts(texts)
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=1e-5, atol=1e-5)
    for row in range(len(texts)):
        kept = found.words[row][found.mask[row]]
        np.testing.assert_allclose(
            kept, expected.words[row][expected.mask[row]], rtol=1e-5, atol=1e-5
        )
    assert list(cache._kept) == ["mass", "a"]


# --- the router -------------------------------------------------------------------------------


def test_scores_that_were_lost_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the checkpoint, its export and the bundle; of those that were fitted nothing is said."""
    checkpoint, bundle = write_tiny(tmp_path / "tiny"), tmp_path / "bundle"
    export_modality(checkpoint, bundle, ExportOptions("fp32"))
    assert "scores.json" in caplog.text
    for folder in checkpoint, bundle:
        inspected = inspect_modality(folder).to_json()["warnings"]
        assert [notice["code"] for notice in inspected] == ["scores_not_fitted"]
        lost = load_modality(folder)
        for answer in (
            lost.read(picture()),
            lost.classify(picture(), LABELS),
            lost.locate(picture(), LABELS[0]),
        ):
            assert [notice.code for notice in answer.warnings] == ["scores_not_fitted"]
    scores = {"temperature": 20.0, "entropy_limit": 0.7}
    fitted = load_modality(write_tiny(tmp_path / "fitted", scores=scores))
    assert fitted.read(picture()).warnings == ()


def test_a_reading_is_the_softmax_of_the_router() -> None:
    found = fixed(None, (0, np.log(3), 0, 0, 0, 0)).read(picture())
    assert found.modality == "ct"
    assert found.probabilities["ct"] == pytest.approx(3 / 8)
    assert next(iter(found.probabilities)) == "ct"
    entropy = -(3 / 8 * np.log(3 / 8) + 5 * (1 / 8) * np.log(1 / 8))
    assert found.entropy == pytest.approx(entropy, rel=1e-5)


def test_an_image_is_unfamiliar_above_the_entropy_limit() -> None:
    limits = Scores(entropy_limit=1.5)
    sure, unsure = (9.0, 0, 0, 0, 0, 0), (0.0,) * 6  # log 6 = 1.79 nats
    assert not fixed(None, sure, scores=limits).read(picture()).unfamiliar
    assert fixed(None, unsure, scores=limits).read(picture()).unfamiliar
    assert not fixed(None, unsure, scores=Scores(entropy_limit=1.8)).read(picture()).unfamiliar


def test_an_image_is_unfamiliar_below_the_evidence_limit() -> None:
    limits = Scores(evidence_limit=5.0)
    for logits, unfamiliar in (((9.0, 0, 0, 0, 0, 0), False), ((3.0, -6, -6, -6, -6, -6), True)):
        found = fixed(None, logits, scores=limits).read(picture())
        assert found.entropy < 0.01, "it is as sure of both"
        assert found.unfamiliar is unfamiliar


# --- locate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (40, 56), (57, 20), (5, 300), (1, 1)])
def test_the_heat_lies_over_the_picture_and_not_its_padding(shape: tuple[int, int]) -> None:
    """Against torch: the map is enlarged to the padded square, from which the picture is cut."""
    height, width = shape
    side = max(shape)
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(8, 8, generator=generator) * 2 - 1
    regions = torch.zeros(8, 8, 16)
    regions[..., 0], regions[..., 1] = cosines, (1 - cosines**2).sqrt()
    engine = fixed(regions.numpy())
    axis = np.zeros((1, 1, 16), np.float32)
    axis[..., 0] = 1
    engine.runtime.encode_texts = lambda texts: TextFeatures(  # type: ignore[method-assign]
        axis, axis[:, 0], np.ones((1, 1), np.bool_)
    )
    found = engine.locate(picture(height, width), "liver")
    square = interpolate(cosines[None, None], (side, side), mode="bilinear", align_corners=False)
    top, left = (side - height) // 2, (side - width) // 2
    expected = square[0, 0, top : top + height, left : left + width].numpy()
    if side >= 8:  # torch takes no means where it shrinks, nor does it here
        np.testing.assert_allclose(found.heat, expected, atol=1e-5)
    assert found.heat.shape == shape
    x, y = found.peak
    assert found.heat[y, x] == found.heat.max()


def test_a_bright_place_is_where_the_picture_has_it() -> None:
    """A wide picture: the hot cell of the square's grid is found again in its pixels."""
    regions = np.full((8, 8, 16), -1, np.float32)
    regions[4, 6] = 1  # rows 4/8 to 5/8 and columns 6/8 to 7/8 of the square
    found = fixed(regions).locate(picture(100, 200), "liver")
    x, y = found.peak
    assert 150 <= x < 175
    assert 50 <= y < 75  # of 100: the square's 100 to 125, less the padding of 50 above


@settings(max_examples=40)
@given(height=st.integers(1, 90), width=st.integers(1, 90))
def test_heat_never_leaves_the_range_of_its_map(height: int, width: int) -> None:
    regions = np.random.default_rng(0).standard_normal((8, 8, 16), np.float32)
    found = fixed(regions).locate(picture(height, width), "liver")
    assert found.heat.shape == (height, width)
    assert found.heat.dtype == np.float32
    assert np.abs(found.heat).max() <= 1 + 1e-6


def test_an_empty_phrase_is_refused(engine: ModalityEngine) -> None:
    with pytest.raises(InputError, match="empty"):
        engine.locate(picture(), "  ")


# --- results and loading ----------------------------------------------------------------------


def test_results_say_what_made_them(engine: ModalityEngine, checkpoint: Path) -> None:
    results = {
        "read": engine.read(picture()).to_json(),
        "classify": engine.classify(picture(), LABELS).to_json(),
        "locate": engine.locate(picture(), "liver").to_json(),
    }
    for values in results.values():
        assert values["notice"] == NOTICE
        assert values["model"]["name"] == "tiny"
        assert values["model"]["verification"] == "reference"
        assert values["model"]["runtime"] == "torch"
        assert len(values["model"]["sha256"]) == 64
        timings = dict(values["timings"])
        assert timings.pop("total") == pytest.approx(sum(timings.values()))
        json.dumps(values, allow_nan=False)
    assert results["locate"]["size"] == [56, 40]
    assert results["classify"]["reading"]["modality"] in TINY.modalities


def test_embeddings_are_unit_vectors_of_one_space(engine: ModalityEngine) -> None:
    image, text = engine.embed_image(picture()), engine.embed_text("effusion")
    assert image.shape == text.shape == (TINY.size,)
    assert np.linalg.norm(image) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(text) == pytest.approx(1, abs=1e-5)


def test_a_batch_gives_what_each_image_gives_alone(engine: ModalityEngine) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    together = engine.embed_images(pixels)
    for row in range(3):
        for part, alone in zip(together, engine.embed_images(pixels[row : row + 1]), strict=True):
            np.testing.assert_allclose(part[row], alone[0], atol=1e-5)


def test_scores_are_the_checkpoints(engine: ModalityEngine, tmp_path: Path) -> None:
    assert engine.scores == Scores(20.0, 0.7)
    plain = write_tiny(tmp_path / "plain")
    assert load_modality(plain).scores == Scores()
    assert load_modality(plain).sha256 != engine.sha256
    for bad in ('{"temperature": 0}', '{"heat": 1}', "{", '{"temperature": NaN}'):
        (plain / "scores.json").write_text(bad)
        with pytest.raises(ConfigError):
            load_modality(plain)


def test_a_model_that_diverged_says_so() -> None:
    engine = fixed(np.full((8, 8, 16), np.nan, np.float32))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        engine.classify(picture(), LABELS)


def test_other_models_are_refused(tiny_checkpoint: Any, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no bundle or checkpoint of a modality-moe"):
        load_modality(tiny_checkpoint())
    with pytest.raises(ModelError, match="is a checkpoint"):
        load_modality(checkpoint, runtime="onnxruntime")
    with pytest.raises(ModelError, match="no model folder"):
        load_modality(tmp_path / "nothing")
