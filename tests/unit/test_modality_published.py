"""MedMoE as its authors' repository computes it, against plain PyTorch after that repository.

Swin and BERT are transformers' own; router, experts and texts are written here with the
repository's modules and names, so that what is saved is what its Lightning checkpoint holds.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from modality_models import TINY, letters, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, cosine_similarity, interpolate
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from medmoe_edge.checkpoint.contrastive import published_name, read_modality_checkpoint
from medmoe_edge.contrastive.engine import load_modality
from medmoe_edge.contrastive.features import similarity
from medmoe_edge.errors import CheckpointError, InputError
from medmoe_edge.evaluation.contrastive import Pictures, verify_modality
from medmoe_edge.families import MedMoEFamily
from medmoe_edge.image.loading import preprocess
from medmoe_edge.image.pixels import Image
from medmoe_edge.pipeline import ExportOptions
from medmoe_edge.pipeline.contrastive import export_modality

TEXTS = ["a b c", "effusion, left", "hi"]
NEAR = 1e-5
CONFIG = dataclasses.replace(TINY, modalities=("ct", "mri", "xray"))


class Expert(nn.Module):
    def __init__(self, channels: list[int], size: int) -> None:
        super().__init__()
        self.proj_convs = nn.ModuleList(
            nn.Sequential(nn.Conv1d(channel, size, 1), nn.ReLU()) for channel in channels
        )
        self.attn_proj = nn.Sequential(
            nn.Linear(size, size // 2), nn.ReLU(), nn.Linear(size // 2, 1)
        )

    def forward(self, scales: list[Tensor]) -> Tensor:
        longest = max(scale.shape[1] for scale in scales)
        parts = [
            interpolate(conv(scale.transpose(1, 2)), longest, mode="linear").transpose(1, 2)
            for conv, scale in zip(self.proj_convs, scales, strict=True)
        ]
        together = torch.stack(parts, 2)  # [B, P, scales, D]
        fused: Tensor = (together * self.attn_proj(together).softmax(2)).sum(2)
        return fused


class Experts(nn.Module):
    def __init__(self, channels: list[int], size: int, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(channels, size) for _ in range(count))
        self.router = nn.Sequential(nn.Linear(channels[-1], 128), nn.ReLU(), nn.Linear(128, count))


class Reference(nn.Module):
    """`image_encoder.model.{model,moe}` and `text_encoder.model`, as the repository calls them."""

    def __init__(self) -> None:
        super().__init__()
        vision, text = CONFIG.vision, CONFIG.text
        self.image_encoder: Any = nn.Module()
        self.text_encoder: Any = nn.Module()
        inner = self.image_encoder.model = nn.Module()
        inner.model = SwinModel(
            SwinConfig(
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                embed_dim=vision.embed_size,
                depths=list(vision.depths),
                num_heads=list(vision.heads),
                window_size=vision.window_size,
            )
        )
        inner.moe = Experts(list(vision.channels), text.hidden_size, len(CONFIG.modalities))
        self.image_encoder.global_embedder = nn.Linear(3, 5)
        self.text_encoder.model = BertModel(
            BertConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                intermediate_size=text.intermediate_size,
                max_position_embeddings=text.max_positions,
            )
        )
        torch.manual_seed(2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.eval()

    @torch.no_grad()
    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Regions `[B, D, 16, 16]`, the image's own vector, the router's probabilities."""
        inner = self.image_encoder.model
        out = inner.model(pixels, output_hidden_states=True)
        pooled = out.last_hidden_state.mean(1)
        shares = inner.moe.router(pooled).softmax(-1)
        scales = list(out.hidden_states[: len(CONFIG.vision.depths)])
        parts = torch.stack([expert(scales) for expert in inner.moe.experts], 1)
        mixed = (parts * shares[..., None, None]).sum(1)  # [B, P, D]
        regions = adaptive_avg_pool1d(mixed.transpose(1, 2), 256)
        return regions.view(len(regions), -1, 16, 16), pooled, shares

    @torch.no_grad()
    def text(self, ids: list[int], tokens: list[str]) -> tuple[Tensor, Tensor]:
        """The vectors of the marks and words that count `[n + 1, D]`, and the text's own."""
        states = self.text_encoder.model(
            torch.tensor([ids]), output_hidden_states=True
        ).hidden_states
        pieces = torch.stack(states[-4:]).sum(0)[0]
        words: list[Tensor] = []
        names: list[str] = []
        for token, piece in zip(tokens, pieces, strict=True):
            if token.startswith("##"):
                words[-1] = words[-1] + piece
            else:
                words.append(piece)
                names.append(token)
        whole = torch.stack([*words, *[torch.zeros_like(words[0])] * (len(ids) - len(words))])
        counted = len([name for name in names if not name.startswith("[")]) + 1
        return whole[:counted], whole.mean(0)

    def fit(self, regions: Tensor, pooled: Tensor, words: Tensor, whole: Tensor) -> float:
        """The mean of the global and the local similarity; GLoRIA's, with its sum."""
        flat = regions.flatten(1)  # [D, R]
        attention = (words @ flat).softmax(0)  # of each region over words
        gathered = ((attention * 4).softmax(-1)) @ flat.T
        local = (cosine_similarity(gathered, words) * 5).exp().sum().log()
        return float((cosine_similarity(pooled, whole, dim=-1) + local) / 2)


