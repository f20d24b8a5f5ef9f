"""The passes for ONNX Runtime on CUDA, run on its CPU provider, which has the same ops."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from graphs import (
    STRUCTURES,
    Floats,
    constant,
    moe_config,
    moe_layer,
    moe_model,
    normal,
    op_types,
    product_model,
    random_tokens,
    relative,
    run_ort,
)

from medmoe_edge.bundle.bundle import Bundle, write_manifest
from medmoe_edge.calibration.quantisers import Format, round_to_nearest
from medmoe_edge.checkpoint.reader import read_checkpoint
from medmoe_edge.config import ModelConfig, Precision
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.decoder import EXPERT_WEIGHTS, DecoderBuilder, MoESpec
from medmoe_edge.export.half import routing, to_half_graph
from medmoe_edge.export.passes.ort_cpu import lower_attention
from medmoe_edge.export.passes.ort_cuda import lower_matmul_cuda, lower_moe_cuda
from medmoe_edge.export.plan import Plan
from medmoe_edge.export.quantise import quantise_weights
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.models.decoder import MoE
from medmoe_edge.runtimes.base import Step, chosen_experts
from medmoe_edge.runtimes.ort.runtime import OrtRuntime
from medmoe_edge.runtimes.torch.eager import EagerRuntime

Make = Callable[..., Path]
OWN = "decoder.layers.0.ffn."
MIXED = (Format(2, 32), Format(4, 64), Format(4, 32), Format(8, 64))


def mixed(spec: MoESpec) -> Plan:
    """Every expert in another format, as a mixed export may have it."""
    parts = [name for name in EXPERT_WEIGHTS[spec.activation] if name.endswith("weight")]
    return Plan(
        "int4",
        "rtn",
        formats={
            f"{OWN}experts.{index}.{part}": form
            for index, form in enumerate(MIXED)
            for part in parts
        },
    )


def plan_of(name: str, spec: MoESpec) -> Plan:
    precision: dict[str, Precision] = {"fp32": "fp32", "int8": "int8", "int4": "int4"}
    return mixed(spec) if name == "mixed" else Plan(precision[name], "rtn")


def exact(moe: MoE, plan: Plan, x: Floats) -> npt.NDArray[np.float64]:
    """The torch layer in double precision, with what the stored integers stand for."""
    double = copy.deepcopy(moe).double()
    for name, tensor in double.state_dict().items():
        found = plan(f"{OWN}{name}")
        if found is not None:
            tensor.copy_(torch.from_numpy(found[1](tensor.float().numpy()).dequantise()))
    with torch.no_grad():
        y: npt.NDArray[np.float64] = double(torch.from_numpy(x).double()).numpy()
    return y


def lowered(moe: MoE, config: ModelConfig, plan: Plan) -> ir.Model:
    model = moe_model(moe, config)
    quantise_weights(model, plan)
    assert lower_moe_cuda(model, MoESpec.of(config)) == (model, True)
    lower_matmul_cuda(model)
    return model


# --- one layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fp32", "int8", "int4", "mixed"])
@pytest.mark.parametrize(("kind", "options"), STRUCTURES)
def test_the_op_computes_what_the_specification_says(
    kind: str, options: dict[str, Any], form: str
) -> None:
    config = moe_config(kind, size=64, hidden=128, **options)
    moe, plan = moe_layer(config), plan_of(form, MoESpec.of(config))
    model = lowered(moe, config, plan)
    ops = op_types(model)
    assert (ops["MoE"], ops["QMoE"], ops["If"]) == ((1, 0, 0) if form == "fp32" else (0, 1, 0))
    assert ops["DequantizeLinear"] == 0
    assert not model.functions
    assert "medmoe" not in model.graph.opset_imports
    assert all(value.uses() for value in model.graph.initializers.values())
    assert lower_moe_cuda(model, MoESpec.of(config)) == (model, False)
    assert lower_matmul_cuda(model) == (model, False)
    half = model.clone()
    to_half_graph(half, ir.DataType.FLOAT16, routing(half))
    # the CPU provider rounds activations to 8 bits where 8-bit weights come in groups
    bounds = (0.02, 0.02) if form == "mixed" else (1e-5, 2e-3)
    for batch, length in ((2, 9), (1, 1)):
        x = random_tokens(batch, length, 64)
        expected = exact(moe, plan, x)
        assert relative(run_ort(model, x=x), expected) < bounds[0]
        assert 1e-6 < relative(run_ort(half, x=x), expected) < bounds[1]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gates_are_ours_whatever_a_provider_normalises(top_k: int) -> None:
    config = moe_config(size=64, hidden=64, top_k=top_k)
    moe, x = moe_layer(config), random_tokens(1, 7, 64)
    model, plain = (lowered(moe, config, Plan("int4", "rtn")) for _ in range(2))
    for node in plain.graph:
        if node.op_type == "QMoE":
            node.attributes["normalize_routing_weights"] = ir.AttrInt64(
                "normalize_routing_weights", 0
            )
    assert relative(run_ort(plain, x=x), run_ort(model, x=x)) < 1e-6
    (logits,) = (node.inputs[1] for node in model.graph if node.op_type == "QMoE")
    assert logits is not None
    logits.dtype = ir.DataType.FLOAT
    model.graph.outputs[:] = [logits]
    over_all = np.exp(run_ort(model, x=x).astype(np.float64))  # as CUDA's kernel sees them
    gates = np.sort(over_all / over_all.sum(-1, keepdims=True))[:, -top_k:]
    np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4), ("mixed", 8)])
def test_integers_and_scales_are_those_of_every_other_target(form: str, bits: int) -> None:
    config = moe_config(size=64, hidden=64)
    moe, plan = moe_layer(config), plan_of(form, MoESpec.of(config))
    model = lowered(moe, config, plan)
    packed = constant(model, f"{OWN}experts.gate_up.weight.packed")
    scale = constant(model, f"{OWN}experts.gate_up.weight.scale").astype(np.float32)
    per_byte = 8 // bits
    for expert in range(4):
        for part, name in enumerate(("gate", "up")):
            weight = f"experts.{expert}.{name}.weight"
            found = plan(OWN + weight)
            assert found is not None
            quantised = found[1](moe.state_dict()[weight].numpy())
            for channel in (0, 17, 63):
                row = 2 * channel + part  # gate and up alternate
                stored = packed[expert, row]
                integers = [
                    (int(stored[k // per_byte]) >> bits * (k % per_byte)) % 2**bits
                    - 2 ** (bits - 1)
                    for k in range(64)
                ]
                assert integers == quantised.integers[channel].tolist()
                assert np.array_equal(
                    np.repeat(scale[expert, row], 64 // scale[expert, row].size),
                    np.repeat(quantised.scale[channel], 64 // quantised.scale.shape[1]),
                )


def test_sizes_that_cudas_kernel_cannot_take_are_refused() -> None:
    config = moe_config(size=32, hidden=64)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate\.weight reads 32 channels"):
        lowered(moe_layer(config), config, Plan("int4", "rtn"))
    assert op_types(lowered(moe_layer(config), config, Plan("fp32", "rtn")))["MoE"] == 1


# --- products ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "bits", "block"),
    [
        (Format(2, 32), 4, 32),
        (Format(4, 32), 4, 32),
        (Format(4, 128), 4, 128),
        (Format(8, 128), 8, 128),
        (Format(8), 8, 128),
    ],
    ids=str,
)
def test_products_are_those_of_what_is_stored(form: Format, bits: int, block: int) -> None:
    weight, x = normal(256, 24), random_tokens(1, 5, 256)
    model = product_model(weight)
    quantise_weights(model, lambda _: (form, lambda rows: round_to_nearest(rows, form)))
    assert lower_matmul_cuda(model) == (model, True)
    (node,) = (node for node in model.graph if node.op_type == "MatMulNBits")
    assert node.attributes["bits"].as_int() == bits
    assert node.attributes["block_size"].as_int() == block
    stored = round_to_nearest(np.ascontiguousarray(weight.T), form)
    groups = stored.scale.astype(np.float16 if form.group else np.float32).astype(np.float64)
    scales = np.repeat(groups, 256 // groups.shape[1], 1)  # [N, K]
    expected = x.astype(np.float64) @ (stored.integers * scales).T
    assert relative(run_ort(model, x=x), expected) < 1e-5


def test_a_width_that_no_block_divides_stays_as_it_is() -> None:
    model = product_model(normal(24, 8))
    quantise_weights(model, lambda _: (Format(8), lambda rows: round_to_nearest(rows, Format(8))))
    assert lower_matmul_cuda(model) == (model, False)
    assert op_types(model) == {"DequantizeLinear": 1, "MatMul": 1}


def test_a_matrix_that_is_read_twice_is_stored_once() -> None:
    model = product_model(normal(64, 64))
    (product,) = model.graph
    again = ir.node("MatMul", [product.outputs[0], product.inputs[1]])
    again.outputs[0].name, again.outputs[0].dtype = "z", ir.DataType.FLOAT
    model.graph.append(again)
    model.graph.outputs[:] = [again.outputs[0]]
    quantise_weights(model, lambda _: (Format(8), lambda rows: round_to_nearest(rows, Format(8))))
    lower_matmul_cuda(model)
    assert op_types(model) == {"MatMulNBits": 2}
    assert set(model.graph.initializers) == {"w.packed", "w.blocks.scale"}


# --- whole decoders ---------------------------------------------------------------------------


def cuda_bundle(
    checkpoint: Path, bundle: Path, out: Path, precision: Precision, half: bool
) -> Bundle:
    """A checkpoint's decoder lowered for CUDA, beside the tower and tokenizer of any bundle."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for name in ("decoder.onnx", "decoder.data", "manifest.json"):
        (out / name).unlink()
    source = read_checkpoint(checkpoint)
    model = DecoderBuilder(source.config, WeightSource(source)).model()
    quantise_weights(model, Plan(precision, "rtn"))
    lower_attention(model)
    lower_moe_cuda(model, MoESpec.of(source.config))
    lower_matmul_cuda(model)
    if half:
        to_half_graph(model, ir.DataType.FLOAT16, routing(model))
    save_model(model, out, "decoder")
    dtype = "fp16" if half else "fp32"
    kept = {key: manifest[key] for key in manifest if key not in ("files", "seal")}
    kept["config"] = source.config.to_json()
    write_manifest(out, {**kept, "target": {"name": "onnxruntime-cuda", "dtype": dtype}})
    return Bundle.open(out)


