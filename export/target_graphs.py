"""The graphs of every target but the portable one, made from a bundle's stored weights.

onnxruntime-cuda  QMoE, MatMulNBits and GroupQueryAttention in half
tensorrt-rtx      standard ONNX in half, of fixed capacity: our ops are inlined, TensorScatter
                  becomes TensorRT's in-place cache update, and integers behind DequantizeLinear
                  stay integers in the engine. Every expert runs on every token: that has no
                  branches, so that a decode step is one CUDA graph
tensorrt          the same, with the plugin for the experts: only the chosen ones are read

Those of a paged target take their experts from slots (`expert_slots.py`); TensorRT's are then in
standard ops for both libraries.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, NameFixPass

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.target import Target
from medmoe_edge.config import ModelConfig
from medmoe_edge.export.builder import MEDMOE, initializer, tensor_of
from medmoe_edge.export.expert_slots import Stacks, reads_slots, write_experts
from medmoe_edge.export.external_data import save_model
from medmoe_edge.export.moe_op import MoESpec
from medmoe_edge.export.passes.half_graph import Keep, routing, to_half_graph
from medmoe_edge.export.passes.ort_attention import lower_attention
from medmoe_edge.export.passes.ort_cuda_matmul import lower_matmul_cuda
from medmoe_edge.export.passes.ort_cuda_moe import lower_moe_cuda
from medmoe_edge.export.passes.ort_cuda_slots import take_experts_from_slots
from medmoe_edge.export.passes.tensorrt_moe import lower_moe_to_plugin
from medmoe_edge.export.passes.tensorrt_slots import lower_moe_to_slots
from medmoe_edge.export.stored import specification
from medmoe_edge.export.stored_matrix import Array, lazy_tensor
from medmoe_edge.export.stored_vision import float_vision

Progress = Callable[[str, int, int], None]
HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def write_graphs(
    bundle: Bundle, target: Target, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `vision` and `decoder` (.onnx and .data) for a target, and paged experts beside them.

    Returns what the manifest says of where experts then lie. Raises `BundleError` where the
    bundle's graphs cannot be read, and as `lower` does.
    """
    save_model(vision_graph(bundle, target), folder, "vision")
    report = partial(progress, "graphs") if progress else None
    model = specification(bundle)
    experts = lower(model, bundle.config, target)
    extents = save_model(model, folder, "decoder", progress=report)
    return write_experts(folder, bundle.config, experts) if experts else {"experts": extents}


def decoder_graph(bundle: Bundle, target: Target) -> ir.Model:
    """The decoder; weights are read when they are written."""
    model = specification(bundle)
    lower(model, bundle.config, target)
    return model


def lower(model: ir.Model, config: ModelConfig, target: Target) -> list[Stacks]:
    """All of a target's passes over a specification; returns the experts of each layer, if paged.

    Raises `ModelError` for what the target cannot compute.
    """
    spec = MoESpec.of(config) if config.moe else None
    experts: list[Stacks] = []
    if target.name == "onnxruntime-cuda":
        lower_attention(model)
        if spec:
            lower_moe_cuda(model, spec)
        lower_matmul_cuda(model)
    else:
        if spec and target.paged:
            experts = lower_moe_to_slots(model, spec, HALVES[target.dtype])
        elif spec and target.name == "tensorrt":
            lower_moe_to_plugin(model, spec, HALVES[target.dtype])
        widen_int2(model)
        inline(model)
        _fix_capacity(model.graph, target.capacity)
    to_half_graph(model, HALVES[target.dtype], _exact(model))
    if target.paged and target.name == "onnxruntime-cuda":
        experts = take_experts_from_slots(model)
    return experts


def _exact(model: ir.Model) -> Keep:
    """What stays as it is: routing, scales as they are stored, slots, the plugin's own types."""
    routes = routing(model)
    return lambda node: (
        routes(node)
        or node.op_type == "DequantizeLinear"
        or node.domain == MEDMOE
        or reads_slots(node)
    )


def vision_graph(bundle: Bundle, target: Target) -> ir.Model:
    """The vision tower and projector in half."""
    model = float_vision(bundle)
    to_half_graph(model, HALVES[target.dtype], lambda node: False)
    return model


def inline(model: ir.Model) -> tuple[ir.Model, bool]:
    """Put the bodies of our ops where they are used; returns `(model, modified)`."""
    modified = bool(model.functions)
    InlinePass()(model)
    NameFixPass()(model)
    return model, modified


def widen_int2(model: ir.Model) -> tuple[ir.Model, bool]:
    """Store 2-bit integers in 4 bits, lazily: TensorRT reads none; returns `(model, modified)`."""
    graph = model.graph
    narrow = [value for value in graph.initializers.values() if value.dtype == ir.DataType.INT2]
    for value in narrow:
        source, name = tensor_of(value), str(value.name)
        shape = list(source.shape.numpy())
        wide = initializer(lazy_tensor(name, partial(_as_int4, source), ir.DataType.INT4, shape))
        del graph.initializers[name]
        graph.register_initializer(wide)
        value.replace_all_uses_with(wide)
    return model, bool(narrow)


def _as_int4(source: ir.TensorProtocol) -> Array:
    return source.numpy().astype(np.int8).astype(ml_dtypes.int4)


def _fix_capacity(graph: ir.Graph, capacity: int) -> None:
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name).startswith(("past_", "present_")):
            assert value.shape is not None
            heads, size = value.shape[1], value.shape[3]
            value.shape = ir.Shape([1, heads, capacity, size])