def stored(reference: Reference, folder: Path) -> dict[str, Tensor]:
    """The towers under the names that transformers saves, which are not those it has in memory."""
    towers = {
        "image_encoder.model.model.": reference.image_encoder.model.model,
        "text_encoder.model.": reference.text_encoder.model,
    }
    state = {
        name: value
        for name, value in reference.state_dict().items()
        if not name.startswith(tuple(towers))
    }
    for prefix, tower in towers.items():
        tower.save_pretrained(folder / prefix)
        saved = load_file(folder / prefix / "model.safetensors")
        state |= {f"{prefix}{name}": value for name, value in saved.items()}
    return state


def save(folder: Path, prefix: str) -> Reference:
    reference = Reference()
    folder.mkdir()
    named = stored(reference, folder.parent / "towers")
    state = {f"{prefix}{name}": value for name, value in named.items()}
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "modality-moe", "config": CONFIG.to_json()}
    (folder / "config.json").write_text(json.dumps(config))
    letters(folder / "tokenizer.json")
    return reference


class Made(NamedTuple):
    folder: Path
    reference: Reference
    bundle: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder as their Lightning module's `state_dict` gives it, and its bundle."""
    root = tmp_path_factory.mktemp("published")
    reference = save(root / "theirs", "model.")
    bundle = root / "bundle"
    export_modality(root / "theirs", bundle, ExportOptions("fp32", as_published=True))
    return Made(root / "theirs", reference, bundle)


def test_their_names_give_their_results(made: Made) -> None:
    """In torch and exported, of an image, of texts, and of how they fit."""
    folder, reference, bundle = made
    model = read_modality_checkpoint(folder, as_published=True)
    side = CONFIG.vision.image_size
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels = preprocess(Image.from_array(noise), CONFIG.vision)
    regions, pooled, shares = reference.image(torch.from_numpy(pixels))
    with torch.no_grad():
        ours = model.encode_image(torch.from_numpy(pixels))
    torch.testing.assert_close(ours.regions.permute(0, 3, 1, 2), regions, atol=NEAR, rtol=NEAR)
    engine = load_modality(bundle)
    assert engine.config.as_published
    found = engine.runtime.encode_images(pixels)
    torch.testing.assert_close(
        torch.from_numpy(found.regions).permute(0, 3, 1, 2), regions, atol=NEAR, rtol=NEAR
    )
    torch.testing.assert_close(torch.from_numpy(found.pooled), pooled, atol=NEAR, rtol=NEAR)
    probabilities = torch.from_numpy(found.router_logits).softmax(-1)
    torch.testing.assert_close(probabilities, shares, atol=NEAR, rtol=NEAR)
    texts = engine.runtime.encode_texts(TEXTS)
    fits = similarity(found, texts, as_published=True)[0]
    for row, text in enumerate(TEXTS):
        encoding = engine.runtime._reader.backend.encode(text)  # type: ignore[attr-defined]
        words, whole = reference.text(encoding.ids, encoding.tokens)
        assert texts.mask[row].sum() == len(words)
        np.testing.assert_allclose(texts.words[row][texts.mask[row]], words, atol=NEAR, rtol=NEAR)
        np.testing.assert_allclose(texts.pooled[row], whole, atol=NEAR, rtol=NEAR)
        assert fits[row] == pytest.approx(
            reference.fit(regions[0], pooled[0], words, whole), abs=NEAR
        )


def test_ours_differs_on_purpose(tmp_path: Path) -> None:
    """The same weights without the option: the comparison above proves something."""
    reference = save(tmp_path / "theirs", "")
    model = read_modality_checkpoint(tmp_path / "theirs")
    pixels = torch.rand(1, 3, CONFIG.vision.image_size, CONFIG.vision.image_size)
    with torch.no_grad():
        ours = model.encode_image(pixels)
    regions, pooled, _ = reference.image(pixels)
    assert ours.regions.shape[1:3] == (CONFIG.vision.grids[0],) * 2
    assert regions.shape[2:] == (16, 16)
    assert (ours.pooled - pooled).abs().max() > 0.1


def test_a_published_bundle_verifies_and_asks(made: Made) -> None:
    folder, _, bundle = made
    picture = Image.from_array(np.zeros((40, 40, 3), np.uint8) + 90)
    found = verify_modality(bundle, folder, Pictures("x", "0" * 64, [lambda: picture]))
    assert found.error() is None
    engine = load_modality(bundle)
    assert engine.locate(picture, "a b").heat.shape == (40, 40)
    assert sum(engine.classify(picture, ["a b", "c"]).scores.values()) == pytest.approx(1)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    save(tmp_path / "theirs", "model.")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["config"]["modalities"] = ["ct", "mri"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="router"):
        read_modality_checkpoint(tmp_path / "theirs")
    with pytest.raises(InputError, match="--as-published"):
        MedMoEFamily().check_export(ExportOptions(as_published=True), "onnxruntime")


def test_integers_that_older_versions_stored_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "theirs", "model.")
    file = tmp_path / "theirs" / "model.safetensors"
    names = "text_encoder.model.embeddings.position_ids", "image_encoder.relative_position_index"
    save_file(load_file(file) | {f"model.{name}": torch.arange(4) for name in names}, file)
    read_modality_checkpoint(tmp_path / "theirs")


def test_every_parameter_has_a_name_of_its_own(tmp_path: Path) -> None:
    names = [published_name(name) for name in tiny_model(config=CONFIG).state_dict()]
    assert len(set(names)) == len(names)
    theirs = set(stored(Reference(), tmp_path))
    assert set(names) <= theirs
    rest = {name for name in theirs - set(names) if "pooler" not in name}
    assert all("global_embedder" in name or "relative_position_index" in name for name in rest)
    assert not CONFIG.as_published
