"""Counts against the published figures, and against the stored tensors themselves."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.keys import expected_parameters
from medmoe_edge.errors import CheckpointError, InputError
from medmoe_edge.evaluation.inspection import activated_parameters, inspect_model
from medmoe_edge.presets import PRESETS
from medmoe_edge.training.initialise import initialise


@pytest.mark.parametrize(
    ("preset", "total", "activated"),
    [("med-moe-stablelm-1.6b", 3.615e9, 2.06e9), ("med-moe-phi2-2.7b", 6.449e9, 3.62e9)],
)
def test_the_published_parameter_counts(preset: str, total: float, activated: float) -> None:
    config = PRESETS[preset]
    counted = sum(math.prod(shape) for shape in expected_parameters(config).values())
    assert counted == pytest.approx(total, rel=2e-4)
    assert activated_parameters(config) == pytest.approx(activated, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "activated"), [("med-moe-stablelm-1.6b", 2.47e9), ("med-moe-phi2-2.7b", 4.46e9)]
)
def test_two_experts_activate_more(preset: str, activated: float) -> None:
    config = PRESETS[preset]
    assert config.moe is not None
    two = dataclasses.replace(config, moe=dataclasses.replace(config.moe, top_k=2))
    assert activated_parameters(two) == pytest.approx(activated, rel=3e-3)


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_a_checkpoint_is_counted(tmp_path: Path, preset: str) -> None:
    initialise(preset, tmp_path / "out")
    inspection = inspect_model(tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(shard)
    language = [k for k in stored if "image_tower" not in k and "mm_projector" not in k]
    idle = [k for k in stored if any(f"deepspeed_experts.{n}." in k for n in (1, 2, 3))]
    assert inspection.kind == "checkpoint"
    assert inspection.tensors == len(stored)
    assert inspection.bytes == shard.stat().st_size
    assert inspection.parameters_total == sum(value.numel() for value in stored.values())
    counted = sum(stored[key].numel() for key in language)
    assert inspection.parameters_language == counted
    counted -= sum(stored[key].numel() for key in idle)
    assert inspection.parameters_activated == counted
    assert inspection.experts_per_layer == {0: 4, 2: 4}
    assert inspection.shared_router is True
    assert inspection.types == {"bfloat16": len(stored) - 4, "float32": 4}
    data = json.loads(json.dumps(inspection.to_json()))
    assert data["config"] == json.loads(json.dumps(PRESETS[preset].to_json()))
    assert data["experts_per_layer"] == {"0": 4, "2": 4}


def test_a_bundle_is_described_by_its_manifest(tiny_bundle: Callable[..., Path]) -> None:
    folder = tiny_bundle("int8")
    config = Bundle.open(folder).config
    inspection = inspect_model(folder)
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    del files["manifest.json"]
    assert (inspection.kind, inspection.config) == ("bundle", config)
    assert inspection.files == files
    assert inspection.bytes == sum(files.values())
    assert inspection.parameters_activated == activated_parameters(config)
    assert inspection.tensors is None
    assert inspection.verification == "not measured"
    assert inspection.to_json()["quantisation"]["precision"] == "int8"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        inspect_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        inspect_model(tmp_path)
