"""What the stress script builds on, tried on a tiny random Llama: see stress_smollm2.py."""

import math
from typing import Any

import numpy as np
import onnx
import pytest
import stress_smollm2
import torch
from onnx.reference import ReferenceEvaluator
from stress_methods import EXPERT_METHODS, METHODS, dynamic_uint8
from torch import Tensor, nn

from medmoe_edge.models.decoder import MoE

IDS = torch.arange(3 * 40).view(3, 40) * 7 % 97


@pytest.fixture
def llama() -> Any:
    """Four layers, grouped queries, random weights; every channel of the norms differs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model: nn.Module = LlamaForCausalLM(config)
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
    return model


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return torch.stack(list(stress_smollm2.predictions(model, IDS)))


def test_experts_and_meta_expert_add_up_to_the_layer_they_came_from(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stress_smollm2, "NOISE", 0.0)
    monkeypatch.setattr(stress_smollm2, "CONFIDENCE", 1.0)  # of equal experts: the sum is exact
    expected, before = logits(llama), {n: p.clone() for n, p in llama.named_parameters()}
    stress_smollm2.upcycle(llama, IDS)
    torch.testing.assert_close(logits(llama), expected, rtol=0, atol=1e-2)
    kinds = [isinstance(layer.mlp, MoE) for layer in llama.model.layers]
    assert kinds == [True, False, True, False]
    moved = [name for name, old in before.items() if name in dict(llama.named_parameters())]
    weights = dict(llama.named_parameters())
    assert all(
        (weights[name] - before[name]).abs().max() > 0.01 for name in moved if "proj" in name
    )


def test_every_expert_is_chosen_and_weighed_as_was_asked(llama: Any) -> None:
    states = stress_smollm2.feed_forward_inputs(llama, IDS)
    assert [tuple(x.shape) for x in states] == [(120, 32)] * 4
    moe = stress_smollm2.experts_from(
        llama.model.layers[0].mlp, states[0], torch.Generator().manual_seed(0)
    )
    chances = moe.router_logits(states[0]).softmax(-1)
    assert float(chances.amax(-1).mean()) == pytest.approx(stress_smollm2.CONFIDENCE, abs=0.01)
    assert chances.argmax(-1).bincount(minlength=4).min() >= 12  # of 120 tokens


def test_clusters_are_the_directions_that_tokens_gather_in() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.eye(3, 8).repeat(50, 1) * torch.linspace(0.1, 30, 150)[:, None]  # of any length
    x = truth + 0.01 * torch.randn(truth.shape, generator=generator)
    # three of the first tokens lie in one direction each
    found = stress_smollm2.cluster_directions(x, 3, generator)
    assert sorted((found @ torch.eye(8, 3)).argmax(1).tolist()) == [0, 1, 2]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_activations_are_rounded_as_onnx_does_it(shift: float) -> None:
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)) + shift
    nodes = [
        onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, x.shape)], [value("y", 1, x.shape)])
    (expected,) = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(dynamic_uint8(x).numpy(), np.asarray(expected), rtol=1e-5, atol=1e-6)
    assert dynamic_uint8(torch.zeros(2, 3)).eq(0).all()


def test_every_method_approximates_and_leaves_the_model_as_it_was(llama: Any) -> None:
    stress_smollm2.upcycle(llama, IDS)
    expected = logits(llama)
    statistics = stress_smollm2.collect(llama, IDS)
    folds = stress_smollm2.folds_of(llama, statistics)
    quantised = [name for names, _ in folds for name in names]
    assert sorted(quantised) == sorted(stress_smollm2.matrices(llama))
    assert len(quantised) == 4 * 4 + 2 * 3 + 2 * 5 * 3
    methods = {name: stress_smollm2.each_fold(method) for name, method in METHODS.items()}
    rows = list(stress_smollm2.compare(llama, folds, IDS, methods))
    assert torch.equal(logits(llama), expected)
    plain, *others = rows
    assert plain.method == "fp32"
    losses = torch.nn.functional.cross_entropy(expected.flatten(0, 1), IDS[:, 1:].flatten())
    assert plain.perplexity == pytest.approx(math.exp(losses), rel=1e-3)
    for row in others:
        assert row.change == pytest.approx(row.perplexity / plain.perplexity - 1, abs=1e-3)
        assert 0 < row.divergence < (0.1 if row.method.startswith("int8") else 1.5), row
    divergence = {row.method: row.divergence for row in others}
    assert (
        divergence["int4, groups of 32, GPTQ"] < 0.7 * divergence["int4, groups of 32, to nearest"]
    )
    bits = {row.method: row.bits for row in rows}
    assert bits["int4, groups of 32, GPTQ"] == 4.5
    assert bits["nf4 bitsandbytes"] == 4.5


def test_experts_are_rounded_alone(llama: Any) -> None:
    stress_smollm2.upcycle(llama, IDS)
    folds = stress_smollm2.folds_of(llama, stress_smollm2.collect(llama, IDS))
    expected = logits(llama)
    methods = {
        name: stress_smollm2.experts_alone(method) for name, method in EXPERT_METHODS.items()
    }
    plain, *rows = stress_smollm2.compare(llama, folds, IDS, methods)
    assert torch.equal(logits(llama), expected)
    assert plain.divergence == 0
    found = {row.method: row for row in rows}
    assert found["in int4, groups of 32"].bits == 4.5
    assert found["meta int4, deltas 4 bits"].bits == 4.5, "equal bytes"
    assert found["meta int4, deltas 2 bits"].bits == pytest.approx((4.5 + 4 * 2.5) / 5)
    four, two = (found[f"meta int8, deltas {bits} bits"].divergence for bits in (4, 2))
    assert 0 < four < two
