"""The pass lower_matmul: integer products, a scale for every token, packed groups."""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import (
    STRUCTURES,
    Floats,
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
    random_tokens,
    relative,
    run_ort,
)
from torch import nn

from medmoe_edge.calibration.quantisers import Format, Quantised, round_searched, round_to_nearest
from medmoe_edge.export.builder import CONTRIB, Builder, floats
from medmoe_edge.export.decoder import MoESpec
from medmoe_edge.export.passes.ort_cpu import lower_matmul, lower_moe
from medmoe_edge.export.plan import INT8, Plan
from medmoe_edge.export.quantise import Policy, quantise_weights

FORMATS = [Format(2, 32), Format(4, 32), Format(4, 128), Format(8, 128)]
to_int8 = partial(round_to_nearest, format=INT8)


# --- all pairs, also in branches --------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), STRUCTURES)
@pytest.mark.parametrize(
    ("plan", "op"),
    [(Plan("int8"), "DynamicQuantizeMatMul"), (Plan("int4"), "MatMulNBits")],
    ids=["int8", "int4"],
)
def test_quantised_products_are_fused_also_in_branches(
    kind: str, options: dict[str, Any], plan: Policy, op: str
) -> None:
    config = moe_config(kind, size=32, hidden=64, **options)
    moe, x = moe_layer(config), random_tokens(2, 9, 32)

    def quantised() -> ir.Model:
        graph, _ = quantise_weights(moe_model(moe, config), plan)
        return lower_moe(graph, MoESpec.of(config))[0]

    fused, modified = lower_matmul(quantised())
    assert modified
    matrices = sum(isinstance(part, nn.Linear) for part in moe.modules())
    spared = 1 + config.moe.use_residual if config.moe else 0  # router and coefficient
    ops = op_types(fused)
    assert (ops[op], ops["MatMul"]) == (matrices - spared, spared)
    assert ops["DequantizeLinear"] == 0
    assert all(value.uses() for value in fused.graph.initializers.values())
    assert fused.graph.opset_imports[CONTRIB] == 1
    assert lower_matmul(fused) == (fused, False)
    difference = relative(run_ort(fused, x=x), run_ort(quantised(), x=x))
    assert difference < 0.03
    if op == "DynamicQuantizeMatMul":  # the other reads fp32 activations, without AVX2 or dotprod
        assert difference > 0


def test_a_weight_that_is_also_used_otherwise_stays() -> None:
    build = Builder()
    x, w, plain = floats("x", 2, 4), initializer("w", normal(4, 4)), initializer("p", normal(4, 4))
    product = named("product", build.op("MatMul", build.op("MatMul", x, plain), w))
    added = build.op("Add", product, build.op("Slice", w, *map(build.constant, ([0], [2]))))
    graph = model([x], [product, named("added", added)], build, [w, plain])
    quantise_weights(graph, lambda name: (INT8, to_int8) if name == "w" else None)
    lower_matmul(graph)
    expected = {"DynamicQuantizeMatMul": 1, "MatMul": 1, "DequantizeLinear": 1}
    assert {name: op_types(graph)[name] for name in expected} == expected
    assert [output.name for output in graph.graph.outputs] == ["product", "added"]
    assert np.isfinite(run_ort(graph, x=normal(2, 4, seed=1))).all()


# --- a scale for every token ------------------------------------------------------------------


def per_token(weight: Floats) -> ir.Model:
    graph, _ = quantise_weights(product_model(weight), lambda _: (INT8, to_int8))
    return lower_matmul(graph)[0]


def one_scale(quantised: Quantised) -> ir.Model:
    """The same product with the op as it is: one scale for all tokens."""
    build, x = Builder(), floats("x", 1, "S", quantised.integers.shape[1])
    w = initializer("w", np.ascontiguousarray(quantised.integers.T))
    scale = initializer("scale", quantised.scale[:, 0])
    y = build.op("DynamicQuantizeMatMul", x, w, scale, domain=CONTRIB)
    graph = model([x], [named("y", y)], build, [w, scale])
    graph.graph.opset_imports[CONTRIB] = 1
    return graph


def test_a_huge_token_does_not_harm_its_neighbours() -> None:
    weight, x = normal(64, 24), random_tokens(1, 6, 64)
    x[0, 2] *= 1e4
    quantised = to_int8(weight.T)
    exact = x.astype(np.float64) @ quantised.dequantise().T.astype(np.float64)
    peak = np.abs(x).max(-1, keepdims=True)  # [1, S, 1]
    # activations lie on a grid over -peak..peak at most: each is wrong by half a 255th of it
    bound = peak / 255 * np.abs(quantised.dequantise()).sum(1)  # [1, S, N]
    error = np.abs(run_ort(per_token(weight), x=x) - exact)
    assert (error <= bound * 1.001).all()
    assert error.max() > 0
    without = np.abs(run_ort(one_scale(quantised), x=x) - exact)
    others = [0, 1, 3, 4, 5]
    assert without[0, others].mean() > 100 * error[0, others].mean()


