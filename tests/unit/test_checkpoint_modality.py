"""MedMoE's configuration and checkpoint folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmoe_edge.checkpoint.contrastive import (
    modality_sha256,
    read_modality_checkpoint,
    write_modality_checkpoint,
)
from medmoe_edge.config_contrastive import ModalityConfig, read_scores
from medmoe_edge.errors import CheckpointError, ConfigError, InputError, ModelError
from medmoe_edge.presets import MODALITY_PRESETS, PRESETS
from medmoe_edge.training.initialise import initialise, random_modality_model

TINY = MODALITY_PRESETS["modality-tiny"]
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


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


@pytest.mark.parametrize(
    "scores",
    ['{"temperature": 1e300}', '{"temperature": NaN}']
    + [f'{{"evidence_limit": {value}}}' for value in ("NaN", "Infinity", "-Infinity")],
)
def test_impossible_scores_are_refused(tmp_path: Path, scores: str) -> None:
    (tmp_path / "scores.json").write_text(scores)
    with pytest.raises(ConfigError, match="finite"):
        read_scores(tmp_path)


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


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_small_shards_hold_the_same_model(tmp_path: Path) -> None:
    model = random_modality_model(TINY, seed=1)
    write_modality_checkpoint(tmp_path / "out", model, shard_bytes=2**15)
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 2
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 2**15
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {key: name for name, held in shards.items() for key in held}
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert_equal(read_modality_checkpoint(tmp_path / "out").state_dict(), state)


def test_a_single_file_is_read_too(tmp_path: Path) -> None:
    model = random_modality_model(TINY, seed=1)
    write_modality_checkpoint(tmp_path / "out", model)
    (tmp_path / "out" / INDEX).unlink()
    single = (tmp_path / "out" / SHARD).rename(tmp_path / "out" / "model.safetensors")
    assert_equal(read_modality_checkpoint(tmp_path / "out").state_dict(), model.state_dict())
    sha256 = modality_sha256(tmp_path / "out")
    flip_last_byte(single)
    assert modality_sha256(tmp_path / "out") != sha256


def test_the_hash_is_over_every_file_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (tmp_path / "tokenizer.json").write_text("{}")
    write_modality_checkpoint(
        folder,
        random_modality_model(TINY, seed=1),
        tokenizer_file=tmp_path / "tokenizer.json",
        shard_bytes=2**15,
    )
    hashes = [modality_sha256(folder)]
    (folder / "scores.json").write_text("{}")
    hashes.append(modality_sha256(folder))
    files = sorted(folder.iterdir())
    assert len(files) > 6
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".json":
            path.write_bytes(content + b"\n")
        else:
            flip_last_byte(path)
        hashes.append(modality_sha256(folder))
        path.write_bytes(content)
    assert len(set(hashes)) == len(hashes) == len(files) + 2
    (folder / "README.md").write_text("A card decides nothing.")
    assert modality_sha256(folder) == hashes[1]


def test_a_preset_becomes_a_checkpoint(tmp_path: Path) -> None:
    for number, seed in enumerate([3, 3, 4]):
        initialise("modality-tiny", tmp_path / str(number), seed=seed)
    files = [(tmp_path / str(number) / SHARD).read_bytes() for number in range(3)]
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
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-100])


def without_a_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    del tensors["router.0.weight"]
    save_single(tensors, folder)


def with_one_more(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_single(tensors | {"experts.6.x": torch.zeros(1)}, folder)


def never_filled(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors["text.word_embedding.weight"].zero_()
    save_single(tensors, folder)


def save_single(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        *(no_config, of_med_moe, unknown_key, huge, cut_short, without_a_shard),
        *(without_a_tensor, with_one_more, never_filled),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    initialise("modality-tiny", tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ModelError):
        read_modality_checkpoint(tmp_path / "out")


def test_a_key_that_would_be_passed_over_is_refused(tmp_path: Path) -> None:
    write_modality_checkpoint(tmp_path / "a", random_modality_model(TINY, seed=1))
    file = tmp_path / "a" / "config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"torch_dtype": "float32"}))
    assert read_modality_checkpoint(tmp_path / "a").config == TINY
    file.write_text(json.dumps(data | {"as_published": True}))
    with pytest.raises(ConfigError, match="unknown key 'as_published'"):
        read_modality_checkpoint(tmp_path / "a")


def test_a_folder_of_a_med_moe_says_so(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="modality-moe"):
        read_modality_checkpoint(tiny_checkpoint())
    assert not PRESETS.keys() & MODALITY_PRESETS.keys()
