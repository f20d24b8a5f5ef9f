"""`medmoe::Attention`: its body against float64, its lowering against its body, its schema."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from graphs import Floats, model, normal, run_all
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from schemas import register_schemas

from medmoe_edge.config import DecoderConfig
from medmoe_edge.export.builder import MEDMOE, Builder, floats
from medmoe_edge.export.decoder import (
    INPUTS,
    OUTPUTS,
    attention_attributes,
    attention_function,
    rotary_cache,
)
from medmoe_edge.export.passes.ort_cpu import lower_attention
from medmoe_edge.presets import PRESETS

CAPACITY = 24


def decoder_of(heads: int, head_size: int, fraction: float) -> DecoderConfig:
    return replace(
        PRESETS["tiny"].decoder,
        hidden_size=heads * head_size,
        heads=heads,
        rotary_fraction=fraction,
        max_positions=64,
    )


def attention_model(decoder: DecoderConfig) -> ir.Model:
    cache = (1, decoder.heads, CAPACITY, decoder.head_size)
    tables = ("P", decoder.rotary_size // 2)
    shapes = [(1, "S", decoder.hidden_size)] * 3 + [cache] * 2 + [()] + [tables] * 2
    inputs = [floats(name, *shape) for name, shape in zip(INPUTS, shapes, strict=True)]
    inputs[INPUTS.index("start")] = ir.val("start", ir.DataType.INT64, [1])
    build = Builder()
    outputs = build.ops(
        "Attention", *inputs, outputs=3, domain=MEDMOE, **attention_attributes(decoder)
    )
    for name, value, rank in zip(OUTPUTS, outputs, (3, 4, 4), strict=True):
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([None] * rank)
    return model(inputs, list(outputs), build, [], [attention_function(decoder)])


def feeds(decoder: DecoderConfig, length: int, start: int, seed: int) -> dict[str, Floats]:
    qkv = {
        name: normal(1, length, decoder.hidden_size, seed=seed + i) for i, name in enumerate("qkv")
    }
    cache = (1, decoder.heads, CAPACITY, decoder.head_size)
    past = {name: normal(*cache, seed=seed + 3 + i) for i, name in enumerate(INPUTS[3:5])}
    cos, sin = (table for _, table in rotary_cache(decoder))
    return qkv | past | {"cos": cos, "sin": sin}


def naive(decoder: DecoderConfig, given: dict[str, Floats], start: int) -> npt.NDArray[np.float64]:
    """Token by token, head by head, in double precision."""
    size, half = decoder.head_size, decoder.rotary_size // 2
    q, k, v = (given[name][0].astype(np.float64).reshape(-1, decoder.heads, size) for name in "qkv")
    keys, values = (given[name][0].astype(np.float64) for name in INPUTS[3:5])  # [H, C, size]
    rows = []
    for place, (queries, news, worth) in enumerate(zip(q, k, v, strict=True)):
        position, row = start + place, []
        angles = position * decoder.rope_theta ** (-np.arange(half) / half)
        for head in range(decoder.heads):
            turned = []
            for vector in (queries[head], news[head]):
                a, b = vector[:half], vector[half : 2 * half]
                cos, sin = np.cos(angles), np.sin(angles)
                turned.append(
                    np.concatenate((a * cos - b * sin, b * cos + a * sin, vector[2 * half :]))
                )
            keys[head, position], values[head, position] = turned[1], worth[head]
            scores = keys[head, : position + 1] @ turned[0] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            row.append(weights @ values[head, : position + 1] / weights.sum())
        rows.append(np.concatenate(row))
    return np.array(rows)


@settings(max_examples=15)
@given(
    heads=st.integers(1, 3),
    head_size=st.sampled_from([8, 16]),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    length=st.integers(1, 6),
    start=st.integers(0, CAPACITY - 6),
    seed=st.integers(0, 99),
)
def test_the_body_equals_a_naive_loop(
    heads: int, head_size: int, fraction: float, length: int, start: int, seed: int
) -> None:
    decoder = decoder_of(heads, head_size, fraction)
    given = feeds(decoder, length, start, seed)
    proto = ir.to_proto(attention_model(decoder))
    results = ReferenceEvaluator(proto).run(None, given | {"start": np.array([start])})
    y, keys, values = (np.asarray(result, np.float32) for result in results)
    np.testing.assert_allclose(y[0], naive(decoder, given, start), rtol=1e-4, atol=1e-5)
    untouched = [p for p in range(CAPACITY) if not start <= p < start + length]
    assert np.array_equal(keys[:, :, untouched], given["past_key"][:, :, untouched])
    new = given["v"].reshape(1, length, heads, head_size).transpose(0, 2, 1, 3)
    assert np.array_equal(values[:, :, start : start + length], new)


@pytest.mark.parametrize(("length", "start"), [(7, 0), (1, 7), (5, 8)])
def test_group_query_attention_equals_the_body(length: int, start: int) -> None:
    decoder = decoder_of(2, 32, 0.5)
    given = feeds(decoder, length, start, seed=1)
    expected = run_all(attention_model(decoder), **given, start=np.array([start]))
    lowered, modified = lower_attention(attention_model(decoder))
    assert modified
    total = start + length
    counts = {
        "seqlens_k": np.array([total - 1], np.int32),
        "total_length": np.array(total, np.int32),
    }
    found = run_all(lowered, **given, **counts)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours[:, :, :total], theirs[:, :, :total], rtol=1e-4, atol=1e-5)


def test_nothing_to_lower_is_left_alone() -> None:
    graph = model([floats("x", 1)], [floats("x", 1)], Builder(), [])
    assert lower_attention(graph) == (graph, False)


def test_the_schema_stands_where_the_function_is_gone() -> None:
    register_schemas()
    register_schemas()  # once is enough, twice does no harm
    graph = attention_model(decoder_of(2, 16, 0.5))
    graph.functions.clear()
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    shapes = [
        [axis.dim_param or axis.dim_value for axis in output.type.tensor_type.shape.dim]
        for output in inferred.graph.output
    ]
    assert shapes == [[1, "S", 32], [1, 2, CAPACITY, 16], [1, 2, CAPACITY, 16]]
    del proto.graph.node[0].input[3:]
    with pytest.raises(onnx.checker.ValidationError, match="Attention"):
        onnx.checker.check_model(proto)
