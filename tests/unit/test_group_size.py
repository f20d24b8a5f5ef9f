"""The group size of an int4 export: kept by every matrix, computed with, refused in time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medmoe_edge import ExportOptions, export_model
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint
from medmoe_edge.errors import CheckpointError, InputError
from medmoe_edge.export.build import BuildOptions, export_bundle
from medmoe_edge.export.plan import GROUP, HEAD, Plan, check_precision
from medmoe_edge.export.stored import StoredWeights
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Make) -> Checkpoint:
    """Without experts: one token that is routed otherwise is a difference of another kind."""
    return read_checkpoint(tiny_checkpoint(dense=True))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("groups") / "bundle"
    return Bundle.open(
        export_bundle(checkpoint.folder, folder, BuildOptions(precision="int4", group=64))
    )


def test_every_matrix_but_the_head_has_it(bundle: Bundle) -> None:
    quantisation = bundle.manifest["quantisation"]
    groups = {record["group"] for record in quantisation["matrices"] if record["name"] != HEAD}
    assert groups == {64}
    assert "groups of 64;" in quantisation["decoder"]
    stored = StoredWeights(bundle.path("decoder.onnx"))
    found = stored.quantised("decoder.layers.0.attention.out.weight")  # [64, 64]
    assert found is not None
    integers, scale = found
    assert (list(integers.shape), list(scale.shape)) == ([64, 64], [1, 64])


def test_it_computes_with_what_is_stored(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """As torch does with the same integers, but for 8-bit activations."""
    exact, plan = EagerRuntime(checkpoint), Plan("int4", group=64)
    source = WeightSource(checkpoint)
    state = {
        name: torch.from_numpy(chosen[1](source.array(name)).dequantise())
        for name in checkpoint.names
        if (chosen := plan(name)) is not None
    }
    exact.model.load_state_dict(state, strict=False)
    embeds = np.random.default_rng(0).normal(0, 0.2, (20, 64)).astype(np.float32)
    ours, theirs = (
        runtime.step(embeds, runtime.new_cache(20)).logits
        for runtime in (OrtRuntime(bundle), exact)
    )
    assert 1e-5 < np.abs(ours - theirs).max() / np.abs(theirs).max() < 0.05


def test_unasked_it_is_the_smallest() -> None:
    assert Plan("int4").format_of("decoder.layers.0.attention.q.weight").group == GROUP == 32


@pytest.mark.parametrize("precision", ["fp32", "int8", "mixed"])
def test_no_other_precision_takes_one(checkpoint: Checkpoint, precision: Any) -> None:
    with pytest.raises(InputError, match=f"{precision} has no group size"):
        check_precision(checkpoint, precision, 4.5, calibrated=True, group=64)


def test_it_must_divide_every_matrix(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not divide into groups of 128") as refused:
        export_model(checkpoint.folder, tmp_path / "bundle", ExportOptions("int4", group=128))
    assert "smaller groups" in refused.value.remedy
    assert not list(tmp_path.iterdir())
