"""The single op that int8 stands on: ONNX Runtime's `DynamicQuantizeMatMul`, on this very CPU.

Its kernels differ by instruction set. Without VNNI, AVX2 and AVX-512 multiply with `vpmaddubsw`,
which adds two neighbouring products in 16 bits and saturates; all others add in 32 bits.
"""

import os

import numpy as np
import numpy.typing as npt
import onnx.helper as helper
import onnx.numpy_helper as numpy_helper
import onnxruntime as ort
import pytest
from onnx import TensorProto

from medmoe_edge.runtimes.ort.runtime import session_options

Floats = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]

TOKENS = (1, 5, 40)
WIDTHS = ((2, 3), (3, 8), (63, 40), (64, 48), (257, 33), (384, 96), (1024, 17))  # inputs, outputs
KINDS = ("saturating", "exact")


def product(tokens: Floats, weights: Int8) -> Floats:
    """What ONNX Runtime, as we run it, makes of tokens `[m, K]` and weights `[K, N]` of scale 1."""
    width, channels = weights.shape
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [node],
        "one-op",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", channels])],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(np.ones(channels, np.float32), "scale"),
        ],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    y: Floats = session.run(None, {"x": tokens})[0]
    return y


def whole_numbers(m: int, width: int, low: int) -> Int64:
    """Tokens `[m, width]` from `low` to `low + 255`, both among them: their scale is exactly 1."""
    numbers = np.random.default_rng(m).integers(low, low + 256, (m, width))
    numbers.flat[0], numbers.flat[-1] = low + 255, low
    return numbers


def pair_safe(width: int, channels: int) -> Int8:
    """Weights `[width, channels]` with |w[2k] + w[2k + 1]| <= 128, as large as that allows."""
    chance = np.random.default_rng(width)
    weights = chance.integers(-127, 128, (width, channels))
    first, second = weights[:-1:2], weights[1::2]  # views
    second[:] = np.clip(second, -128 - first, 128 - first).clip(-127, 127)
    for channel, (one, other) in enumerate([(64, 64), (127, 1), (1, 127), (-64, -64), (-127, -1)]):
        if channel < channels:  # the worst cases, all along a column
            weights[:, channel] = np.resize([one, other], width)
    return weights.astype(np.int8)


@pytest.mark.parametrize("low", [0, -128, -255])
@pytest.mark.parametrize(("width", "channels"), WIDTHS)
@pytest.mark.parametrize("m", TOKENS)
def test_pair_safe_weights_give_the_exact_integer_product(
    m: int, width: int, channels: int, low: int
) -> None:
    tokens, weights = whole_numbers(m, width, low), pair_safe(width, channels)
    exact = tokens @ weights.astype(np.int64)
    assert np.abs(exact).max() <= 2**24  # so that fp32 holds it
    assert np.array_equal(product(tokens.astype(np.float32), weights), exact)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("pair", [(64, 64), (-64, -64), (127, 1), (1, -127)])
def test_the_largest_activations_and_pairs_give_it_too(m: int, pair: tuple[int, int]) -> None:
    tokens = np.full((m, 514), 255)
    weights = np.resize(pair, (514, 1)).repeat(8, axis=1)
    got = product(tokens.astype(np.float32), weights.astype(np.int8))
    assert np.array_equal(got, tokens @ weights)


def unsafe_error(m: int) -> float:
    """The relative error of the largest pairs that are not safe."""
    tokens, weights = np.full((m, 256), 255), np.full((256, 8), 127)
    exact = tokens @ weights
    got = product(tokens.astype(np.float32), weights.astype(np.int8))
    return float(np.abs(got - exact).max() / exact.max())


def kind_here() -> str:
    """Half of 2 * 255 * 127 does not fit in 16 bits: either all of it is lost, or nothing."""
    errors = [unsafe_error(m) for m in TOKENS]
    if max(errors) == 0:
        return "exact"
    assert errors == pytest.approx([1 - 32767 / (2 * 255 * 127)] * len(TOKENS), abs=1e-4)
    return "saturating"


def test_weights_that_are_not_safe_saturate_where_they_should() -> None:
    kind = kind_here()
    expected = os.environ.get("MEDMOE_EDGE_ARITHMETIC", kind)  # emulate.sh knows what it emulates
    assert expected in KINDS
    assert kind == expected


def test_the_probe_says_what_this_processor_does() -> None:
    probe = pytest.importorskip("medmoe_edge.runtimes.ort.runtime", reason="needs the probe")
    assert probe.int8_arithmetic() == kind_here()
