"""q, k and v in one product: what it computes, and when it is left alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.config import Precision
from medmoe_edge.export import build
from medmoe_edge.export.build import BuildOptions, export_bundle
from medmoe_edge.export.passes.ort_cpu import fuse_qkv, lower_attention
from medmoe_edge.export.quantise import insert_dequantise, owners_of, split_fused
from medmoe_edge.export.stored import StoredWeights, specify
from medmoe_edge.runtimes.base import Step
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

Make = Callable[..., Path]


def steps(folder: Path) -> list[Step]:
    runtime = OrtRuntime(Bundle.open(folder))
    cache = runtime.new_cache(16)
    generator = np.random.default_rng(0)
    width = runtime.config.decoder.hidden_size
    return [
        runtime.step(generator.normal(0, 0.2, (length, width)).astype(np.float32), cache)
        for length in (9, 1, 1, 5)
    ]


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_one_product_gives_the_bits_of_three(
    tiny_checkpoint: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    precision: Precision,
) -> None:
    fused, apart = tmp_path / "fused", tmp_path / "apart"
    export_bundle(tiny_checkpoint(preset), fused, BuildOptions(precision=precision))
    monkeypatch.setattr(build, "fuse_qkv", lambda model: (model, False))
    monkeypatch.setattr(build, "write_paged_graphs", lambda *_: None)
    export_bundle(tiny_checkpoint(preset), apart, BuildOptions(precision=precision))
    names = StoredWeights(fused / "decoder.onnx").stored
    assert any(".attention.qkv." in name for name in names)
    assert not any(".attention.q." in name for name in names)
    for ours, theirs in zip(steps(fused), steps(apart), strict=True):
        np.testing.assert_array_equal(ours.logits, theirs.logits)
        np.testing.assert_array_equal(ours.router_logits, theirs.router_logits)


def test_three_formats_are_left_apart(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle("fp32"))
    model = specify(bundle.config, StoredWeights(bundle.path("decoder.onnx")))
    lower_attention(model)
    for part, dtype in (("q", ir.DataType.INT8), ("k", ir.DataType.INT8), ("v", ir.DataType.INT4)):
        for layer in range(bundle.config.decoder.layers):
            _store(model.graph, f"decoder.layers.{layer}.attention.{part}.weight", dtype)
    before = [node.op_type for node in model.graph]
    assert fuse_qkv(model) == (model, False)
    assert [node.op_type for node in model.graph] == before


def test_floats_are_left_apart(tiny_bundle: Make) -> None:
    names = StoredWeights(tiny_bundle("fp32") / "decoder.onnx").stored
    assert not any(".attention.qkv." in name for name in names)


def _store(graph: ir.Graph, name: str, dtype: ir.DataType) -> None:
    """Put zeros of a type behind `DequantizeLinear` in the place of a weight."""
    value = graph.initializers[name]
    assert value.shape is not None
    shape = value.shape.numpy()
    integers = ir.tensor(np.zeros(shape, dtype.numpy()), dtype=dtype, name=name)
    insert_dequantise(
        graph, value, integers, ir.tensor(np.ones(shape[1], np.float32), name=f"{name}.scale")
    )


def test_what_is_stored_as_one_is_read_as_three() -> None:
    own = "decoder.layers.3.attention."
    assert owners_of(f"{own}qkv.weight.packed") == [f"{own}{n}.weight.packed" for n in "qkv"]
    assert owners_of(f"{own}out.weight") == [f"{own}out.weight"]
    arrays = {
        f"{own}qkv.weight": np.arange(18).reshape(3, 6),
        f"{own}qkv.bias": np.arange(6),
        f"{own}qkv.weight.packed": np.arange(12).reshape(6, 1, 2),
        f"{own}qkv.weight.groups.scale": np.arange(12).reshape(6, 2),
    }
    split = split_fused({name: ir.tensor(array, name=name) for name, array in arrays.items()})
    for place, part in enumerate("qkv"):
        two = slice(2 * place, 2 * place + 2)
        for form, expected in (
            ("weight", arrays[f"{own}qkv.weight"][:, two]),
            ("bias", arrays[f"{own}qkv.bias"][two]),
            ("weight.packed", arrays[f"{own}qkv.weight.packed"][two]),
            ("weight.groups.scale", arrays[f"{own}qkv.weight.groups.scale"][two]),
        ):
            found = split[f"{own}{part}.{form}"]
            assert found.shape.numpy() == expected.shape
            np.testing.assert_array_equal(found.numpy(), expected)
