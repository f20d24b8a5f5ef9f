"""The specification of `medmoe::MoE`: its function body, in ONNX's reference evaluator."""

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graphs import Floats, moe_config, moe_layer, moe_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from medmoe_edge.config import ModelConfig
from medmoe_edge.export.decoder import MoESpec
from medmoe_edge.models.decoder import MoE, route

STRUCTURES = [
    (kind, {"top_k": k, "router_bias": bias, "meta_expert": meta, "use_residual": residual})
    for kind, k, bias, meta, residual in itertools.product(
        ("stablelm", "phi"), (1, 2), (True, False), (True, False), (True, False)
    )
    if meta or not residual
]


@torch.no_grad()
def in_torch(moe: MoE, x: Floats) -> Floats:
    return np.asarray(moe(torch.from_numpy(x)).numpy(), np.float32)


def in_reference(moe: MoE, config: ModelConfig, x: Floats) -> Floats:
    proto = ir.to_proto(moe_model(moe, config))
    onnx.checker.check_model(proto, full_check=True)
    if config.decoder.kind == "phi":  # the evaluator runs Gelu only where it sees the types
        proto = onnx.shape_inference.infer_shapes(inline_local_functions(proto))
    (y,) = ReferenceEvaluator(proto).run(None, {"x": x})
    return np.asarray(y, np.float32)


@pytest.mark.parametrize(("kind", "options"), STRUCTURES)
def test_the_body_equals_the_torch_layer(kind: str, options: dict[str, Any]) -> None:
    config = moe_config(kind, **options)
    moe, x = moe_layer(config), random_tokens(2, 7, 16)
    expected = in_torch(moe, x)
    np.testing.assert_allclose(in_reference(moe, config, x), expected, rtol=1e-4, atol=1e-5)
    # every expert had work, so none could be wrong unnoticed
    logits = moe.router_logits(torch.from_numpy(x)).flatten(0, 1)
    _, chosen = route(logits, options["top_k"])
    assert chosen.flatten().bincount(minlength=4).min() > 0


@settings(max_examples=12)
@given(
    kind=st.sampled_from(["stablelm", "phi"]),
    experts=st.integers(1, 5),
    second=st.booleans(),
    residual=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([4, 8, 12])),
    hidden=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_the_body_equals_the_torch_layer_in_any_shape(
    kind: str,
    experts: int,
    second: bool,
    residual: bool,
    shape: tuple[int, int, int],
    hidden: int,
    seed: int,
) -> None:
    top_k = min(1 + second, experts)
    config = moe_config(
        kind, shape[2], hidden, num_experts=experts, top_k=top_k, use_residual=residual
    )
    moe, x = moe_layer(config, seed), random_tokens(*shape, seed=seed)
    y = in_reference(moe, config, x)
    np.testing.assert_allclose(y, in_torch(moe, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_lower_expert_wins_a_tie(top_k: int) -> None:
    config = moe_config(top_k=top_k)
    moe, x = moe_layer(config), random_tokens(1, 3, 16)
    torch.nn.init.zeros_(moe.router.weight)
    torch.nn.init.zeros_(moe.router.bias)
    for idle in moe.experts[top_k:]:
        for parameter in idle.parameters():
            torch.nn.init.zeros_(parameter)
    routed = in_torch(moe, x)
    assert np.abs(routed - in_torch_meta(moe, x)).max() > 0.1
    np.testing.assert_allclose(in_reference(moe, config, x), routed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def in_torch_meta(moe: MoE, x: Floats) -> Floats:
    assert moe.meta is not None
    return np.asarray(moe.meta(torch.from_numpy(x)).numpy(), np.float32)


def test_the_inputs_stand_in_the_documented_order() -> None:
    swiglu = MoESpec.of(moe_config(num_experts=2, use_residual=True)).weight_names
    assert swiglu == [
        *("router.weight", "router.bias", "coefficient.weight", "coefficient.bias"),
        *("experts.0.gate.weight", "experts.0.up.weight", "experts.0.down.weight"),
        *("experts.1.gate.weight", "experts.1.up.weight", "experts.1.down.weight"),
        *("meta.gate.weight", "meta.up.weight", "meta.down.weight"),
    ]
    bare = moe_config("phi", num_experts=1, router_bias=False, meta_expert=False)
    assert MoESpec.of(bare).weight_names == [
        *("router.weight", "experts.0.fc1.weight", "experts.0.fc1.bias"),
        *("experts.0.fc2.weight", "experts.0.fc2.bias"),
    ]
    attributes = {"activation": "gelu_tanh", "top_k": 1, "num_experts": 1}
    assert MoESpec.of(bare).attributes == attributes
