"""Where scales are searched, and what folding them saves."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphs import changed, normal, observed
from torch import Tensor

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.calibration.statistics import Statistics
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.export import build
from medmoe_edge.export.plan import HEAD, make_plan, search_scales
from medmoe_edge.export.weights import fold_points
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Make) -> Checkpoint:
    return read_checkpoint(tiny_checkpoint())


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint) -> Statistics:
    return observed(checkpoint)


def test_only_a_calibrated_int8_export_folds(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    factors = make_plan(checkpoint, "int8", "auto", statistics, None).factors
    for point, scale in search_scales(checkpoint, statistics).items():
        for name in point.consumers:
            assert np.array_equal(np.asarray(factors[name].columns), scale)
    assert not make_plan(checkpoint, "int8", "auto", None, None).factors
    assert not make_plan(checkpoint, "int8", "rtn", statistics, None).factors
    assert not make_plan(checkpoint, "int4", "auto", statistics, None).factors


def test_scales_are_searched_where_activations_were_seen(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    points = list(fold_points(checkpoint.config))
    scales = search_scales(checkpoint, statistics)
    assert list(scales) == points
    for scale in scales.values():
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    unseen = {"decoder.head.in", "decoder.layers.0.ffn.experts.1.hidden"}
    inputs = {name: measured for name, measured in statistics.inputs.items() if name not in unseen}
    fewer = search_scales(checkpoint, dataclasses.replace(statistics, inputs=inputs))
    assert list(fewer) == [point for point in points if not unseen.intersection(point.inputs)]


def test_how_far_one_huge_token_reached_does_not_matter(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    """Each token has its own scale: only what its channels are like among each other counts."""
    found = []
    for reach in (np.float32(20), np.float32(2000)):
        inputs = {
            name: dataclasses.replace(
                measured, minimum=measured.minimum * reach, maximum=measured.maximum * reach
            )
            for name, measured in statistics.inputs.items()
        }
        found.append(search_scales(checkpoint, dataclasses.replace(statistics, inputs=inputs)))
    for point, scale in found[0].items():
        assert np.array_equal(found[1][point], scale)
        assert (scale != 1).any()


def with_outliers(name: str, tensor: Tensor) -> Tensor:
    """Two channels of every norm a hundred times as large, and read a hundred times as weakly."""
    tensor = tensor.clone()
    readers = ("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight", HEAD)
    if name.startswith("decoder.") and name.endswith("norm.weight"):
        tensor[[3, 40]] *= 100
    elif name.startswith("decoder.") and name.endswith(readers):
        tensor[:, [3, 40]] /= 100
    return tensor


def test_folding_saves_what_outliers_would_ruin(tiny_checkpoint: Make, tmp_path: Path) -> None:
    folder = changed(tiny_checkpoint(dense=True), tmp_path / "outliers", with_outliers)
    source = read_checkpoint(folder)
    embeds = normal(12, 64, seed=9)
    torch_runtime = EagerRuntime(source)
    exact = torch_runtime.step(embeds, torch_runtime.new_cache(12)).logits
    errors = []
    for index, statistics in enumerate((None, observed(source, hessians=False))):
        out = build.export_bundle(folder, tmp_path / str(index), statistics=statistics)
        runtime = OrtRuntime(Bundle.open(out))
        logits = runtime.step(embeds, runtime.new_cache(12)).logits
        errors.append(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
    plain, folded = errors
    assert folded < 0.2 * plain
    assert folded < 0.05
