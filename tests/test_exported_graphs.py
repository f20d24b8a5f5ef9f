"""The exported graphs give the numbers of the torch model: decoders and towers, fp32 and int8."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medmoe_edge.bundle import Bundle
from medmoe_edge.checkpoint import read_checkpoint, write_checkpoint
from medmoe_edge.config import ModelConfig, VisionConfig
from medmoe_edge.export.decoder import rotary_cache
from medmoe_edge.export.external_data import save_model
from medmoe_edge.export.vision import export_vision
from medmoe_edge.models.attention import rotary_tables
from medmoe_edge.presets import PRESETS, random_tensors
from medmoe_edge.runtimes.base import Floats
from medmoe_edge.runtimes.eager import EagerRuntime
from medmoe_edge.runtimes.ort import OrtRuntime, open_session, session_options

Make = Callable[..., Path]


def eager(checkpoint: Path) -> EagerRuntime:
    return EagerRuntime(read_checkpoint(checkpoint))


def difference(a: Floats, b: Floats) -> float:
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


# --- the decoder ------------------------------------------------------------------------------

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("tiny", {}),
    ("tiny", {"top_k": 2, "use_residual": True}),
    ("tiny-phi", {}),
    ("tiny-phi", {"top_k": 2, "router_bias": False}),
    ("tiny", {"dense": True}),
    ("tiny-phi", {"dense": True}),
]


@pytest.mark.parametrize(("preset", "options"), MODELS)
def test_the_fp32_decoder_equals_torch(
    tiny_checkpoint: Make, tiny_bundle: Make, preset: str, options: dict[str, Any]
) -> None:
    torch_runtime = eager(tiny_checkpoint(preset, **options))
    runtime = OrtRuntime(Bundle.open(tiny_bundle("fp32", preset, **options)))
    ours, theirs = runtime.new_cache(40), torch_runtime.new_cache(40)
    generator = np.random.default_rng(0)
    for length in (9, 5, 1, 1):  # prefill, a further chunk, decode
        embeds = generator.normal(0, 0.2, (length, 64)).astype(np.float32)
        step, expected = runtime.step(embeds, ours), torch_runtime.step(embeds, theirs)
        assert difference(step.logits, expected.logits) <= 1e-3
        assert step.router_logits.shape == expected.router_logits.shape
        if step.router_logits.size:
            assert step.router_logits.shape == (length, 2, 4)
            assert difference(step.router_logits, expected.router_logits) <= 1e-3
        assert ours.length == theirs.length
    ids = [3, 1, 4, 1, 5, 319]
    assert np.array_equal(runtime.embed(ids), torch_runtime.embed(ids))
    with pytest.raises(ValueError, match="exceed 40"):
        runtime.step(np.zeros((25, 64), np.float32), ours)


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_the_int8_decoder_is_close(tiny_bundle: Make, preset: str) -> None:
    steps = []
    for precision in ("fp32", "int8"):
        runtime = OrtRuntime(Bundle.open(tiny_bundle(precision, preset)))
        embeds = np.random.default_rng(0).normal(0, 0.2, (20, 64)).astype(np.float32)
        steps.append(runtime.step(embeds, runtime.new_cache(20)))
    exact, close = steps
    assert 0 < difference(close.logits, exact.logits) < 0.1
    assert 0 < difference(close.router_logits, exact.router_logits) < 0.1


def test_rotations_are_those_of_the_model() -> None:
    decoder = PRESETS["nano"].decoder
    positions = torch.arange(decoder.max_positions)[None]
    expected = rotary_tables(decoder, positions)
    for (_, table), other in zip(rotary_cache(decoder), expected, strict=True):
        np.testing.assert_allclose(table, other[0, 0].numpy(), atol=1e-4)


# --- the vision tower -------------------------------------------------------------------------


def test_the_clip_tower_equals_torch(tiny_checkpoint: Make, tiny_bundle: Make) -> None:
    pixels = np.random.default_rng(0).standard_normal((1, 3, 28, 28)).astype(np.float32)
    expected = eager(tiny_checkpoint()).encode_image(pixels)
    assert expected.shape == (4, 64)
    runtimes = [OrtRuntime(Bundle.open(tiny_bundle(name))) for name in ("fp32", "int8")]
    fp32, int8 = (runtime.encode_image(pixels) for runtime in runtimes)
    assert difference(fp32, expected) < 1e-5
    assert 1e-5 < difference(int8, expected) < 0.03


def efficientnet_config() -> ModelConfig:
    vision = VisionConfig(
        kind="efficientnet-lite",
        image_size=64,
        feature_size=320 + 4 * 112,
        pixel_mean=(127.0,) * 3,
        pixel_std=(128.0,) * 3,
        variant="lite0",
    )
    return dataclasses.replace(PRESETS["tiny"], vision=vision)


def test_the_efficientnet_tower_equals_torch(tmp_path: Path) -> None:
    config = efficientnet_config()
    tensors = ((name, tensor * 5) for name, tensor in random_tensors(config, 0))
    write_checkpoint(tmp_path / "checkpoint", config, tensors)
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    save_model(export_vision(checkpoint), tmp_path, "vision")
    session = open_session(tmp_path / "vision.onnx", session_options())
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    (tokens,) = session.run(["image_tokens"], {"pixels": pixels})
    expected = EagerRuntime(checkpoint).encode_image(pixels)
    assert expected.shape == (4, 64)
    assert difference(expected, np.roll(expected, 1, axis=0)) > 0.01  # tokens differ by place
    assert difference(np.asarray(tokens)[0], expected) < 1e-4
