"""Experts as deltas on GPUs: the graphs for each target, and PyTorch's kernels, on this CPU.

What they are held against is the specification, whose experts are the meta expert plus a delta.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import observed, op_types
from interpreted import interpret
from test_tensorrt_parser import HALF, POSITIONS, SINGLE, graph, in_onnxruntime, off, target, untied

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle, Target
from medmoe_edge.calibration.quantisers import read_deltas
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.errors import InputError, MissingDependencyError
from medmoe_edge.evaluation.inspection import inspect_model
from medmoe_edge.export import build, targets
from medmoe_edge.export.builder import save_model, tensor_of
from medmoe_edge.export.gpus import load_library, make_logger
from medmoe_edge.export.passes.tensorrt_parser import Parser
from medmoe_edge.export.targets import export_target, plan_target
from medmoe_edge.export.tensorrt_builder import parse
from medmoe_edge.kernels.launch import DeltaMoE
from medmoe_edge.models.decoder import MoE
from medmoe_edge.runtimes.base import Runtime
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch.eager import TorchDevice

Make = Callable[..., Bundle]
CUDA = Target("onnxruntime-cuda", "fp16")
FORMS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("fp32", "delta", "tiny-phi", {"top_k": 2, "use_residual": True}),
    ("fp32", "delta:bits=4", "tiny", {"top_k": 2}),
    ("int8", "delta:bits=2", "tiny", {}),
    ("int8", "delta:bits=8", "tiny-phi", {}),
    ("int8", "delta:rank=32", "tiny", {"top_k": 2, "use_residual": True}),
    ("int8", "delta", "tiny-phi", {"top_k": 2, "router_bias": True}),
    ("int4", "delta:rank=32", "tiny", {"top_k": 2}),
]
EVERY_FORM = pytest.mark.parametrize(("precision", "experts", "preset", "moe"), FORMS)


@pytest.fixture(scope="module")
def bundle_of(tiny_checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Make:
    """Exports a tiny checkpoint, its experts as deltas in some form."""

    def make(precision: Any, experts: str, preset: str = "tiny", **moe: Any) -> Bundle:
        out = tmp_path_factory.mktemp("deltas") / "bundle"
        options = build.BuildOptions(precision, name="tiny", deltas=read_deltas(experts))
        return Bundle.open(build.export_bundle(tiny_checkpoint(preset, **moe), out, options))

    return make


def logits(runtime: Runtime, steps: list[Floats]) -> list[Floats]:
    """Of each step after those before it."""
    cache = runtime.new_cache(POSITIONS)
    return [runtime.step(embeds, cache).logits for embeds in steps]


@EVERY_FORM
def test_the_specification_holds_what_the_deltas_stand_for(
    bundle_of: Make, tmp_path: Path, precision: str, experts: str, preset: str, moe: dict[str, Any]
) -> None:
    bundle = bundle_of(precision, experts, preset, **moe)
    steps, specified = untied(bundle, tmp_path)
    whole = TorchBundleRuntime(bundle, "cpu")  # every expert's matrix, made when it is loaded
    assert off(logits(whole, steps), specified) < SINGLE
    if (precision, experts) == ("fp32", "delta"):  # else activations are in 8 bits
        assert off(logits(OrtRuntime(bundle), steps), specified) < SINGLE


@pytest.mark.parametrize(
    ("version", "precision", "experts", "preset", "moe"),
    [*(("11.4.1", *form) for form in FORMS), *(("10.3.0", *form) for form in FORMS[2:5])],
)
def test_graphs_for_tensorrt_mean_what_is_specified(
    bundle_of: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    precision: str,
    experts: str,
    preset: str,
    moe: dict[str, Any],
) -> None:
    bundle = bundle_of(precision, experts, preset, **moe)
    parser = Parser.of_target(target(version))
    steps, specified = untied(bundle, tmp_path)
    found = []
    for half in (True, False):
        if not half:
            monkeypatch.setattr(targets, "to_half_graph", lambda *_: None)
        model = graph(bundle, version)
        assert {node.domain for node in model.graph} == {""}  # nothing is left to a plugin
        assert set(op_types(model)) <= parser.operators - {"If"}
        assert not any(
            ".experts." in name and name.endswith(".weight") for name in model.graph.initializers
        )
        save_model(model, tmp_path, "decoder")
        found.append(in_onnxruntime(bundle, tmp_path / "decoder.onnx", steps))
    assert 0 < off(found[0], specified) < HALF
    assert off(found[1], specified) < SINGLE


def test_a_graph_without_a_delta_is_another_model(bundle_of: Make, tmp_path: Path) -> None:
    """So that the tests above can fail: deltas are not so small that nothing depends on them."""
    bundle = bundle_of("fp32", "delta", "tiny", top_k=2)
    steps, specified = untied(bundle, tmp_path)
    model = graph(bundle, "11.4.1")
    for name, value in model.graph.initializers.items():
        if name.endswith(".experts.1.down.delta"):
            value.const_value = ir.tensor(np.zeros_like(tensor_of(value).numpy()), name=name)
    save_model(model, tmp_path, "decoder")
    assert off(in_onnxruntime(bundle, tmp_path / "decoder.onnx", steps), specified) > 2 * HALF


@pytest.mark.parametrize(("precision", "experts", "preset", "moe"), FORMS[2:6])
def test_the_graph_for_cuda_means_what_is_specified(
    bundle_of: Make, tmp_path: Path, precision: str, experts: str, preset: str, moe: dict[str, Any]
) -> None:
    bundle = bundle_of(precision, experts, preset, **moe)
    steps, specified = untied(bundle, tmp_path)
    export_target(bundle, tmp_path / "cuda", plan_target(bundle, "onnxruntime-cuda"))
    made = Bundle.open(tmp_path / "cuda")
    assert 0 < off(logits(OrtRuntime(made, device="cpu"), steps), specified) < HALF
    assert "QMoE" not in op_types(ir.load(made.path("decoder.onnx")))
    assert inspect_model(made.folder).bits_per_weight is None  # which its manifest does not tell


def test_tensorrt_for_rtx_parses_its_graph(bundle_of: Make, tmp_path: Path) -> None:
    try:
        trt = load_library("tensorrt-rtx")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    bundle, log = bundle_of("int8", "delta:bits=2"), make_logger(trt)
    save_model(graph(bundle, "11.4.1"), tmp_path, "decoder")
    network = trt.Builder(log).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    kept = parse(trt, network, log, tmp_path / "decoder.onnx", "TensorRT")
    assert "logits" in [network.get_output(index).name for index in range(network.num_outputs)]
    del kept


# --- PyTorch ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("precision", "experts", "preset", "moe"), FORMS)
def test_the_kernels_read_deltas_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch,
    bundle_of: Make,
    tmp_path: Path,
    device: TorchDevice,
    precision: str,
    experts: str,
    preset: str,
    moe: dict[str, Any],
) -> None:
    if device == "cpu":
        interpret(monkeypatch)
    bundle = bundle_of(precision, experts, preset, **moe)
    runtime = TorchBundleRuntime(bundle, device, torch.float16)
    kernels = precision != "fp32" and experts != "delta:bits=8"
    for layer in bundle.config.moe_layers:
        found = runtime.model.moe_layer(layer)
        assert type(found) is (DeltaMoE if kernels else MoE)
        assert len(found.experts) == (0 if kernels else 4)
    steps, specified = untied(bundle, tmp_path)
    assert 0 < off(logits(runtime, steps), specified) < HALF


def test_deltas_in_several_forms_are_made_whole(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    interpret(monkeypatch)
    checkpoint = read_checkpoint(tiny_checkpoint())
    options = build.BuildOptions("int8", name="tiny", deltas=read_deltas("delta:auto=5"))
    build.export_bundle(checkpoint, tmp_path / "out", options, statistics=observed(checkpoint))
    bundle = Bundle.open(tmp_path / "out")
    assert len(set(bundle.manifest["quantisation"]["deltas"].values())) > 1
    runtime = TorchBundleRuntime(bundle, "cpu", torch.float16)
    kinds = {type(runtime.model.moe_layer(layer)) for layer in bundle.config.moe_layers}
    assert MoE in kinds  # a layer has deltas in 4 bits and in 8, for which there is no kernel
    steps, specified = untied(bundle, tmp_path)
    assert off(logits(runtime, steps), specified) < HALF


def test_gpus_page_no_deltas(bundle_of: Make) -> None:
    bundle = bundle_of("int8", "delta:bits=2")
    for name in ("tensorrt-rtx", "onnxruntime-cuda"):
        with pytest.raises(InputError, match="deltas, which no GPU pages"):
            plan_target(bundle, name, gpu="sm89", paged=True)
