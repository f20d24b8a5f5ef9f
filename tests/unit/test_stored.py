"""A bundle's decoder as it was specified, from the bundle alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import run_all

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.config import Precision
from medmoe_edge.errors import BundleError
from medmoe_edge.export.builder import tensor_of
from medmoe_edge.export.decoder import DecoderBuilder
from medmoe_edge.export.plan import Plan
from medmoe_edge.export.quantise import quantise_weights
from medmoe_edge.export.stored import StoredWeights, float_vision, specification
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

Make = Callable[..., Path]


def from_checkpoint(folder: Path, precision: Precision) -> ir.Model:
    checkpoint = read_checkpoint(folder)
    model = DecoderBuilder(checkpoint.config, WeightSource(checkpoint)).model()
    quantise_weights(model, Plan(precision))
    return model


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_it_is_what_the_checkpoint_gave(
    tiny_checkpoint: Make, tiny_bundle: Make, preset: str, precision: Precision
) -> None:
    expected = from_checkpoint(tiny_checkpoint(preset), precision)
    found = specification(Bundle.open(tiny_bundle(precision, preset)))
    ours, theirs = found.graph.initializers, expected.graph.initializers
    assert set(ours) == set(theirs)
    for name in theirs:
        a, b = tensor_of(ours[name]), tensor_of(theirs[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes(), name
    assert [node.op_type for node in found.graph] == [node.op_type for node in expected.graph]


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
def test_it_computes_what_the_bundle_computes(tiny_bundle: Make, preset: str) -> None:
    bundle = Bundle.open(tiny_bundle("fp32", preset))
    runtime, decoder = OrtRuntime(bundle), bundle.config.decoder
    model, cache = ir.external_data.load_to_model(specification(bundle)), runtime.new_cache(24)
    shape = (1, decoder.heads, 24, decoder.head_size)
    past = {
        str(value.name): np.zeros(shape, np.float32)
        for value in model.graph.inputs
        if str(value.name).startswith("past_")
    }
    names = [str(value.name) for value in model.graph.outputs]
    generator = np.random.default_rng(0)
    for start, length in ((0, 9), (9, 1), (10, 5)):
        embeds = generator.normal(0, 0.2, (length, decoder.hidden_size)).astype(np.float32)
        step = runtime.step(embeds, cache)
        found = run_all(model, embeds=embeds[None], start=np.array([start]), **past)
        outputs = dict(zip(names, found, strict=True))
        past = {n.replace("present", "past"): a for n, a in outputs.items() if "present" in n}
        assert error(outputs["logits"][0], step.logits) < 1e-5
        assert error(outputs["router_logits"][0], step.router_logits) < 1e-5


def error(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("link", [os.link, os.symlink])  # as uv installs, as the Hub caches
def test_linked_files_are_read(
    tiny_bundle: Make, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    folder, elsewhere, linked = tiny_bundle("int4"), tmp_path / "blobs", tmp_path / "bundle"
    shutil.copytree(folder, elsewhere)
    linked.mkdir()
    for path in elsewhere.iterdir():
        link(path, linked / path.name)
    for graph in (specification, float_vision):
        ours, theirs = (graph(Bundle.open(each)).graph.initializers for each in (linked, folder))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert tensor_of(ours[name]).tobytes() == tensor_of(value).tobytes(), name


def test_a_graph_reads_only_files_beside_it(tiny_bundle: Make, tmp_path: Path) -> None:
    shutil.copy(tiny_bundle("fp32") / "decoder.data", tmp_path)
    graph, folder = tiny_bundle("fp32") / "decoder.onnx", tmp_path / "bundle"
    folder.mkdir()
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../decoder.data"
    onnx.save(model, folder / "decoder.onnx")
    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be read"):
        StoredWeights(folder / "decoder.onnx")


def test_a_graph_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    graph = tmp_path / "decoder.onnx"
    graph.write_bytes(b"\x08no model")
    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be read"):
        StoredWeights(graph)
