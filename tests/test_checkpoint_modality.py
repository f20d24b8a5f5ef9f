"""MedMoE's configuration and checkpoint folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmoe_edge.checkpoint_modality import read_modality_checkpoint, write_modality_checkpoint
from medmoe_edge.config_modality import ModalityConfig
from medmoe_edge.errors import CheckpointError, ConfigError, InputError, ModelError
from medmoe_edge.presets import MODALITY_PRESETS, PRESETS
from medmoe_edge.presets_random import initialise, random_modality_model

TINY = MODALITY_PRESETS["modality-tiny"]


@pytest.mark.parametrize("preset", MODALITY_PRESETS)
@pytest.mark.parametrize("shared", [False, True])
def test_json_says_all_of_a_configuration(preset: str, shared: bool) -> None:
    config = replace(MODALITY_PRESETS[preset], shared_expert=shared)
    assert ModalityConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.experts == (1 if shared else 6)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision", {"heads": [2]}),
        ("vision", {"heads": [3, 3]}),
        ("vision", {"depths": [], "heads": []}),
        ("vision", {"depths": [2, 0]}),
        ("vision", {"depths": [1000, 1000]}),
        ("vision", {"image_size": 33}),
        ("vision", {"image_size": 16}),  # the last stage is smaller than a window
        ("vision", {"image_size": 4096}),
        ("vision", {"image_size": 800, "window_size": 64}),
        ("vision", {"pixel_mean": [0.0]}),
        ("vision", {"pixel_std": [1.0, 1.0, 0.0]}),
        ("vision", {"patch": 4}),
        ("text", {"heads": 3}),
        ("text", {"layers": 3}),
        ("text", {"layers": 10**6}),
        ("text", {"vocab_size": 0}),
        ("text", {"vocab_size": 2**40}),
        ("text", {"max_pieces": 2}),
        ("text", {"max_pieces": 33}),
        (None, {"modalities": ["ct"]}),
        (None, {"modalities": ["ct", "ct"]}),
        (None, {"modalities": ["ct", ""]}),
        (None, {"shared_expert": 1}),
    ],
)
def test_an_impossible_configuration_is_refused(part: str | None, changes: dict[str, Any]) -> None:
    data = TINY.to_json()
    (data[part] if part else data).update(changes)
    with pytest.raises(ConfigError):
        ModalityConfig.from_json(data)


@torch.no_grad()
def test_a_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    config = replace(TINY, modalities=("ct", "mri"))
    model = random_modality_model(config, seed=1)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_modality_checkpoint(tmp_path / "out", model, tokenizer_file=tmp_path / "tokenizer.json")
    read = read_modality_checkpoint(tmp_path / "out")
    assert read.config == config
    assert not read.training
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    pixels = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(read.encode_image(pixels), model.encode_image(pixels), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(InputError):
        write_modality_checkpoint(tmp_path / "out", model)
    write_modality_checkpoint(tmp_path / "out", model, force=True)


def test_a_preset_becomes_a_checkpoint(tmp_path: Path) -> None:
    for number, seed in enumerate([3, 3, 4]):
        initialise("modality-tiny", tmp_path / str(number), seed=seed)
    files = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)]
    assert files[0] == files[1] != files[2]
    model = read_modality_checkpoint(tmp_path / "0")
    assert model.config == TINY
    assert model.vision.norm.weight.eq(1).all()
    assert model.text.layers[0].get_parameter("q.bias").count_nonzero() == 0
    with pytest.raises(InputError, match="modality-nano"):
        initialise("huge", tmp_path / "out")


def test_a_seed_does_not_disturb_the_callers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    random_modality_model(TINY, seed=5)
    assert torch.equal(torch.rand(1), expected)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def of_med_moe(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_phi"}))


def unknown_key(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["config"]["modalitys"] = []
    (folder / "config.json").write_text(json.dumps(data))


def huge(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["config"]["text"] |= {"hidden_size": 2**20, "intermediate_size": 2**20}
    (folder / "config.json").write_text(json.dumps(data))


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["router.0.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_one_more(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"experts.6.x": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [no_config, of_med_moe, unknown_key, huge, cut_short, without_a_tensor, with_one_more],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    initialise("modality-tiny", tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ModelError):
        read_modality_checkpoint(tmp_path / "out")


def test_a_folder_of_a_med_moe_says_so(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="modality-moe"):
        read_modality_checkpoint(tiny_checkpoint())
    assert not PRESETS.keys() & MODALITY_PRESETS.keys()
