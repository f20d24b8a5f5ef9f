"""The exported decoders give the numbers of the torch model, or come close where quantised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import relative

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.config import Precision
from medmoe_edge.export.decoder import rotary_cache
from medmoe_edge.export.plan import Plan
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.models.decoder import rotary_tables
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime

Make = Callable[..., Path]


def eager(checkpoint: Path) -> EagerRuntime:
    return EagerRuntime(read_checkpoint(checkpoint))


# --- the decoder ------------------------------------------------------------------------------

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("tiny", {}),
    ("tiny", {"top_k": 2, "use_residual": True}),
    ("tiny-phi", {}),
    ("tiny-phi", {"top_k": 2, "router_bias": False}),
    ("tiny", {"dense": True}),
    ("tiny-phi", {"dense": True}),
    ("tiny-qwen", {}),
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
        assert relative(step.logits, expected.logits) <= 1e-3
        assert step.router_logits.shape == expected.router_logits.shape
        if step.router_logits.size:
            assert step.router_logits.shape == (length, 2, 4)
            assert relative(step.router_logits, expected.router_logits) <= 1e-3
        assert ours.length == theirs.length
    ids = [3, 1, 4, 1, 5, 319]
    assert np.array_equal(runtime.embed(ids), torch_runtime.embed(ids))
    with pytest.raises(ValueError, match="exceed 40"):
        runtime.step(np.zeros((25, 64), np.float32), ours)


def rounded(checkpoint: Path, precision: Precision) -> EagerRuntime:
    """Torch with what the stored integers stand for."""
    runtime, plan = eager(checkpoint), Plan(precision)
    source = WeightSource(read_checkpoint(checkpoint))
    state = {
        name: torch.from_numpy(found[1](source.array(name)).dequantise())
        for name in source.checkpoint.names
        if (found := plan(name)) is not None
    }
    runtime.model.load_state_dict(state, strict=False)
    return runtime


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_decoder_errs_in_its_weights_and_in_8_bit_activations(
    tiny_checkpoint: Make, tiny_bundle: Make, preset: str, precision: Precision
) -> None:
    """Without experts: one token that is routed otherwise is a difference of another kind."""
    exact = rounded(tiny_checkpoint(preset, dense=True), precision)
    runtime = OrtRuntime(Bundle.open(tiny_bundle(precision, preset, dense=True)))
    embeds = np.random.default_rng(0).normal(0, 0.2, (20, 64)).astype(np.float32)
    logits = runtime.step(embeds, runtime.new_cache(20)).logits
    assert 1e-5 < relative(logits, exact.step(embeds, exact.new_cache(20)).logits) < 0.05


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_the_first_router_of_a_quantised_decoder_hardly_moves(
    tiny_bundle: Make, preset: str
) -> None:
    logits = []
    for precision in ("fp32", "int8"):
        runtime = OrtRuntime(Bundle.open(tiny_bundle(precision, preset)))
        embeds = np.random.default_rng(0).normal(0, 0.2, (20, 64)).astype(np.float32)
        logits.append(runtime.step(embeds, runtime.new_cache(20)).router_logits[:, 0])
    assert relative(logits[1], logits[0]) < 0.05


def test_rotations_are_those_of_the_model() -> None:
    decoder = PRESETS["nano"].decoder
    positions = torch.arange(decoder.max_positions)[None]
    expected = rotary_tables(decoder, positions)
    for (_, table), other in zip(rotary_cache(decoder), expected, strict=True):
        np.testing.assert_allclose(table, other[0, 0].numpy(), atol=1e-4)
