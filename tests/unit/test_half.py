"""The pass that stores large weights in fp16."""

import numpy as np
import onnx_ir as ir
import pytest
from graphs import initializer, model, random_tokens, run_ort

from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import Builder, floats
from medmoe_edge.export.half import halve_weights, to_half


def product(weight: np.ndarray) -> ir.Model:
    build = Builder()
    x, w = floats("x", 1, "S", 32), initializer("w", weight)
    bias = initializer("b", np.full(16, 1 / 3, np.float32))
    y = build.op("Add", build.op("MatMul", x, w), bias)
    y.name, y.dtype = "y", ir.DataType.FLOAT
    return model([x], [y], build, [w, bias])


def test_large_weights_are_halved_and_the_rest_stays() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    graph, modified = halve_weights(product(weight))
    assert modified
    stored = {name: value.const_value for name, value in graph.graph.initializers.items()}
    assert {name: tensor.dtype.name for name, tensor in stored.items() if tensor} == {
        "w": "FLOAT16",
        "b": "FLOAT",
    }
    x = random_tokens(1, 3, 32)
    expected = x.astype(np.float64) @ weight.astype(np.float16).astype(np.float64) + 1 / 3
    np.testing.assert_allclose(run_ort(graph, x=x), expected, rtol=1e-5, atol=1e-5)
    assert halve_weights(graph) == (graph, False)


def test_what_fp16_cannot_hold_is_refused_when_it_is_written() -> None:
    weight = np.zeros((32, 16), np.float32)
    weight[3, 4] = 1e5
    graph, _ = halve_weights(product(weight))
    tensor = graph.graph.initializers["w"].const_value
    assert tensor is not None
    with pytest.raises(CheckpointError, match="w holds values that fp16 cannot"):
        tensor.numpy()
    assert to_half(np.array([65504.0, 1e-9]), "w").tolist() == [65504.0, 0.0]
