"""The pass lower_moe: every expert in an `If` of its own, run only where some token chose it."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import (
    STRUCTURES,
    moe_config,
    moe_layer,
    moe_model,
    op_types,
    random_tokens,
    run_all,
    run_ort,
)

from medmoe_edge.export.decoder import MoESpec
from medmoe_edge.export.passes.ort_cpu import lower_moe


@pytest.mark.parametrize(("kind", "options"), STRUCTURES)
def test_the_lowered_experts_equal_the_function(kind: str, options: dict[str, Any]) -> None:
    config = moe_config(kind, **options)
    moe = moe_layer(config)
    lowered, modified = lower_moe(moe_model(moe, config), MoESpec.of(config))
    assert modified
    assert op_types(lowered)["If"] == 4
    assert not lowered.functions
    assert "medmoe" not in lowered.graph.opset_imports
    assert [output.name for output in lowered.graph.outputs] == ["y"]
    assert lower_moe(lowered, MoESpec.of(config)) == (lowered, False)
    for batch, length in ((2, 9), (1, 1), (1, 2)):
        x = random_tokens(batch, length, 16)
        expected = run_ort(moe_model(moe, config), x=x)
        np.testing.assert_allclose(run_ort(lowered, x=x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
def test_only_chosen_experts_run(top_k: int) -> None:
    config = moe_config(top_k=top_k)
    moe, x = moe_layer(config), random_tokens(1, 5, 16)
    assert moe.router.bias is not None
    moe.router.bias.copy_(torch.tensor([-1e4, 30.0, -1e4, 20.0]))
    expected = moe(torch.from_numpy(x)).numpy()
    for idle in (0, 2, 3)[: 4 - top_k]:
        for parameter in moe.experts[idle].parameters():
            parameter.fill_(math.nan)
    lowered, _ = lower_moe(moe_model(moe, config), MoESpec.of(config))
    branches = [node for node in lowered.graph if node.op_type == "If"]
    for node in branches:
        condition = node.inputs[0]
        assert condition is not None
        condition.dtype = ir.DataType.BOOL
        lowered.graph.outputs.append(condition)
    y, *taken = run_all(lowered, x=x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert [bool(condition) for condition in taken] == [False, True, False, top_k == 2]
    assert np.isnan(run_ort(moe_model(moe, config), x=x)).all()  # the function runs all
