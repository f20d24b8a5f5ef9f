"""The named configurations, and the random checkpoints made from them."""

from pathlib import Path

import pytest
import torch

from medmoe_edge.checkpoint.keys import expected_parameters
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import InputError
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.initialise import WEIGHT_STD, initialise, random_tensors


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi", "tiny-qwen", "nano"])
def test_a_preset_becomes_a_checkpoint_of_its_configuration(tmp_path: Path, preset: str) -> None:
    initialise(preset, tmp_path / "out")
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.config == PRESETS[preset]
    assert checkpoint.shared_router
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert sum(sizes) < 50e6


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for number, seed in enumerate([3, 3, 4]):
        initialise("tiny", tmp_path / str(number), seed=seed)
        hashes.append(read_checkpoint(tmp_path / str(number)).sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_values_are_normal_and_norms_are_neutral() -> None:
    tensors = dict(random_tensors(PRESETS["tiny"], 0))
    head = tensors["decoder.head.weight"].float()
    assert head.std().item() == pytest.approx(WEIGHT_STD, rel=0.05)
    assert head.mean().item() == pytest.approx(0, abs=WEIGHT_STD / 20)
    assert not torch.equal(tensors["decoder.embed.weight"].float(), head)
    for norm in "decoder.norm", "decoder.layers.1.post_norm", "vision.layers.0.norm1":
        assert (tensors[f"{norm}.weight"] == 1).all()
        assert (tensors[f"{norm}.bias"] == 0).all()
    assert tensors["decoder.layers.0.ffn.router.bias"].count_nonzero() == 4


def test_the_official_sizes() -> None:
    """Tensor counts of the official layout."""
    assert len(expected_parameters(PRESETS["med-moe-stablelm-1.6b"])) == 903
    assert len(expected_parameters(PRESETS["med-moe-phi2-2.7b"])) == 1135


def test_an_unknown_preset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tiny-phi"):
        initialise("huge", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