def test_the_size_of_a_token_is_its_own_affair() -> None:
    graph, x = per_token(normal(64, 24)), random_tokens(1, 6, 64)
    before = run_ort(graph, x=x)
    x[0, 2] *= 2**10  # a power of two changes no bit of x / peak
    after = run_ort(graph, x=x)
    before[0, 2] *= 2**10
    assert np.array_equal(after, before)


@pytest.mark.parametrize("zeros", [[0], [1, 3], [0, 1, 2, 3]])
def test_a_token_of_zeros_gives_zeros(zeros: list[int]) -> None:
    graph, x = per_token(normal(64, 24)), random_tokens(1, 4, 64)
    x[0, zeros] = 0
    y = run_ort(graph, x=x)
    assert not y[0, zeros].any()
    assert np.isfinite(y).all()
    x[0, zeros] = 1e-42  # smaller than the smallest peak
    assert np.isfinite(run_ort(graph, x=x)).all()


def test_matrices_that_read_the_same_tokens_share_their_scales() -> None:
    build, x = Builder(), floats("x", 1, "S", 16)
    weights = [initializer(name, normal(16, 16, seed=i)) for i, name in enumerate("qkvo")]
    q, k, v = (build.op("MatMul", x, w) for w in weights[:3])
    out = build.op("MatMul", build.op("Sum", q, k, v), weights[3])
    graph = model([x], [named("y", out)], build, weights)
    quantise_weights(graph, lambda _: (INT8, to_int8))
    lower_matmul(graph)
    ops = op_types(graph)
    assert (ops["DynamicQuantizeMatMul"], ops["Div"], ops["Mul"]) == (4, 2, 4)


# --- groups -----------------------------------------------------------------------------------


def in_groups(weight: Floats, form: Format) -> tuple[ir.Model, Quantised]:
    quantiser = partial(round_searched, format=form)
    graph, _ = quantise_weights(product_model(weight), lambda _: (form, quantiser))
    return lower_matmul(graph)[0], quantiser(np.ascontiguousarray(weight.T))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_groups_give_the_product_of_what_they_stand_for(form: Format) -> None:
    weight = normal(256, 24) * np.geomspace(0.01, 10, 24, dtype=np.float32)
    graph, quantised = in_groups(weight, form)
    assert op_types(graph) == {"Cast": 1, "MatMulNBits": 1}
    signs = np.sign(random_tokens(1, 5, 256))  # which 8 bits hold exactly
    exact = signs.astype(np.float64) @ quantised.dequantise().T
    for channel in range(24):  # their sizes differ a thousandfold
        y = run_ort(graph, x=signs)[..., channel]
        assert relative(y, exact[..., channel].astype(np.float32)) < 1e-5
    x = random_tokens(1, 5, 256)
    rounded = (x @ quantised.dequantise().T).astype(np.float32)
    assert relative(run_ort(graph, x=x), rounded) < 0.01


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packing_is_that_of_a_plain_loop(form: Format) -> None:
    graph, quantised = in_groups(normal(256, 6), form)
    assert form.group is not None
    bits, group = form.bits, form.group
    expected = np.zeros((6, 256 // group, group * bits // 8), np.uint8)
    for n, row in enumerate(quantised.integers):
        for k, integer in enumerate(row):
            bit = k % group * bits  # the first integer lies in the lowest bits
            expected[n, k // group, bit // 8] |= (int(integer) + 2 ** (bits - 1)) << bit % 8
    assert np.array_equal(constant(graph, "w.packed"), expected)
    assert np.array_equal(constant(graph, "w.groups.scale"), quantised.scale.astype(np.float16))
    assert set(graph.graph.initializers) == {"w.packed", "w.groups.scale"}


def test_tokens_in_groups_do_not_depend_on_their_neighbours() -> None:
    graph, _ = in_groups(normal(64, 24), Format(4, 32))
    x = random_tokens(1, 6, 64)
    x[0, 2] *= 1e4
    rows = [run_ort(graph, x=x[:, [index]])[0, 0] for index in range(6)]
    np.testing.assert_allclose(run_ort(graph, x=x)[0], rows, rtol=1e-5, atol=1e-5)


def test_the_smallest_and_largest_integers_survive() -> None:
    weight = np.tile(np.array([-8, 7], np.float32), 16)[:, None]  # [K, N], on the grid of scale 1
    graph, quantised = in_groups(weight, Format(4, 32))
    assert {quantised.integers.min(), quantised.integers.max()} == {-8, 7}
    assert np.array_equal(run_ort(graph, x=np.eye(32, dtype=np.float32)[None])[0], weight)
