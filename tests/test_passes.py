"""Each pass over the graph alone: quantise_weights, lower_moe, lower_matmul."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from graphs import (
    Floats,
    initializer,
    model,
    moe_config,
    moe_layer,
    moe_model,
    random_tokens,
    run_all,
    run_ort,
)
from torch import nn

from medmoe_edge.export.builder import CONTRIB, Builder, floats
from medmoe_edge.export.external_data import save_model
from medmoe_edge.export.moe_op import MoESpec
from medmoe_edge.export.ort_matmul import lower_matmul
from medmoe_edge.export.ort_moe import lower_moe
from medmoe_edge.export.quantise import decoder_policy, quantise_weights
from medmoe_edge.export.vision import vision_policy


def op_types(graph: ir.Model) -> Counter[str]:
    """How often each op occurs, branches included."""
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(graph.graph))


def constant(graph: ir.Model, name: str) -> npt.NDArray[Any]:
    tensor = graph.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def weight(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- quantise_weights -------------------------------------------------------------------------


def products_model() -> ir.Model:
    """One weight for each way in which a weight is multiplied, and a norm."""
    build = Builder()
    x = floats("x", 1, 3, 8, 8)
    arrays = {
        "conv": weight(6, 3, 8, 8),
        "matmul": weight(6, 5),
        "gemm": weight(5, 7),
        "transposed": weight(4, 7),
        "norm": np.ones(4, np.float32),
    }
    w = {name: initializer(name, array) for name, array in arrays.items()}
    y = build.op("Reshape", build.op("Conv", x, w["conv"]), build.constant([1, 6]))
    y = build.op("Gemm", build.op("MatMul", y, w["matmul"]), w["gemm"])
    y = build.op("Mul", build.op("Gemm", y, w["transposed"], transB=1), w["norm"])
    y.name, y.dtype = "y", ir.DataType.FLOAT
    return model([x], [y], build, list(w.values()))


def test_quantised_weights_are_near_in_every_output_channel() -> None:
    x = random_tokens(3, 8, 8)[None]
    before = products_model()
    expected = run_ort(before, x=x)
    after, modified = quantise_weights(products_model(), vision_policy(before).__contains__)
    assert modified
    assert vision_policy(before) == {"conv", "matmul", "gemm", "transposed"}
    axes = {}
    for node in after.graph:
        if node.op_type == "DequantizeLinear":
            integers, scales = (value.name for value in node.inputs if value is not None)
            assert integers is not None
            assert scales is not None
            assert scales == f"{integers}.scale"
            axis = axes[integers] = node.attributes["axis"].as_int()
            q, scale = constant(after, integers), constant(after, scales).astype(np.float64)
            assert q.dtype.name == "int8"
            step = scale.reshape([-1 if i == axis else 1 for i in range(q.ndim)])
            error = np.abs(q * step - constant(before, integers).astype(np.float64))
            assert (error <= step * 0.5001).all()
    assert axes == {"conv": 0, "matmul": 1, "gemm": 1, "transposed": 0}  # the output channels
    assert np.array_equal(constant(after, "norm"), constant(before, "norm"))
    error = np.abs(run_ort(after, x=x) - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.03


@pytest.mark.parametrize("columns", [8, 300])  # scales beside the graph, and within it
def test_a_weight_is_read_once_and_not_before_it_is_written(tmp_path: Path, columns: int) -> None:
    reads = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(weight(16, columns))

    build = Builder()
    x = floats("x", 1, 16)
    lazy = ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([16, columns]), name="w")
    w = ir.Value(
        name="w", shape=lazy.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=lazy
    )
    y = build.op("MatMul", x, w)
    y.name, y.dtype = "y", ir.DataType.FLOAT
    graph, _ = quantise_weights(model([x], [y], build, [w]), lambda name: True)
    lower_matmul(graph)
    assert reads == []
    save_model(graph, tmp_path, "w")
    assert reads == [1]


def test_nothing_chosen_leaves_the_model_as_it_is() -> None:
    graph = products_model()
    before = ir.to_proto(graph).SerializeToString()
    assert quantise_weights(graph, lambda name: False) == (graph, False)
    assert ir.to_proto(graph).SerializeToString() == before


def test_the_decoder_policy_spares_what_decides_and_what_is_small() -> None:
    chosen = ["attention.q.weight", "ffn.experts.0.up.weight", "ffn.meta.fc1.weight"]
    spared = [
        *("input_norm.weight", "post_norm.weight", "attention.q.bias", "ffn.meta.fc1.bias"),
        *("ffn.router.weight", "ffn.coefficient.weight"),
    ]
    assert all(decoder_policy(f"decoder.layers.0.{name}") for name in chosen)
    assert not any(decoder_policy(f"decoder.layers.0.{name}") for name in spared)
    assert decoder_policy("decoder.head.weight")
    assert not decoder_policy("decoder.norm.weight")


# --- lower_moe --------------------------------------------------------------------------------

STRUCTURES: list[tuple[str, dict[str, Any]]] = [
    ("stablelm", {"top_k": 1}),
    ("stablelm", {"top_k": 2, "use_residual": True}),
    ("phi", {"top_k": 2, "router_bias": False}),
    ("phi", {"top_k": 1, "meta_expert": False}),
]


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


# --- lower_matmul -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), STRUCTURES)
def test_quantised_products_are_fused_also_in_branches(kind: str, options: dict[str, Any]) -> None:
    config = moe_config(kind, **options)
    moe, x = moe_layer(config), random_tokens(2, 9, 16)

    def quantised() -> ir.Model:
        graph, _ = quantise_weights(moe_model(moe, config), decoder_policy)
        return lower_moe(graph, MoESpec.of(config))[0]

    fused, modified = lower_matmul(quantised())
    assert modified
    matrices = sum(isinstance(part, nn.Linear) for part in moe.modules())
    spared = 1 + config.moe.use_residual if config.moe else 0  # router and coefficient
    ops = op_types(fused)
    assert (ops["DynamicQuantizeMatMul"], ops["MatMul"]) == (matrices - spared, spared)
    assert ops["DequantizeLinear"] == 0
    assert fused.graph.opset_imports[CONTRIB] == 1
    assert lower_matmul(fused) == (fused, False)
    expected = run_ort(quantised(), x=x)
    error = np.abs(run_ort(fused, x=x) - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.03


def test_a_weight_that_is_also_used_otherwise_stays() -> None:
    build = Builder()
    x, w, plain = floats("x", 2, 4), initializer("w", weight(4, 4)), initializer("p", weight(4, 4))
    product = build.op("MatMul", build.op("MatMul", x, plain), w)
    product.name, product.dtype = "product", ir.DataType.FLOAT
    added = build.op("Add", product, build.op("Slice", w, *map(build.constant, ([0], [2]))))
    added.name, added.dtype = "added", ir.DataType.FLOAT
    graph = model([x], [product, added], build, [w, plain])
    quantise_weights(graph, {"w"}.__contains__)
    lower_matmul(graph)
    expected = {"DynamicQuantizeMatMul": 1, "MatMul": 1, "DequantizeLinear": 1}
    assert {name: op_types(graph)[name] for name in expected} == expected
    assert [output.name for output in graph.graph.outputs] == ["product", "added"]
    assert np.isfinite(run_ort(graph, x=weight(2, 4, seed=1))).all()
