"""The pass to_half_graph: what becomes half, what stays fp32, and what a graph then computes."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import (
    constant,
    initializer,
    model,
    moe_config,
    moe_layer,
    moe_model,
    named,
    normal,
    op_types,
    product_model,
    run_all,
    run_ort,
)
from onnx_ir.passes.common import InlinePass

from medmoe_edge.calibration.quantisers import Format, round_to_nearest
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import Builder, floats
from medmoe_edge.export.half import routing, to_half_graph
from medmoe_edge.export.quantise import quantise_weights

HALF, BRAIN = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def nothing(node: ir.Node) -> bool:
    return False


def only(op_type: str) -> Callable[[ir.Node], bool]:
    return lambda node: node.op_type == op_type


def inlined_moe(top_k: int = 2) -> ir.Model:
    config = moe_config(top_k=top_k, use_residual=True)
    graph = moe_model(moe_layer(config), config)
    InlinePass()(graph)
    return graph


def types(graph: ir.Model) -> dict[str, str]:
    """The type that ONNX itself infers of every node's outputs, strictly."""
    proto = ir.to_proto(graph)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    return {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in [*inferred.graph.value_info, *inferred.graph.output]
    }


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_the_arithmetic_is_half_and_the_borders_are_not(dtype: ir.DataType) -> None:
    graph = product_model(normal(32, 16))
    assert to_half_graph(graph, dtype, nothing) == (graph, True)
    assert op_types(graph) == {"Cast": 2, "MatMul": 1}
    assert graph.graph.initializers["w"].dtype == dtype
    (product,) = (node for node in graph.graph if node.op_type == "MatMul")
    found = types(graph)
    assert found[str(product.outputs[0].name)] == dtype.name
    assert found["y"] == "FLOAT"
    assert [value.dtype for value in graph.graph.inputs] == [ir.DataType.FLOAT]


def test_it_computes_with_rounded_weights_and_inputs() -> None:
    weight, x = normal(32, 16), normal(1, 5, 32, seed=1)
    graph, _ = to_half_graph(product_model(weight), HALF, nothing)
    x16, w16 = (array.astype(np.float16).astype(np.float64) for array in (x, weight))
    expected = (x16 @ w16).astype(np.float16)
    np.testing.assert_allclose(run_ort(graph, x=x), expected, rtol=2e-3, atol=2e-3)


def test_what_is_kept_reads_and_yields_fp32() -> None:
    build, x = Builder(), floats("x", 1, "S", 8)
    weights = [initializer(name, normal(8, 8, seed=n)) for n, name in enumerate("abc")]
    first = build.op("MatMul", x, weights[0])
    scores = build.op("Softmax", build.op("MatMul", first, weights[1]), axis=-1)
    both = build.op("Mul", build.op("MatMul", first, weights[2]), scores)
    graph = model([x], [named("y", both)], build, weights)
    to_half_graph(graph, HALF, only("Softmax"))
    products = [node for node in graph.graph if node.op_type in ("MatMul", "Mul")]
    (softmax,) = (node for node in graph.graph if node.op_type == "Softmax")
    found = types(graph)
    assert found[str(softmax.outputs[0].name)] == "FLOAT"
    assert {found[str(node.outputs[0].name)] for node in products} == {"FLOAT16"}
    assert op_types(graph)["Cast"] == 4  # x, y, into softmax and out of it: none twice


def test_a_weight_that_fp32_and_half_share_is_stored_once_in_fp32() -> None:
    build, x, w = Builder(), floats("x", 8), initializer("w", normal(8))
    exact = build.op("Softmax", build.op("Identity", w))
    graph = model([x], [named("y", build.op("Add", build.op("Mul", x, w), exact))], build, [w])
    to_half_graph(graph, HALF, only("Identity"))
    assert [value.dtype for value in graph.graph.initializers.values()] == [ir.DataType.FLOAT]
    assert types(graph)["y"] == "FLOAT"
    x_ = normal(8, seed=1)
    stored = constant(graph, "w")
    expected = x_ * stored + np.exp(stored) / np.exp(stored).sum()
    np.testing.assert_allclose(run_ort(graph, x=x_), expected, rtol=5e-3, atol=5e-3)


def test_constants_are_halved_with_their_users() -> None:
    build, x = Builder(), floats("x", 4)
    small, tiny = build.op("Constant", value_float=0.5), build.constant(1e-30, np.float32)
    count = build.op("Constant", value_ints=[4])
    kept = build.op("Log", build.op("Max", x, tiny))
    filled = build.op("Expand", build.op("ConstantOfShape", count), build.op("Shape", x))
    graph = model(
        [x], [named("y", build.op("Sum", build.op("Mul", kept, small), filled))], build, []
    )
    to_half_graph(graph, HALF, lambda node: node.op_type in ("Log", "Max"))
    found = types(graph)
    made = {node.op_type: found[str(node.outputs[0].name)] for node in graph.graph}
    assert (made["Log"], made["Mul"], made["Expand"]) == ("FLOAT", "FLOAT16", "FLOAT16")
    y = run_ort(graph, x=np.array([0, 1, np.e, 1e-30], np.float32))
    np.testing.assert_allclose(y, [np.log(1e-30) / 2, 0, 0.5, np.log(1e-30) / 2], atol=0.03)


