"""Graphs for each version of TensorRT: in the operators of its parser, and with the same meaning.

The specification runs in ONNX Runtime; a version's graph runs in ONNX's reference evaluator, where
the plugin's kernels are interpreted, and in ONNX Runtime where it has no plugin. That of TensorRT
for RTX, which can be loaded here, parses and builds them.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from interpreted import RoutedHidden, RoutedOutput, interpret
from onnx.reference import ReferenceEvaluator
from test_attention_op import CAPACITY, attention_model, decoder_of, feeds, naive

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle, Target
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import MissingDependencyError
from medmoe_edge.evaluation.targets import GraphRuntime
from medmoe_edge.export import targets
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.gpus import load_library, make_logger
from medmoe_edge.export.jetson import OLDEST_TENSORRT
from medmoe_edge.export.passes.tensorrt_parser import (
    OPERATORS,
    OPSETS,
    Parser,
    attention_function,
    write_for,
)
from medmoe_edge.export.stored import specification
from medmoe_edge.export.targets import lower, vision_graph
from medmoe_edge.export.tensorrt_builder import parse
from medmoe_edge.runtimes.base import own_logits

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
Make = Callable[..., Path]
VERSIONS = ("10.3.0", "10.9.0", "10.13.3", "10.14.1", "10.15.1", "11.4.1")
POSITIONS = 16
HALF = 1e-2  # of logits, relative; int8 and int4 are the same integers in both graphs
SINGLE = 1e-5  # 1e-3 is asked; no form is off by more than 2e-6
MARGIN = 0.02  # of a token's chosen experts before the next one, in probability


def target(version: str) -> Target:
    return Target("tensorrt", "fp16", "sm87", version, POSITIONS, POSITIONS)


def graph(bundle: Bundle, version: str) -> ir.Model:
    model = specification(bundle)
    lower(model, bundle.config, target(version))
    return model


# --- the lists ----------------------------------------------------------------------------------


def test_a_later_parser_takes_all_that_an_earlier_one_does() -> None:
    parsers = [Parser.of(tuple(map(int, version.split(".")))[:2]) for version in VERSIONS]
    for earlier, later in itertools.pairwise(parsers):
        assert earlier.operators <= later.operators
        assert earlier.opset <= later.opset
    assert [parser.opset for parser in parsers] == [20, 21, 24, 24, 24, 24]
    assert [parser.plugins for parser in parsers] == [False, True, True, True, True, True]
    assert [parser.in_place for parser in parsers] == [False] * 4 + [True] * 2
    assert min(OPSETS) == OLDEST_TENSORRT


def test_the_lists_name_operators_of_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    older = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of experimental ONNX
    names = [name for names in OPERATORS.values() for name in names.split()]
    assert set(names) - known == older
    assert len(names) == len(set(names))


# --- the graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("tiny", "fp32"), ("tiny", "int8"), ("tiny", "int4"), ("tiny-phi", "int4")],
)
def test_a_graph_is_in_the_words_of_its_parser(
    tiny_bundle: Make, version: str, preset: str, precision: str
) -> None:
    bundle = Bundle.open(tiny_bundle(precision, preset))
    parser = Parser.of_target(target(version))
    for model in (graph(bundle, version), vision_graph(bundle, target(version))):
        used = {node.op_type for node in model.graph if node.domain == ""}
        assert used <= parser.operators
        assert {node.domain for node in model.graph} <= {"", "medmoe"}
        assert model.graph.opset_imports[""] <= parser.opset
        assert not model.functions
        for node in model.graph:
            if node.op_type == "Attention":
                mask = node.inputs[3]
                assert mask is not None
                made = mask.producer()
                assert made is not None
                assert made.op_type == "Unsqueeze"  # to four axes
            if node.op_type == "TensorScatter":
                assert node.attributes["axis"].as_int() == -2


def evaluate(proto: onnx.ModelProto, steps: list[Floats]) -> list[Floats]:
    """The logits of each step, in ONNX's own evaluator."""
    runs = ReferenceEvaluator(proto, new_ops=[RoutedHidden, RoutedOutput])
    types = {1: np.float32, 10: np.float16}
    past = {
        value.name: np.zeros(
            [axis.dim_value for axis in value.type.tensor_type.shape.dim],
            types[value.type.tensor_type.elem_type],
        )
        for value in proto.graph.input
        if value.name.startswith("past_")
    }
    logits, start = [], 0
    names = [value.name for value in proto.graph.output]
    for embeds in steps:
        given: dict[str, Any] = {"embeds": embeds[None], "start": np.array([start]), **past}
        told = dict(zip(names, runs.run(None, given), strict=True))
        past = {name: told[name.replace("past", "present")] for name in past}
        logits.append(np.asarray(told["logits"][0]))
        start += len(embeds)
    return logits


