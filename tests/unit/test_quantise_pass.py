"""The pass quantise_weights: integers and scales stand for the weight, read once, when written."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import constant, normal, op_types, product_model
from onnx.reference import ReferenceEvaluator

from medmoe_edge._types import Floats
from medmoe_edge.calibration.quantisers import Format, Quantised, round_searched, round_to_nearest
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.passes.ort_cpu import lower_matmul
from medmoe_edge.export.plan import INT8
from medmoe_edge.export.quantise import Policy, Quantiser, quantise_weights


def only(name: str, form: Format, quantiser: Quantiser | None = None) -> Policy:
    """Of one weight; without a quantiser it is rounded to nearest."""
    quantiser = quantiser or partial(round_to_nearest, format=form)
    return lambda other: (form, quantiser) if other == name else None


def evaluated(graph: ir.Model, width: int) -> Floats:
    """The matrix `[K, N]` that a graph multiplies with, from ONNX's own evaluator."""
    identity = np.eye(width, dtype=np.float32)[None]
    (y,) = ReferenceEvaluator(ir.to_proto(graph)).run(None, {"x": identity})
    matrix: Floats = np.asarray(y, np.float32)[0]
    return matrix


# --- what it makes ----------------------------------------------------------------------------


def test_channels_stand_for_what_the_quantiser_gave() -> None:
    weight = normal(16, 24) * np.geomspace(0.01, 10, 24, dtype=np.float32)  # [K, N]
    quantised = round_to_nearest(weight.T, INT8)
    graph, modified = quantise_weights(product_model(weight), only("w", INT8))
    assert modified
    assert op_types(graph) == {"DequantizeLinear": 1, "MatMul": 1}
    assert np.array_equal(constant(graph, "w"), quantised.integers.T)
    assert np.array_equal(constant(graph, "w.scale"), quantised.scale[:, 0])
    kinds = [constant(graph, name).dtype.name for name in ("w", "w.scale")]
    assert kinds == ["int8", "float32"]
    (y,) = ReferenceEvaluator(ir.to_proto(graph)).run(
        None, {"x": np.eye(16, dtype=np.float32)[None]}
    )
    np.testing.assert_array_equal(np.asarray(y)[0], quantised.dequantise().T)


def test_nothing_chosen_leaves_the_model_as_it_is() -> None:
    graph = product_model(normal(4, 4))
    before = ir.to_proto(graph).SerializeToString()
    assert quantise_weights(graph, lambda name: None) == (graph, False)
    assert ir.to_proto(graph).SerializeToString() == before


@pytest.mark.parametrize("form", [Format(2, 32), Format(4, 32), Format(4, 64), Format(8, 128)])
def test_groups_stand_for_what_the_quantiser_gave(form: Format) -> None:
    weight = normal(128, 24) * np.geomspace(0.01, 10, 24, dtype=np.float32)  # [K, N]
    quantised = round_searched(weight.T, form)
    graph, modified = quantise_weights(
        product_model(weight), only("w", form, partial(round_searched, format=form))
    )
    assert modified
    assert op_types(graph) == {"Cast": 1, "DequantizeLinear": 1, "MatMul": 1}
    integers, scale = constant(graph, "w"), constant(graph, "w.scale")
    assert integers.dtype.name == f"int{form.bits}"
    assert integers.shape == (128, 24)
    assert scale.dtype == np.float16
    assert scale.shape == (128 // (form.group or 0), 24)
    assert np.array_equal(integers.astype(np.int8).T, quantised.integers)
    assert np.array_equal(scale.astype(np.float32).T, quantised.scale)
    graph.graph.opset_imports[""], graph.ir_version = 25, 13  # which has INT2
    np.testing.assert_array_equal(evaluated(graph, len(weight)), quantised.dequantise().T)


# --- when it is read --------------------------------------------------------------------------


def lazy_product(columns: int, reads: list[int]) -> ir.Model:
    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(normal(32, columns))

    graph = product_model(normal(32, columns))
    shape = ir.Shape([32, columns])
    value = graph.graph.initializers["w"]
    value.const_value = ir.LazyTensor(read, ir.DataType.FLOAT, shape, name="w")
    return graph


@pytest.mark.parametrize("form", [INT8, Format(2, 32), Format(8, 32)])
@pytest.mark.parametrize("columns", [8, 600])  # all in the graph, and all beside it
def test_a_weight_is_read_once_and_not_before_it_is_written(
    tmp_path: Path, columns: int, form: Format
) -> None:
    reads: list[int] = []
    graph = lazy_product(columns, reads)
    quantise_weights(graph, only("w", form))
    lower_matmul(graph)
    assert reads == []
    save_model(graph, tmp_path, "w")
    assert reads == [1]
    onnx.load(tmp_path / "w.onnx")  # finds all that lies beside


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [4, 64])  # in the graph, and beside it
def test_the_weight_that_a_format_cannot_hold_is_named(tmp_path: Path, columns: int) -> None:
    weight = normal(32, columns)
    weight[3, 2] = 3e6
    form = Format(4, 32)
    graph = product_model(weight, "layer.up.weight")
    quantise_weights(graph, only("layer.up.weight", form))
    with pytest.raises(CheckpointError, match=rf"^layer\.up\.weight: A {columns}x32 matrix .*fp16"):
        save_model(graph, tmp_path, "w")


@pytest.mark.parametrize("bad", [0, np.nan, np.inf, 1e6, 1e-9])
def test_scales_are_checked_as_they_are_stored(tmp_path: Path, bad: float) -> None:
    form = Format(4, 32)

    def faulty(rows: Floats) -> Quantised:
        scale = np.ones((len(rows), 1), np.float32)
        scale[1] = bad
        return Quantised(form, np.ones(rows.shape, np.int8), scale)

    graph = product_model(normal(32, 64))
    quantise_weights(graph, only("w", form, faulty))
    with pytest.raises(CheckpointError, match="w would get scales that are 0 or not finite"):
        save_model(graph, tmp_path, "w")
