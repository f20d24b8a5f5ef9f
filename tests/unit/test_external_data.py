"""The `.data` file: whole experts on pages of their own, written one tensor at a time."""

import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from graphs import (
    initializer,
    model,
    moe_config,
    moe_layer,
    moe_model,
    named,
    random_tokens,
    run_ort,
)

from medmoe_edge.bundle.recorded import INLINE_BYTES
from medmoe_edge.config import Precision
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import PAGE, Builder, floats, save_model
from medmoe_edge.export.decoder import MoESpec
from medmoe_edge.export.passes.ort_cpu import lower_matmul, lower_moe
from medmoe_edge.export.plan import Plan
from medmoe_edge.export.quantise import quantise_weights

OWNERS = [f"decoder.layers.0.ffn.{owner}" for owner in ("experts.0", "experts.1", "meta")]


def lowered_model(kind: str, precision: Precision) -> ir.Model:
    config = moe_config(kind, size=32, hidden=320, num_experts=2)
    graph = moe_model(moe_layer(config), config)
    quantise_weights(graph, Plan(precision))
    lower_moe(graph, MoESpec.of(config))
    lower_matmul(graph)
    # a weight that is no expert's must not come to lie between them
    graph.graph.register_initializer(initializer("other", np.ones((32, 32), np.float32)))
    return graph


def external(graph: ir.Model) -> dict[str, ir.ExternalTensor]:
    """Name -> place, in the order of the file."""
    tensors = {name: value.const_value for name, value in graph.graph.initializers.items()}
    found = {name: t for name, t in tensors.items() if isinstance(t, ir.ExternalTensor)}
    return dict(sorted(found.items(), key=lambda item: item[1].offset or 0))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("kind", ["stablelm", "phi"])
def test_each_expert_lies_together_on_its_own_pages(
    tmp_path: Path, kind: str, precision: Precision
) -> None:
    graph = lowered_model(kind, precision)
    sizes = {
        name: value.const_value.nbytes
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None
    }
    extents = save_model(graph, tmp_path, "model")
    tensors = external(graph)
    assert set(tensors) == {name for name, size in sizes.items() if size >= INLINE_BYTES}
    assert list(extents) == OWNERS
    places = {}
    for owner, (offset, length) in extents.items():
        assert offset % PAGE == 0
        own = [t for name, t in tensors.items() if name.startswith(f"{owner}.")]
        places[owner] = [(t.offset or 0, t.length or 0) for t in own]
        assert places[owner][0][0] == offset
        assert all(a + size == b for (a, size), (b, _) in pairwise(places[owner]))
        assert sum(size for _, size in places[owner]) == length
        expected = [size for name, size in sizes.items() if name.startswith(f"{owner}.")]
        assert length == sum(size for size in expected if size >= INLINE_BYTES)
    starts = [*(offset for offset, _ in extents.values()), (tmp_path / "model.data").stat().st_size]
    ends = [offset + length for offset, length in extents.values()]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=True))
    assert ends[-1] == starts[-1]  # no byte behind the last
    assert tensors["other"].offset == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_file_holds_the_same_model(tmp_path: Path, precision: Precision) -> None:
    before = lowered_model("stablelm", precision)
    x = random_tokens(2, 5, 32)
    expected = run_ort(before, x=x)
    save_model(before, tmp_path, "model")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    loaded = onnx.load(tmp_path / "model.onnx")  # follows the places in the data file
    assert np.array_equal(run_ort(ir.from_proto(loaded), x=x), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.data"}
    assert (tmp_path / "model.onnx").stat().st_size < 20_000
    assert str(tmp_path).encode() not in (tmp_path / "model.onnx").read_bytes()


def lazy_weight(name: str, read: Any, size: int = 32) -> ir.Value:
    tensor = ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([size, size]), name=name)
    return ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def sum_of(weights: list[ir.Value]) -> ir.Model:
    build, x = Builder(), floats("x", 32, 32)
    return model([x], [named("y", build.op("Sum", x, *weights))], build, weights)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    arrays: list[weakref.ref[npt.NDArray[np.float32]]] = []

    def read() -> ir.TensorProtocol:
        assert [array for array in arrays if array() is not None] == []
        array = np.full((32, 32), len(arrays), np.float32)
        arrays.append(weakref.ref(array))
        return ir.tensor(array)

    graph = sum_of([lazy_weight(f"w{index}", read) for index in range(5)])
    save_model(graph, tmp_path, "model")
    assert len(arrays) == 5
    loaded = onnx.load(tmp_path / "model.onnx")
    x = np.zeros((32, 32), np.float32)
    assert (run_ort(ir.from_proto(loaded), x=x) == 0 + 1 + 2 + 3 + 4).all()


def test_a_weight_that_changes_its_size_is_told(tmp_path: Path) -> None:
    graph = sum_of([lazy_weight("w", lambda: ir.tensor(np.zeros((32, 31), np.float32)))])
    with pytest.raises(CheckpointError, match="w changed its size"):
        save_model(graph, tmp_path, "model")


@pytest.mark.parametrize("size", [4, 32])  # within the graph, and beside it
@pytest.mark.parametrize(
    "error", [CheckpointError("w is damaged.", "Mend it."), KeyboardInterrupt()]
)
def test_what_reading_a_weight_raises_is_raised(
    tmp_path: Path, size: int, error: BaseException
) -> None:
    def read() -> ir.TensorProtocol:
        raise error

    graph = sum_of([lazy_weight("w", read, size)])
    with pytest.raises(type(error)) as caught:
        save_model(graph, tmp_path, "model")
    assert caught.value is error
