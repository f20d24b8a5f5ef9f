"""The pass lower_moe_to_plugin: the two ops, run by the kernels, equal the function body."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import (
    Floats,
    constant,
    moe_config,
    moe_layer,
    moe_model,
    op_types,
    random_tokens,
)
from interpreted import RoutedHidden, RoutedOutput, interpret
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from medmoe_edge.calibration.quantisers import Format
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import ConfigError
from medmoe_edge.export.decoder import MoESpec
from medmoe_edge.export.half import routing, to_half_graph
from medmoe_edge.export.passes.ort_cpu import lower_matmul, lower_moe
from medmoe_edge.export.passes.tensorrt import lower_moe_to_plugin
from medmoe_edge.export.plan import Plan
from medmoe_edge.export.quantise import quantise_weights
from medmoe_edge.models.decoder import MoE

# Activations divide by 1 + exp(-u), which may be infinite: the quotient is then 0, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
INT8, INT4, INT4_128 = Format(8), Format(4, 32), Format(4, 128)
FP16, BF16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
STRUCTURES: list[tuple[str, dict[str, Any], Format, ir.DataType]] = [
    ("stablelm", {"top_k": 1}, INT4, FP16),
    ("stablelm", {"top_k": 2, "use_residual": True}, INT8, FP16),
    ("stablelm", {"top_k": 2, "meta_expert": False}, INT4_128, BF16),
    ("phi", {"top_k": 1, "use_residual": True}, INT4, BF16),
    ("phi", {"top_k": 2, "router_bias": False}, INT4_128, FP16),
    ("phi", {"top_k": 1, "meta_expert": False, "num_experts": 7}, INT8, BF16),
]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)


def quantised(moe: MoE, config: ModelConfig, *formats: Format) -> ir.Model:
    """Its experts in these formats, one after the other."""
    names = (f"decoder.layers.0.ffn.{name}" for name in MoESpec.of(config).weight_names)
    matrices = [name for name in names if name.endswith(".weight") and "router" not in name]
    chosen = {name: formats[i % len(formats)] for i, name in enumerate(matrices)}
    return quantise_weights(moe_model(moe, config), Plan("int4", "rtn", formats=chosen))[0]


def evaluated(graph: ir.Model, x: Floats) -> Floats:
    """In ONNX's evaluator, where the two ops run the kernels."""
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto)
    if graph.functions:  # the evaluator runs Gelu only where it sees the types
        proto = onnx.shape_inference.infer_shapes(inline_local_functions(proto))
    (y,) = ReferenceEvaluator(proto, new_ops=[RoutedHidden, RoutedOutput]).run(None, {"x": x})
    return np.asarray(y, np.float32)


@pytest.mark.parametrize(("kind", "options", "form", "half"), STRUCTURES)
def test_the_plugin_equals_the_function(
    kind: str, options: dict[str, Any], form: Format, half: ir.DataType
) -> None:
    size = 128 if form.group == 128 else 32
    config = moe_config(kind, size=size, hidden=size, **options)
    moe, spec = moe_layer(config), MoESpec.of(config)
    lowered, modified = lower_moe_to_plugin(quantised(moe, config, form), spec, half)
    assert modified
    ops = op_types(lowered)
    assert ops["RoutedHidden"] == ops["RoutedOutput"] == 1
    assert ops["DequantizeLinear"] == 0
    assert not lowered.functions
    assert lower_moe_to_plugin(lowered, spec, half) == (lowered, False)
    for batch, length in ((1, 1), (3, 11)):
        x = random_tokens(batch, length, size)
        y, expected = (evaluated(graph, x) for graph in (lowered, quantised(moe, config, form)))
        assert y.shape == x.shape
        error = float(np.abs(y - expected).max() / np.abs(expected).max())
        assert 0 < error < (3e-3 if half == FP16 else 1e-2)


def lowered_experts(*formats: Format) -> ir.Model:
    config = moe_config(size=128, hidden=128)
    return lower_moe_to_plugin(quantised(moe_layer(config), config, *formats), MoESpec.of(config))[
        0
    ]