def test_what_onnx_does_not_define_on_half_stays_fp32() -> None:
    build, x = Builder(), floats("x", 1, 1, 4, 4)
    sizes = initializer("sizes", np.array([1, 1, 2, 2], np.float32))
    larger = build.op("Resize", x, None, sizes, mode="nearest")  # its sizes are always fp32
    rounded = build.op("Celu", build.op("Neg", larger))  # an op of fp32 alone
    graph = model([x], [named("y", build.op("Neg", rounded))], build, [sizes])
    to_half_graph(graph, HALF, nothing)
    found = types(graph)
    made = {node.op_type: found[str(node.outputs[0].name)] for node in graph.graph}
    assert (made["Resize"], made["Celu"], made["Neg"]) == ("FLOAT16", "FLOAT", "FLOAT16")
    assert graph.graph.initializers["sizes"].dtype == ir.DataType.FLOAT
    assert run_ort(graph, x=np.full((1, 1, 4, 4), -2, np.float32)).tolist() == [[[[-2.0] * 8] * 8]]


@pytest.mark.parametrize("form", [Format(8), Format(4, 32)], ids=str)
def test_integers_stay_and_their_scales_are_half(form: Format) -> None:
    weight, x = normal(64, 16), normal(1, 3, 64, seed=1)
    graph = product_model(weight)
    quantise_weights(graph, lambda _: (form, lambda rows: round_to_nearest(rows, form)))
    to_half_graph(graph, HALF, nothing)
    kinds = {name: value.dtype for name, value in graph.graph.initializers.items()}
    assert kinds == {"w": ir.DataType.INT8 if form.bits == 8 else ir.DataType.INT4, "w.scale": HALF}
    assert op_types(graph) == {"Cast": 2, "DequantizeLinear": 1, "MatMul": 1}
    expected = x @ round_to_nearest(np.ascontiguousarray(weight.T), form).dequantise().T
    error = np.abs(run_ort(graph, x=x) - expected).max()
    assert error < 0.02 * np.abs(expected).max()  # which rounds activations to 8 bits


def test_caches_become_half_and_other_outputs_do_not() -> None:
    build = Builder()
    x, past = floats("x", 1, 4), floats("past_key.0", 1, 4)
    present = build.op("Add", past, x)
    present.name, present.dtype = "present_key.0", ir.DataType.FLOAT
    total = named("logits", build.op("Mul", present, x))
    graph = model([x, past], [total, present], build, [])
    to_half_graph(graph, HALF, nothing)
    assert [(v.name, v.dtype) for v in (*graph.graph.inputs, *graph.graph.outputs)] == [
        ("x", ir.DataType.FLOAT),
        ("past_key.0", HALF),
        ("logits", ir.DataType.FLOAT),
        ("present_key.0", HALF),
    ]
    logits, key = run_all(graph, x=normal(1, 4), **{"past_key.0": np.ones((1, 4), np.float16)})
    assert [logits.dtype, key.dtype] == [np.dtype(np.float32), np.dtype(np.float16)]


def test_routing_is_kept_and_nothing_that_depends_on_more() -> None:
    graph = inlined_moe()
    keep = routing(graph)
    kept = [node for node in graph.graph if keep(node)]
    expected = {"TopK", "ScatterElements", "Softmax", "Split", "ReduceSum", "Div", "Shape"}
    assert expected <= {node.op_type for node in kept}
    weights = {str(value.name) for node in kept for value in node.inputs if value}
    assert not any(".experts." in name or ".meta." in name for name in weights)
    to_half_graph(graph, HALF, keep)
    for name, value in graph.graph.initializers.items():
        routes = ".router." in name or ".coefficient." in name
        assert value.dtype == (ir.DataType.FLOAT if routes else HALF), name
    x = normal(1, 9, 16, seed=1)
    exact = run_ort(inlined_moe(), x=x)
    assert np.abs(run_ort(graph, x=x) - exact).max() < 5e-3 * np.abs(exact).max()


def test_a_bf16_graph_is_one_that_onnx_accepts() -> None:
    graph = inlined_moe()
    to_half_graph(graph, BRAIN, routing(graph))
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    assert set(types(graph).values()) == {"BFLOAT16", "FLOAT", "INT64"}


def test_a_graph_without_floats_is_left_alone() -> None:
    build, x = Builder(), ir.val("x", ir.DataType.INT64, [4])
    y = build.op("Neg", x)
    y.name, y.dtype = "y", ir.DataType.INT64
    graph = model([x], [y], build, [])
    assert to_half_graph(graph, HALF, nothing) == (graph, False)


def test_what_cannot_be_is_refused() -> None:
    weight = normal(8, 8)
    weight[3, 4] = 1e5
    graph, _ = to_half_graph(product_model(weight), HALF, nothing)
    with pytest.raises(CheckpointError, match="w holds values that fp16 cannot"):
        constant(graph, "w")
    config = moe_config()
    with pytest.raises(ValueError, match="with functions or branches"):
        to_half_graph(moe_model(moe_layer(config), config), HALF, nothing)
    with pytest.raises(ValueError, match="FLOAT of a graph"):
        to_half_graph(product_model(weight), ir.DataType.FLOAT, nothing)
