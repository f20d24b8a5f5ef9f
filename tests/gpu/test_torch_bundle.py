"""A bundle in PyTorch against its specification: dequantised on the CPU, in the kernels for CUDA.

The kernels run under Triton's interpreter here, and as they are where there is a GPU.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import UNLIKE_FORMATS, normal
from interpreted import interpret
from torch import nn
from triton import knobs

from medmoe_edge import kernels as plugin
from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import MANIFEST, Bundle, write_manifest
from medmoe_edge.calibration.quantisers import round_searched, round_to_nearest
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.config import RuntimeName
from medmoe_edge.embedded import bundle_path
from medmoe_edge.engine.engine import load
from medmoe_edge.errors import BundleError, MissingDependencyError, ModelError, ResourceError
from medmoe_edge.evaluation.targets import GraphRuntime
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.stored import GROUP_SCALE, PACKED, SCALE, StoredWeights, specification
from medmoe_edge.image.pixels import Image
from medmoe_edge.kernels import Variant
from medmoe_edge.kernels.launch import StoredLinear, StoredMoE
from medmoe_edge.kernels.tensorrt_plugin import compile_kernel
from medmoe_edge.models.decoder import MoE
from medmoe_edge.runtimes.base import Runtime, Step
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.bundle import TorchBundleRuntime
from medmoe_edge.runtimes.torch.eager import TorchDevice

Make = Callable[..., Path]
RUNTIMES: tuple[RuntimeName, ...] = ("torch", "onnxruntime")
ANY_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)


def steps(runtime: Runtime, *lengths: int) -> list[Step]:
    """Prefill and decode, of embeddings that are the same for everyone."""
    cache = runtime.new_cache(8)
    assert cache.capacity == 8
    embeds = [normal(length, 64, seed=length) * np.float32(0.2) for length in lengths or (7, 1)]
    return [runtime.step(each, cache) for each in embeds]


def expected(bundle: Bundle, folder: Path, *lengths: int) -> list[Step]:
    save_model(specification(bundle), folder, "decoder")
    decoder = folder / "decoder.onnx"
    return steps(GraphRuntime(bundle, bundle.path("vision.onnx"), decoder), *lengths)


def difference(found: Floats, wanted: Floats) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def check(found: list[Step], wanted: list[Step], tolerance: float) -> None:
    for step, right in zip(found, wanted, strict=True):
        assert difference(step.logits, right.logits) < tolerance
        assert difference(step.router_logits, right.router_logits) < tolerance
        ours, theirs = (each.router_logits.argsort(-1) for each in (step, right))
        assert np.array_equal(ours, theirs)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("int8", "tiny", {}),
    ("int4", "tiny", {"top_k": 2, "use_residual": True}),
    ("int8", "tiny-phi", {"top_k": 2}),
    ("int4", "tiny-phi", {"meta_expert": False, "router_bias": False}),
]


@pytest.mark.parametrize(("precision", "preset", "moe"), CASES)
@ANY_DEVICE
def test_the_kernels_compute_what_is_specified(
    request: pytest.FixtureRequest,
    tiny_bundle: Make,
    tmp_path: Path,
    device: TorchDevice,
    precision: str,
    preset: str,
    moe: dict[str, Any],
) -> None:
    if device == "cpu":
        request.getfixturevalue("interpreter")
    bundle = Bundle.open(tiny_bundle(precision, preset, **moe))
    runtime = TorchBundleRuntime(bundle, device, torch.float16)
    assert runtime.name == {"cpu": "torch", "cuda": "torch-cuda"}[device]
    assert runtime.new_cache(3).keys.dtype == torch.float16
    kinds = [type(runtime.model.moe_layer(layer)) for layer in bundle.config.moe_layers]
    assert set(kinds) == {StoredMoE}
    check(steps(runtime), expected(bundle, tmp_path), 1e-2)


def test_bf16_is_a_dtype_too(interpreter: None, tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle("int8"))
    (found,) = steps(TorchBundleRuntime(bundle, "cpu", torch.bfloat16), 1)
    (wanted,) = expected(bundle, tmp_path, 1)
    assert 1e-3 < difference(found.logits, wanted.logits) < 3e-2


@pytest.mark.parametrize(("precision", "preset", "moe"), [("fp32", "tiny-phi", {}), *CASES])
def test_the_cpu_computes_it_in_fp32(
    tiny_bundle: Make, tmp_path: Path, precision: str, preset: str, moe: dict[str, Any]
) -> None:
    bundle = Bundle.open(tiny_bundle(precision, preset, **moe))
    check(steps(TorchBundleRuntime(bundle, "cpu")), expected(bundle, tmp_path), 1e-4)


@ANY_DEVICE
def test_floats_stay_ordinary_layers(
    tiny_bundle: Make, tmp_path: Path, device: TorchDevice
) -> None:
    bundle = Bundle.open(tiny_bundle("fp32", use_residual=True))
    runtime = TorchBundleRuntime(bundle, device, torch.float16)
    kinds = {type(module) for module in runtime.model.modules()}
    assert kinds.isdisjoint({StoredLinear, StoredMoE})
    check(steps(runtime), expected(bundle, tmp_path), 1e-2)


@ANY_DEVICE
def test_a_dense_model_routes_nothing(
    request: pytest.FixtureRequest, tiny_bundle: Make, tmp_path: Path, device: TorchDevice
) -> None:
    if device == "cpu":
        request.getfixturevalue("interpreter")
    bundle = Bundle.open(tiny_bundle("int8", dense=True))
    (step,) = steps(TorchBundleRuntime(bundle, device, torch.float16), 7)
    (right,) = expected(bundle, tmp_path, 7)
    assert difference(step.logits, right.logits) < 1e-2
    assert step.router_logits.shape == right.router_logits.shape == (7, 0, 0)


def test_experts_of_unlike_formats_run_one_by_one(
    interpreter: None, tiny_checkpoint: Make, unlike_bundle: Path
) -> None:
    """As a mixed export may have them, some in formats that have no kernel."""
    runtime = TorchBundleRuntime(Bundle.open(unlike_bundle), "cpu", torch.float16)
    layers = [runtime.model.moe_layer(layer) for layer in (0, 2)]
    assert [type(layer) for layer in layers] == [MoE, StoredMoE]
    kinds = [[type(part) for part in expert.children()] for expert in layers[0].experts[:2]]
    assert kinds == [[StoredLinear] * 3, [nn.Linear] * 3]
    check(steps(runtime, 7), steps(TorchBundleRuntime(Bundle.open(unlike_bundle), "cpu"), 7), 1e-2)
    checkpoint, found = read_checkpoint(tiny_checkpoint()), runtime.model.state_dict()
    for name, form in UNLIKE_FORMATS.items():
        rounded = round_searched if form.bits == 2 else round_to_nearest  # as without data
        wanted = rounded(checkpoint.tensor(name).float().numpy(), form).dequantise()
        assert difference(found[name].float().numpy(), wanted) < 1e-3


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_kernels_read_the_bytes_of_the_bundle(tiny_bundle: Make, precision: str) -> None:
    bundle = Bundle.open(tiny_bundle(precision, "tiny-phi"))
    stored = StoredWeights(bundle.path("decoder.onnx"))
    model = TorchBundleRuntime(bundle, "cpu", torch.float16).model
    found = {name: part for name, part in model.named_modules() if isinstance(part, StoredLinear)}
    assert len(found) == 3 * 4 + 2 * 5 * 2 + 2 + 1  # attention, experts, the dense layer, the head
    for name, linear in found.items():
        matrix, scale, *bias = linear.parts
        kind = "int4" if f"{name}.weight{PACKED}" in stored.tensors else "int8"
        assert kind == ("int8" if "head" in name else precision)
        names = {"int8": ("", SCALE), "int4": (PACKED, GROUP_SCALE)}[kind]
        wanted = [stored.tensors[f"{name}.weight{suffix}"] for suffix in names]
        for tensor, original in zip((matrix, scale), wanted, strict=True):
            assert np.array_equal(tensor.numpy(), original.numpy())
            assert tensor.numpy().dtype == original.numpy().dtype
        assert len(bias) == (name != "decoder.head")


@pytest.mark.parametrize("model", ["nano", "fp32", "int8"])
def test_an_image_becomes_the_tokens_of_every_runtime(tiny_bundle: Make, model: str) -> None:
    """Nano's tower is convolutional, the tiny ones' is CLIP."""
    bundle = Bundle.open(bundle_path("nano") if model == "nano" else tiny_bundle(model))
    ours, theirs = TorchBundleRuntime(bundle, "cpu"), OrtRuntime(bundle)
    pixels = normal(1, 3, *[bundle.config.vision.image_size] * 2)
    assert difference(ours.encode_image(pixels), theirs.encode_image(pixels)) < 1e-5
    assert np.array_equal(ours.embed([3, 299, 0]), theirs.embed([3, 299, 0]))


def test_a_bundle_is_asked_through_torch(tiny_bundle: Make) -> None:
    image = Image.from_array(np.arange(30 * 20, dtype=np.uint8).reshape(30, 20))
    ours, theirs = (
        load(tiny_bundle(), runtime=runtime).ask(image, "Is there effusion?", max_new_tokens=8)
        for runtime in RUNTIMES
    )
    assert [answer.model.pop("runtime") for answer in (ours, theirs)] == ["torch", "onnxruntime"]
    assert (ours.text, ours.experts, ours.model) == (theirs.text, theirs.experts, theirs.model)


# --- what is refused -----------------------------------------------------------------------------


def made_for(bundle: Path, out: Path, **target: Any) -> Path:
    """A copy of a bundle that says it is made for another target."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).unlink()
    kept = {key: manifest[key] for key in manifest if key not in ("files", "seal")}
    write_manifest(out, {**kept, "target": target})
    return out


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ({"name": "onnxruntime-cuda", "dtype": "fp16"}, "the portable bundle"),
        (
            {"name": "tensorrt-rtx", "gpu": "sm89", "capacity": 8, "prefill": 8},
            "Leave --runtime out",
        ),
    ],
)
def test_a_bundle_of_another_target_is_refused(
    tiny_bundle: Make, tmp_path: Path, target: dict[str, Any], remedy: str
) -> None:
    folder = made_for(tiny_bundle(), tmp_path / "other", **target)
    with pytest.raises(ModelError, match=f"is made for {target['name']} .*, not for torch") as told:
        load(folder, runtime="torch")
    assert remedy in told.value.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tiny_bundle: Make) -> None:
    with pytest.raises(ResourceError, match="sees no CUDA device"):
        load(tiny_bundle("int8"), runtime="torch", device="cuda")


def test_kernels_without_triton_name_the_extra(
    tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kernels.launch", "kernels.triton"):
        monkeypatch.delitem(sys.modules, f"medmoe_edge.{module}")
    monkeypatch.delattr(plugin, "launch")
    monkeypatch.delattr(plugin, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    bundle = Bundle.open(tiny_bundle("int8"))
    assert TorchBundleRuntime(bundle, "cpu").name == "torch"  # which needs none
    with pytest.raises(MissingDependencyError, match=r"medmoe-edge\[plugin\]"):
        TorchBundleRuntime(bundle, "cpu", torch.float16)


def test_a_graph_that_cannot_be_read_is_said(tiny_bundle: Make, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_bundle(), folder)
    (folder / "vision.onnx").write_bytes(b"\x08no model")
    with pytest.raises(BundleError, match=r"vision\.onnx cannot be read"):
        TorchBundleRuntime(Bundle.open(folder, verify=False), "cpu")


# --- what the GPU will run -----------------------------------------------------------------------


def test_a_kernel_of_one_expert_compiles(tmp_path: Path) -> None:
    variant = Variant("output", "swiglu", 1, 2048, 2048, None)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        made = compile_kernel(variant, variant.tiles[0], 89)
    assert made.spilled == 0