def rounded(checkpoint: Path, precision: Precision) -> EagerRuntime:
    """Torch with what the stored integers stand for."""
    source, plan = read_checkpoint(checkpoint), Plan(precision, "rtn")
    weights, runtime = WeightSource(source), EagerRuntime(source)
    state = {
        name: torch.from_numpy(found[1](weights.array(name)).dequantise())
        for name in source.names
        if (found := plan(name)) is not None
    }
    runtime.model.load_state_dict(state, strict=False)
    return runtime


def chosen(step: Step, top_k: int) -> npt.NDArray[np.int64]:
    """Which experts run, as one number for each token and layer `[S, M]`."""
    numbers: npt.NDArray[np.int64] = (2 ** chosen_experts(step.router_logits, top_k)).sum(-1)
    return numbers


def margin(step: Step, top_k: int) -> Floats:
    """By how much the last of the chosen beats the first of the others `[S, M]`.

    A difference smaller than what fp16 leaves of it can turn out either way.
    """
    best = -np.sort(-step.router_logits)
    return best[..., top_k - 1] - best[..., top_k]


@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    ("precision", "half", "bound"),
    [("fp32", False, 1e-3), ("fp32", True, 1e-2), ("int8", True, 1e-2), ("int4", True, 1e-2)],
)
def test_a_decoder_agrees_over_prefill_and_decode(
    tiny_checkpoint: Make,
    tiny_bundle: Make,
    tmp_path: Path,
    preset: str,
    top_k: int,
    precision: Precision,
    half: bool,
    bound: float,
) -> None:
    checkpoint = tiny_checkpoint(preset, top_k=top_k)
    bundle = cuda_bundle(checkpoint, tiny_bundle(), tmp_path / "b", precision, half)
    runtime, expected = OrtRuntime(bundle, device="cpu"), rounded(checkpoint, precision)
    ours, theirs = runtime.new_cache(40), expected.new_cache(40)
    assert ours.buffers["key.0"].data_type() == f"tensor({'float16' if half else 'float'})"
    generator = np.random.default_rng(0)
    for length in (9, 5, 1, 1):  # prefill, a further chunk, decode
        embeds = generator.normal(0, 0.2, (length, 64)).astype(np.float32)
        step, true = runtime.step(embeds, ours), expected.step(embeds, theirs)
        assert relative(step.logits, true.logits) <= bound
        assert step.logits.dtype == step.router_logits.dtype == np.float32
        same = chosen(step, top_k) == chosen(true, top_k)
        assert same.all() or half
        assert same[margin(true, top_k) > bound * np.abs(true.router_logits).max()].all()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["tiny", "tiny-phi"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_cuda_computes_what_the_cpu_does(
    tiny_checkpoint: Make,
    tiny_bundle: Make,
    tmp_path: Path,
    preset: str,
    top_k: int,
    precision: Precision,
) -> None:
    checkpoint = tiny_checkpoint(preset, top_k=top_k)
    bundle = cuda_bundle(checkpoint, tiny_bundle(), tmp_path / "b", precision, half=True)
    ours, theirs = OrtRuntime(bundle, device="cuda"), OrtRuntime(bundle, device="cpu")
    caches = ours.new_cache(40), theirs.new_cache(40)
    assert caches[0].buffers["key.0"].device_name() == "cuda"
    for length in (9, 5, 1, 1):
        embeds = normal(length, 64, seed=length) * np.float32(0.2)
        step, expected = ours.step(embeds, caches[0]), theirs.step(embeds, caches[1])
        assert relative(step.logits, expected.logits) < 1e-2
        assert relative(step.router_logits, expected.router_logits) < 1e-2