def summed(proto: onnx.ModelProto) -> set[int]:
    """The types of what CumSum adds, as far as ONNX can tell: not beyond the first plugin."""
    known = onnx.shape_inference.infer_shapes(proto).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    sums = [node.input[0] for node in proto.graph.node if node.op_type == "CumSum"]
    found = {types[name] for name in sums if name in types}
    assert bool(found) == bool(sums)
    return found


def in_onnxruntime(bundle: Bundle, decoder: Path, steps: list[Floats]) -> list[Floats]:
    runtime = GraphRuntime(bundle, bundle.path("vision.onnx"), decoder)
    cache = runtime.new_cache(POSITIONS)
    return [runtime.step(embeds, cache).logits for embeds in steps]


def off(found: list[Floats], wanted: list[Floats]) -> float:
    return max(
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, wanted, strict=True)
    )


def untied(bundle: Bundle, folder: Path) -> tuple[list[Floats], list[Floats]]:
    """Steps of which no token is near a tie of two experts, and their logits as specified.

    A tie is for rounding to decide, and what comes after it says nothing of the graph.
    """
    save_model(specification(bundle), folder, "specified")
    runtime = GraphRuntime(bundle, bundle.path("vision.onnx"), folder / "specified.onnx")
    size, moe = bundle.config.decoder.hidden_size, bundle.config.moe
    assert moe is not None
    for seed in range(500):
        random = np.random.default_rng(seed)
        steps = [random.normal(0, 0.2, (rows, size)).astype(np.float32) for rows in (5, 1)]
        cache = runtime.new_cache(POSITIONS)
        found = [runtime.step(embeds, cache) for embeds in steps]
        routing = np.concatenate([own_logits(step.router_logits, moe) for step in found])
        shares = np.exp(routing - routing.max(-1, keepdims=True))
        shares = np.sort(shares / shares.sum(-1, keepdims=True))[..., ::-1]
        if float((shares[..., moe.top_k - 1] - shares[..., moe.top_k]).min()) > MARGIN:
            return steps, [step.logits for step in found]
    raise AssertionError("every input has a token near a tie")


@pytest.mark.parametrize("version", ["10.3.0", "10.9.0", "10.15.1"])
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("tiny", "fp32"), ("tiny", "int8"), ("tiny", "int4"), ("tiny-phi", "int4")],
)
def test_a_graph_means_what_is_specified(
    tiny_bundle: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    preset: str,
    precision: str,
) -> None:
    interpret(monkeypatch)
    bundle = Bundle.open(tiny_bundle(precision, preset))
    save_model(graph(bundle, version), tmp_path, "decoder")
    path = tmp_path / "decoder.onnx"
    onnx.checker.check_model(path)
    proto = onnx.load(path)
    assert summed(proto) <= {onnx.TensorProto.FLOAT}  # no other type is listed
    steps, wanted = untied(bundle, tmp_path)
    assert 0 < off(evaluate(proto, steps), wanted) < HALF
    if all(node.domain == "" for node in proto.graph.node):
        assert 0 < off(in_onnxruntime(bundle, path, steps), wanted) < HALF


