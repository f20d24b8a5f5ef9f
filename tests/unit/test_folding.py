"""Scales folded into neighbours change no output, whatever they are, and reach every input."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import changed, normal
from torch import Tensor

from medmoe_edge._types import Floats
from medmoe_edge.calibration.statistics import input_of
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.export.decoder import DecoderBuilder
from medmoe_edge.export.weights import FoldPoint, WeightSource, fold, fold_points
from medmoe_edge.models.med_moe import MedMoE

Make = Callable[..., Path]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("tiny", {}),
    ("tiny", {"meta_expert": False, "router_bias": False}),
    ("tiny", {"top_k": 2, "use_residual": True}),
    ("tiny", {"dense": True}),
    ("tiny-phi", {}),
    ("tiny-phi", {"meta_expert": False, "router_bias": False}),
    ("tiny-phi", {"top_k": 2, "use_residual": True}),
    ("tiny-phi", {"dense": True}),
    ("tiny-qwen", {}),
]


def opened(make: Make, folder: Path, preset: str, options: dict[str, Any]) -> Checkpoint:
    """A tiny checkpoint whose norms are not ones and zeros, so that nothing folds by chance."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("decoder.") and "norm" in name:
            return tensor + torch.from_numpy(normal(*tensor.shape, seed=len(name))) * 0.3
        return tensor

    return read_checkpoint(changed(make(preset, **options), folder / "changed", change))


def width(checkpoint: Checkpoint, point: FoldPoint) -> int:
    return checkpoint.names[point.consumers[0]].shape[1]


def random_scales(checkpoint: Checkpoint) -> dict[FoldPoint, Floats]:
    return {
        point: np.exp(normal(width(checkpoint, point), seed=index))
        for index, point in enumerate(fold_points(checkpoint.config))
    }


@torch.inference_mode()
def outputs(checkpoint: Checkpoint, source: WeightSource) -> tuple[Tensor, Tensor | None]:
    """Logits `[1, S, V]` and router logits of the decoder with these weights."""
    with torch.device("meta"):
        model = MedMoE(checkpoint.config)
    weights = {name: torch.from_numpy(source.array(name)) for name in checkpoint.names}
    model.load_state_dict(weights, assign=True)
    found = model.eval()(torch.from_numpy(normal(1, 12, 64, seed=3)))
    routing = model.router_logits(found) if checkpoint.config.moe else None
    return model.head(found.hidden), routing


@pytest.mark.parametrize(("preset", "options"), MODELS)
def test_folding_any_scales_changes_nothing(
    tiny_checkpoint: Make, tmp_path: Path, preset: str, options: dict[str, Any]
) -> None:
    checkpoint = opened(tiny_checkpoint, tmp_path, preset, options)
    factors = fold(random_scales(checkpoint))
    logits, routing = outputs(checkpoint, WeightSource(checkpoint))
    folded, folded_routing = outputs(checkpoint, WeightSource(checkpoint, factors))
    torch.testing.assert_close(folded, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    assert (routing is None) == (folded_routing is None)
    if routing is not None and folded_routing is not None:
        torch.testing.assert_close(folded_routing, routing, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("preset", "options"), MODELS)
def test_every_site_but_behind_gelu_has_one_fold_point(
    tiny_checkpoint: Make, preset: str, options: dict[str, Any]
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint(preset, **options))
    points = list(fold_points(checkpoint.config))
    inputs = {given for name in checkpoint.names if (given := input_of(name)) is not None}
    behind_gelu = {given for given in inputs if preset == "tiny-phi" and given.endswith(".hidden")}
    folded = Counter(given for point in points for given in point.inputs)
    assert folded == Counter(inputs - behind_gelu)
    consumers = Counter(name for point in points for name in point.consumers)
    readers = [name for name in checkpoint.names if input_of(name) in inputs - behind_gelu]
    assert Counter(name for point in points for name in point.quantised) == Counter(readers)
    deciders = (".router.weight", ".coefficient.weight")
    others = {name for name in checkpoint.names if name.endswith(deciders)}
    assert set(consumers) - set(readers) == others
    assert {name for point in points for name in point.producers} <= set(checkpoint.names)
    for point in points:
        for name in point.producers:
            assert checkpoint.names[name].shape[0] == width(checkpoint, point)
        assert {checkpoint.names[name].shape[1] for name in point.consumers} == {
            width(checkpoint, point)
        }


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi", "tiny-qwen"])
def test_the_graph_gets_the_factors_on_the_right_axes(tiny_checkpoint: Make, preset: str) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint(preset))
    scales = random_scales(checkpoint)
    source = WeightSource(checkpoint, fold(scales))
    expected = {name: checkpoint.tensor(name).float().numpy() for name in checkpoint.names}
    for point, scale in scales.items():
        for name in point.consumers:
            expected[name] = np.einsum("nk,k->nk", expected[name], scale)
        for name in point.producers:
            expected[name] = np.einsum("n...,n->n...", expected[name], 1 / scale)
    graph = DecoderBuilder(checkpoint.config, source).model().graph
    touched = [name for name in graph.initializers if name in expected]
    assert len(touched) == sum(name.startswith("decoder.") for name in expected) - 1  # not embed
    for name in touched:
        tensor = graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_allclose(tensor.numpy(), expected[name].T, rtol=1e-5)
