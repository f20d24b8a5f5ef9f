"""A transformer tower in 8 bits: what becomes of its weights, its error, and the way back."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from graphs import normal, op_types, product_model, run_ort
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle, Target
from medmoe_edge.bundle.recorded import SignatureMaker, int8_products
from medmoe_edge.calibration.quantisers import VISION_INT8, VISION_TOKENS
from medmoe_edge.checkpoint.reader import Checkpoint, read_checkpoint, write_checkpoint
from medmoe_edge.device.estimate import PlanOptions, plan
from medmoe_edge.errors import InputError
from medmoe_edge.evaluation.targets import GraphRuntime
from medmoe_edge.export import build
from medmoe_edge.export.build import BuildOptions, check_exportable, export_bundle
from medmoe_edge.export.builder import save_model, tensor_of
from medmoe_edge.export.gpus import find_gpu
from medmoe_edge.export.stored import float_vision
from medmoe_edge.export.targets import vision_graph
from medmoe_edge.export.tensorrt_builder import build_engine
from medmoe_edge.export.vision import (
    GROUP,
    LEAST_WIDTH,
    divide_inputs,
    export_vision,
    fuse_attention,
    quantise_linears,
    smoothing,
)
from medmoe_edge.presets import PRESETS
from medmoe_edge.runtimes.ort.runtime import OrtRuntime, pairs_within
from medmoe_edge.runtimes.torch.bundle import BundleWeights, TorchBundleRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime
from medmoe_edge.training.initialise import random_tensors

Make = Callable[..., Path]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="needs the extra rtx"
)
CUDA = Target("onnxruntime-cuda", "fp16")
RTX = Target("tensorrt-rtx", "bf16", "sm89", "1", 40, 40)
SIDE = 28
HIDDEN = ("fc1", "fc2", "attention.q", "attention.k", "attention.v", "attention.out")
# The second layer is never read, and the projector's second matrix, of 64 inputs, is too narrow
IN_8_BITS = {*(f"vision.layers.0.{name}" for name in HIDDEN), "projector.0"}
TOKENS = BuildOptions(precision="int8", vision="tokens")
LARGE = {  # channels that these make and those read
    ("norm1.weight", "norm1.bias"): [f"attention.{name}.weight" for name in "qkv"],
    ("attention.v.weight", "attention.v.bias"): ["attention.out.weight"],
    ("norm2.weight", "norm2.bias"): ["fc1.weight"],
    ("fc1.weight", "fc1.bias"): ["fc2.weight"],
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of a tower just wide enough."""
    tiny = read_checkpoint(tiny_checkpoint())
    tower = dataclasses.replace(
        tiny.config.vision, image_size=SIDE, feature_size=LEAST_WIDTH, intermediate_size=256
    )
    config = dataclasses.replace(tiny.config, vision=tower)
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    tensors = (
        (name, tensor if "norm" in name else tensor * 4)
        for name, tensor in random_tensors(config, 0)
    )
    write_checkpoint(folder, config, tensors, tokenizer_file=tiny.tokenizer_file)
    return read_checkpoint(folder)


@pytest.fixture(scope="module")
def tower(checkpoint: Checkpoint) -> ir.Model:
    return export_vision(checkpoint)