@pytest.mark.parametrize(
    ("preset", "precision", "version"),
    [
        *(("tiny", "fp32", version) for version in VERSIONS),
        *(("tiny-phi", "fp32", version) for version in ("10.3.0", "10.14.1", "10.15.1")),
        *(("tiny", precision, "10.3.0") for precision in ("int8", "int4")),  # plugins need half
    ],
)
def test_a_whole_decoder_in_fp32_means_the_same(
    tiny_bundle: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    preset: str,
    precision: str,
) -> None:
    """A graph before it is put in half, so that a deviation is the form's and not rounding's."""
    monkeypatch.setattr(targets, "to_half_graph", lambda *_: None)
    bundle = Bundle.open(tiny_bundle(precision, preset))
    save_model(graph(bundle, version), tmp_path, "decoder")
    proto = onnx.load(tmp_path / "decoder.onnx")
    kinds = {value.type.tensor_type.elem_type for value in proto.graph.input}
    assert kinds == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    steps, wanted = untied(bundle, tmp_path)
    assert 0 < off(evaluate(proto, steps), wanted) < SINGLE
    assert 0 <= off(in_onnxruntime(bundle, tmp_path / "decoder.onnx", steps), wanted) < SINGLE


@pytest.mark.parametrize(("earlier", "later"), [("10.9.0", "10.13.3"), ("10.15.1", "11.4.1")])
def test_versions_between_share_a_form(tiny_bundle: Make, earlier: str, later: str) -> None:
    bundle = Bundle.open(tiny_bundle("int4"))
    forms = [
        [(node.domain, node.op_type, len(node.inputs)) for node in graph(bundle, version).graph]
        for version in (earlier, later)
    ]
    assert forms[0] == forms[1]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_attention_in_fp32_equals_a_naive_loop(version: str, fraction: float) -> None:
    decoder = decoder_of(2, 16, fraction)
    parser = Parser.of_target(target(version))
    model = attention_model(decoder)
    write_for(model, parser, decoder)
    assert {node.op_type for node in model.graph} <= parser.operators
    for length, start in ((1, 0), (5, 3), (6, CAPACITY - 6)):
        given = feeds(decoder, length, start, seed=length)
        runs = ReferenceEvaluator(ir.to_proto(model))
        y, *_ = runs.run(None, given | {"start": np.array([start])})
        assert off([np.asarray(y[0])], [np.asarray(naive(decoder, given, start))]) < SINGLE


def test_a_cache_that_is_not_read_right_is_noticed() -> None:
    """The bound of the test above is one that a fault exceeds."""
    decoder = decoder_of(2, 16, 0.25)
    model = attention_model(decoder)
    write_for(model, Parser.of_target(target("10.3.0")), decoder)
    written = [node for node in model.graph if node.op_type == "ScatterND"][-1]
    (before,) = written.inputs[:1]
    assert before is not None
    for node in [use.node for use in written.outputs[0].uses()]:
        node.replace_input_with(node.inputs.index(written.outputs[0]), before)
    given = feeds(decoder, 5, 3, seed=0)
    y, *_ = ReferenceEvaluator(ir.to_proto(model)).run(None, given | {"start": np.array([3])})
    assert off([np.asarray(y[0])], [np.asarray(naive(decoder, given, 3))]) > 10 * SINGLE


@pytest.mark.parametrize("version", ["10.3.0", "10.14.1"])
def test_tensorrt_for_rtx_parses_a_graph_without_plugins(tmp_path: Path, version: str) -> None:
    """Its parser is that of TensorRT 11: an independent reader of the older forms."""
    try:
        trt = load_library("tensorrt-rtx")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    bundle, log = Bundle.open(bundle_path("nano")), make_logger(trt)
    model = specification(bundle)
    parser = Parser.of_target(target(version))
    model.functions[("medmoe", "Attention", "")] = attention_function(bundle.config.decoder, parser)
    if version == "10.3.0":
        lower(model, bundle.config, target(version))
    else:
        write_for(model, parser, bundle.config.decoder)
    save_model(model, tmp_path, "decoder")
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    kept = parse(trt, network, log, tmp_path / "decoder.onnx", "TensorRT")
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    assert "logits" in outputs
    del kept