@pytest.mark.parametrize("form", [INT4, INT4_128])
def test_groups_are_packed_as_for_onnx_runtime(form: Format) -> None:
    config = moe_config(size=128, hidden=128)
    other, _ = lower_moe(quantised(moe_layer(config), config, form), MoESpec.of(config))
    other, _ = lower_matmul(other)
    ours = lowered_experts(form)
    name = "decoder.layers.0.ffn.experts.1.up.weight"
    packed = constant(ours, f"{name}.packed")
    assert packed.dtype == np.int8  # TensorRT's parser widens uint8
    theirs = constant(other, f"{name}.packed")
    assert packed.shape == theirs.shape
    assert packed.tobytes() == theirs.tobytes()
    scale = f"{name}.groups.scale"
    assert np.array_equal(constant(ours, scale), constant(other, scale))


def test_the_nodes_name_their_plugin() -> None:
    nodes = [node for node in lowered_experts(INT8).graph if node.domain == "medmoe"]
    assert [node.op_type for node in nodes] == ["RoutedHidden", "RoutedOutput"]
    for node, count in zip(nodes, (3 + 5 * 4, 4 + 5 * 2), strict=True):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert attributes.pop("activation", "swiglu") == "swiglu"
        assert attributes == {
            "plugin_namespace": "medmoe_swiglu_5",
            "plugin_version": "1",
            "aot": 1,
        }
        assert len(node.inputs) == count
        assert node.outputs[0].dtype == FP16


def test_only_casts_stand_between_the_plugin_and_fp32() -> None:
    graph = lowered_experts(INT4).graph
    first = next(node for node in graph if node.op_type == "RoutedHidden")
    x = first.inputs[0]
    assert x is not None
    assert x.producer() is not None
    assert x.dtype == FP16
    (last,) = next(node for node in graph if node.op_type == "RoutedOutput").outputs
    assert [use.node.op_type for use in last.uses()] == ["Cast"]


@pytest.mark.parametrize("half", [FP16, BF16])
def test_gates_and_scales_stay_fp32_in_a_graph_of_half(half: ir.DataType) -> None:
    config = moe_config(size=32, hidden=32, use_residual=True)
    moe, x = moe_layer(config), random_tokens(1, 5, 32)
    graph, _ = lower_moe_to_plugin(quantised(moe, config, INT8), MoESpec.of(config), half)
    routes = routing(graph)
    to_half_graph(graph, half, lambda node: routes(node) or node.domain == "medmoe")
    node = next(node for node in graph.graph if node.op_type == "RoutedOutput")
    gates, scale = node.inputs[2], node.inputs[5]
    assert gates is not None
    assert scale is not None
    producer = gates.producer()
    assert producer is not None
    assert producer.op_type == "Concat"  # no Cast: they were never half
    assert scale.dtype == ir.DataType.FLOAT
    y, expected = evaluated(graph, x), evaluated(quantised(moe, config, INT8), x)
    assert 0 < float(np.abs(y - expected).max() / np.abs(expected).max()) < 1e-2


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ((Format(2, 32),), "experts.0.gate.weight: it is 2 bits in groups of 32"),
        ((Format(4, 64),), "experts.0.gate.weight: it is 4 bits in groups of 64"),
        ((INT8, INT4), "experts.0.gate.weight and .*experts.0.up.weight are in formats"),
    ],
)
def test_formats_without_a_kernel_are_refused(formats: tuple[Format, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lowered_experts(*formats)


def test_experts_that_are_not_quantised_are_refused() -> None:
    config = moe_config(size=32, hidden=32)
    with pytest.raises(ConfigError, match="it is not quantised"):
        lower_moe_to_plugin(moe_model(moe_layer(config), config), MoESpec.of(config))


def test_tensorrts_parser_takes_all_but_the_plugin() -> None:
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx")  # loads the library
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert not parser.parse(ir.to_proto(lowered_experts(INT4)).SerializeToString())
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    assert [error.node_operator() for error in errors] == ["RoutedHidden", "RoutedOutput"]
    assert all("Plugin not found" in error.desc() for error in errors)