@pytest.fixture(scope="module")
def outliers(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same, some channels large: of the norms, of the values and behind fc1.

    What reads them makes up for it.
    """
    tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.names}
    own = "vision.layers.0."
    for made, readers in LARGE.items():
        for channel in (3, 40):
            for name in made:
                tensors[own + name][channel] *= 80
            for name in readers:
                tensors[own + name][:, channel] /= 80
    folder = tmp_path_factory.mktemp("outliers") / "checkpoint"
    tokenizer = checkpoint.folder / "tokenizer.json"
    write_checkpoint(folder, checkpoint.config, tensors.items(), tokenizer_file=tokenizer)
    return read_checkpoint(folder)


@pytest.fixture(scope="module")
def by_tokens(outliers: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("tokens") / "out"
    return Bundle.open(export_bundle(outliers.folder, out, TOKENS))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "out"
    return Bundle.open(export_bundle(checkpoint.folder, out, BuildOptions(precision="int8")))


def error(found: Floats, expected: Floats) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- what is stored ------------------------------------------------------------------------------


def test_linear_layers_become_products_in_groups_and_nothing_else_does(tower: ir.Model) -> None:
    model, modified = quantise_linears(tower.clone())
    assert modified
    stored = {name: tensor_of(value) for name, value in model.graph.initializers.items()}
    packed = {name for name, tensor in stored.items() if tensor.dtype == ir.DataType.UINT8}
    assert packed == {f"{name}.weight.packed" for name in IN_8_BITS}
    for name in IN_8_BITS:
        channels, groups, size = stored[f"{name}.weight.packed"].shape.numpy()
        scale = stored[f"{name}.weight.groups.scale"]
        assert (size, scale.dtype) == (GROUP, ir.DataType.FLOAT16)
        assert scale.shape.numpy() == (channels, groups)
    for node in model.graph:
        if node.op_type == "MatMulNBits":  # at level 0 its 8 bits are very slow
            assert (node.attributes["accuracy_level"].as_int(), len(node.inputs)) == (4, 3)
    before, after = op_types(tower), op_types(model)
    assert after["MatMulNBits"] == len(IN_8_BITS) == before["MatMul"] - after["MatMul"]
    assert quantise_linears(model) == (model, False)


def test_a_bundle_says_how_its_tower_is_stored(bundle: Bundle, tiny_bundle: Make) -> None:
    assert bundle.manifest["quantisation"]["vision"] == VISION_INT8
    narrow = Bundle.open(tiny_bundle("int8"))  # too narrow
    assert narrow.manifest["quantisation"]["vision"] == build.VISION
    assert "vision" not in Bundle.open(tiny_bundle("fp32")).manifest["quantisation"]


@pytest.mark.parametrize(
    ("preset", "precision", "words", "kind"),
    [
        ("med-moe-phi2-2.7b", "mixed", VISION_INT8, ir.DataType.UINT8),
        ("med-moe-phi2-2.7b", "fp32", "fp32", ir.DataType.FLOAT),
        ("nano", "int8", build.VISION, ir.DataType.FLOAT16),  # convolutions: as ever
    ],
)
def test_transformers_of_quantised_models_are_quantised(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    precision: Any,
    words: str,
    kind: Any,
) -> None:
    monkeypatch.setattr(build, "export_vision", lambda _: product_model(normal(LEAST_WIDTH, 16)))
    source: Any = SimpleNamespace(config=PRESETS[preset])
    assert build._write_vision(source, tmp_path, BuildOptions(precision), SignatureMaker()) == words
    model = ir.load(tmp_path / "vision.onnx")
    assert kind in {value.dtype for value in model.graph.initializers.values()}


# --- its error -----------------------------------------------------------------------------------


def test_a_quantised_tower_is_near_torchs(bundle: Bundle, checkpoint: Checkpoint) -> None:
    pixels = normal(1, 3, SIDE, SIDE)
    expected = EagerRuntime(checkpoint).encode_image(pixels)
    assert 1e-4 < error(OrtRuntime(bundle).encode_image(pixels), expected) < 0.02


@settings(max_examples=30)
@given(outlier=st.floats(1, 1e4), channel=st.integers(0, GROUP - 1), seed=st.integers(0, 99))
def test_an_outlier_harms_its_own_group_only(outlier: float, channel: int, seed: int) -> None:
    """The product of what stands beside an outlier, in other groups, does not feel it."""
    weight, x = normal(LEAST_WIDTH, 8, seed=seed), normal(1, 3, LEAST_WIDTH, seed=seed + 1)
    weight[:GROUP] = 0  # what the outlier's own group is multiplied with
    expected = x @ weight
    x[..., channel] *= outlier
    quantised, _ = quantise_linears(product_model(weight))
    assert error(run_ort(quantised, x=x), expected) < 0.03


# --- a scale per token ---------------------------------------------------------------------------


def test_layers_of_the_tower_have_a_scale_per_token_and_the_projector_groups(
    by_tokens: Bundle,
) -> None:
    model = ir.load(by_tokens.path("vision.onnx"))
    found = op_types(model)
    assert (found["DynamicQuantizeMatMul"], found["MatMulNBits"]) == (len(HIDDEN), 1)
    assert (found["MultiHeadAttention"], found["Softmax"]) == (1, 0)
    assert by_tokens.manifest["quantisation"]["vision"] == VISION_TOKENS
    products = dict(int8_products(by_tokens.path("vision.onnx")))
    assert set(products) == {f"vision.layers.0.{name}.weight" for name in HIDDEN}
    assert all(pairs_within(weight) for weight in products.values())  # exact on any processor


def test_a_plan_knows_what_shares_a_scale(by_tokens: Bundle, outliers: Checkpoint) -> None:
    options = PlanOptions("cpu", "int8")
    asked = dataclasses.replace(options, vision="tokens")
    (of_bundle,) = plan(str(by_tokens.folder), options).forecasts
    assert plan(str(outliers.folder), asked).forecasts == (of_bundle,)
    (in_groups,) = plan(str(outliers.folder), options).forecasts
    assert of_bundle.vision == pytest.approx(0.44 * in_groups.vision)
    layers = sum(matrix.size for _, matrix in int8_products(by_tokens.path("vision.onnx")))
    assert in_groups.memory_run - of_bundle.memory_run == pytest.approx(layers / 8, rel=0.01)
    with pytest.raises(InputError, match="image tokens and tower were decided"):
        plan(str(by_tokens.folder), asked)


def test_large_channels_do_not_harm_what_shares_their_scale(
    by_tokens: Bundle, outliers: Checkpoint, tmp_path: Path
) -> None:
    pixels = normal(1, 3, SIDE, SIDE)
    expected = EagerRuntime(outliers).encode_image(pixels)
    assert 1e-4 < error(OrtRuntime(by_tokens).encode_image(pixels), expected) < 0.03
    undivided = export_vision(outliers)
    quantise_linears(undivided, tokens=True)
    save_model(undivided, tmp_path, "vision")
    graph = tmp_path / "vision.onnx"
    found = GraphRuntime(by_tokens, graph, graph).encode_image(pixels)
    assert error(found, expected) > 0.05  # which the division is for


def test_folding_rounds_nothing(outliers: Checkpoint) -> None:
    """Factors are powers of two, and a model divided by them computes the same."""
    factors = smoothing(outliers)
    for each in factors.values():
        for scale in (each.rows, each.columns):
            assert scale is None or (np.frexp(scale)[0] == 0.5).all()
    model = export_vision(outliers, factors)
    divide_inputs(model, factors)
    fuse_attention(model, outliers.config.vision.heads)
    pixels = normal(1, 3, SIDE, SIDE)
    expected = EagerRuntime(outliers).encode_image(pixels)
    assert error(run_ort(model, pixels=pixels)[0], expected) < 1e-5


def test_torch_reads_the_divided_weights(by_tokens: Bundle, outliers: Checkpoint) -> None:
    pixels = normal(1, 3, SIDE, SIDE)
    expected = EagerRuntime(outliers).encode_image(pixels)
    assert error(TorchBundleRuntime(by_tokens, "cpu").encode_image(pixels), expected) < 0.03


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_siglips_tower_has_scales_per_token_too(
    tiny_checkpoint: Make, tmp_path: Path, feature: Literal["patch", "cls_patch"]
) -> None:
    tiny = read_checkpoint(tiny_checkpoint("tiny-qwen"))
    tower = dataclasses.replace(
        tiny.config.vision,
        feature_size=LEAST_WIDTH,
        intermediate_size=256,
        layers=3,
        select_feature=feature,
    )
    config = dataclasses.replace(tiny.config, vision=tower)
    tensors = ((name, t if "norm" in name else t * 4) for name, t in random_tensors(config, 0))
    write_checkpoint(tmp_path / "from", config, tensors, tokenizer_file=tiny.tokenizer_file)
    found = Bundle.open(export_bundle(tmp_path / "from", tmp_path / "out", TOKENS))
    operators = op_types(ir.load(found.path("vision.onnx")))
    assert (operators["DynamicQuantizeMatMul"], operators["MultiHeadAttention"]) == (12, 2)
    assert operators["Softmax"] == 0
    pixels = normal(1, 3, tower.image_size, tower.image_size)
    expected = EagerRuntime(read_checkpoint(tmp_path / "from")).encode_image(pixels)
    for runtime in (OrtRuntime(found), TorchBundleRuntime(found, "cpu")):
        assert 1e-4 < error(runtime.encode_image(pixels), expected) < 0.03


def test_the_way_back_from_scales_per_token(
    by_tokens: Bundle, outliers: Checkpoint, tmp_path: Path
) -> None:
    model = float_vision(by_tokens)
    assert {node.domain for node in model.graph} == {""} == set(model.graph.opset_imports)
    save_model(vision_graph(by_tokens, CUDA), tmp_path, "vision")
    graph, pixels = tmp_path / "vision.onnx", normal(1, 3, SIDE, SIDE)
    expected = EagerRuntime(outliers).encode_image(pixels)
    assert error(GraphRuntime(by_tokens, graph, graph).encode_image(pixels), expected) < 0.03


def test_matrices_too_narrow_for_8_bits_stay_so(tiny_checkpoint: Make, tmp_path: Path) -> None:
    narrow = Bundle.open(export_bundle(tiny_checkpoint(), tmp_path / "out", TOKENS))
    assert narrow.manifest["quantisation"]["vision"] == build.VISION
    assert "DynamicQuantizeMatMul" not in op_types(ir.load(narrow.path("vision.onnx")))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_towers_that_are_not_in_8_bits_have_no_scales_to_choose(
    tiny_checkpoint: Make, tmp_path: Path, precision: Any
) -> None:
    preset = "tiny" if precision == "fp32" else "nano"
    source: Any = SimpleNamespace(config=PRESETS[preset], names={}, tokenizer=None)
    with pytest.raises(InputError, match="not"):
        check_exportable(source, BuildOptions(precision, vision="tokens"), calibrated=False)


# --- the way back --------------------------------------------------------------------------------


def test_the_way_back_gives_standard_onnx_with_the_stored_weights(bundle: Bundle) -> None:
    model = float_vision(bundle)
    assert {node.domain for node in model.graph} == {""} == set(model.graph.opset_imports)
    assert {tensor_of(value).dtype for value in model.graph.initializers.values()} <= {
        *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64)
    }
    for name in IN_8_BITS:
        found = tensor_of(model.graph.initializers[f"{name}.weight"]).numpy()
        assert np.array_equal(found, BundleWeights(bundle, "cpu").floats(f"{name}.weight").numpy())


def test_the_stored_weights_are_the_checkpoints_rounded(
    bundle: Bundle, checkpoint: Checkpoint
) -> None:
    graph = float_vision(bundle).graph
    for name in IN_8_BITS:
        found = tensor_of(graph.initializers[f"{name}.weight"]).numpy().T  # [N, K]
        expected = checkpoint.tensor(f"{name}.weight").float().numpy()
        groups = expected.reshape(len(expected), -1, GROUP)
        step = np.abs(groups).max(-1, keepdims=True) / 127
        off = np.abs(found.reshape(groups.shape) - groups)
        assert (off <= step * (0.5 + 127 * 2**-11)).all()  # and what fp16 takes from the scale


@pytest.mark.parametrize("target", [CUDA, RTX], ids=str)
def test_other_targets_compute_the_same_in_half(
    bundle: Bundle, checkpoint: Checkpoint, tmp_path: Path, target: Target
) -> None:
    model = vision_graph(bundle, target)
    assert {node.domain for node in model.graph} == {""}
    matrix = model.graph.initializers["projector.0.weight"]
    assert matrix.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if target.dtype == "bf16":
        return  # which no provider of a CPU computes
    save_model(model, tmp_path, "vision")
    graph = tmp_path / "vision.onnx"
    pixels = normal(1, 3, SIDE, SIDE)
    expected = EagerRuntime(checkpoint).encode_image(pixels)
    assert error(GraphRuntime(bundle, graph, graph).encode_image(pixels), expected) < 0.02


@needs_rtx
def test_an_engine_is_built_of_it(bundle: Bundle, tmp_path: Path) -> None:
    save_model(vision_graph(bundle, RTX), tmp_path, "vision")
    built = build_engine(
        tmp_path / "vision.onnx",
        tmp_path / "vision.engine",
        library="tensorrt-rtx",
        gpu=find_gpu("sm89", "tensorrt-rtx"),
        profiles=[],
    )
    assert built.bytes > (tmp_path / "vision.data").stat().st_size
