"""The decoder cut at its experts, for a runtime that pages them in by itself.

Written beside a bundle's `decoder.onnx`, over the same `decoder.data`, so that they cost a few
kilobytes each and no second copy of any weight:

    segment.0.onnx   embeddings -> tokens.0 [1, S, D], gates.0 and chosen.0 [S, K] of the first
                     layer with experts, and whatever later segments read
    segment.1.onnx   routed.0 [1, S, D], the chosen experts' sum -> ... tokens.1, gates.1, chosen.1
    ...
    segment.M.onnx   ... -> logits and router_logits, as of `decoder.onnx`

A segment reads and writes values of the same names, and the KV cache of its own layers. All but the
routed experts is in them, the meta experts too: what runs before a routed sum is known comes as
early as it can. The experts' graphs are those of `ort_expert`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from medmoe_edge.config import ModelConfig
from medmoe_edge.export.builder import MEDMOE, Builder, floats, tensor_of
from medmoe_edge.export.external_data import Extents
from medmoe_edge.export.moe_op import MoESpec, add_meta, route
from medmoe_edge.export.passes.ort_attention import lower_attention
from medmoe_edge.export.passes.ort_expert import write_experts
from medmoe_edge.export.passes.ort_matmul import lower_matmul
from medmoe_edge.export.passes.ort_qkv import fuse_qkv
from medmoe_edge.export.stored import StoredWeights, specify

INPUT = -1  # the stage of what is there before any node runs


def write_paged_graphs(folder: Path, config: ModelConfig, extents: Extents) -> dict[str, Any]:
    """Write the segments and the experts' graphs beside the lowered decoder of `folder`.

    Returns the manifest's `paging`: how many `segments`, and what `write_experts` says.
    """
    stored = StoredWeights(folder / "decoder.onnx")
    model = specify(config, stored)
    lower_attention(model)
    fuse_qkv(model)
    cut_experts(model, MoESpec.of(config))
    lower_matmul(model)
    NameFixPass()(model)
    segments = list(split(model))
    for index, segment in enumerate(segments):
        _place_weights(segment, stored.stored)
        ir.save(segment, folder / f"segment.{index}.onnx")
    about = write_experts(folder, stored, extents, MoESpec.of(config).activation)
    return {"segments": len(segments), **about}


def cut_experts(model: ir.Model, spec: MoESpec) -> tuple[ir.Model, bool]:
    """Leave out the routed experts of every `medmoe::MoE`; returns `(model, modified)`.

    Of the n-th, `tokens.n`, `gates.n` and `chosen.n` become outputs, `routed.n` an input.
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == MEDMOE and node.op_type == "MoE"]
    for index, node in enumerate(nodes):
        build = Builder()
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        weights = {
            name: value
            for name, value in zip(spec.weight_names, node.inputs[1:], strict=True)
            if value is not None
        }
        gates, chosen, _ = route(build, x, weights, spec.top_k)
        per_token = build.constant([-1, spec.top_k])
        gates, chosen = (build.op("Reshape", value, per_token) for value in (gates, chosen))
        named = {
            "tokens": (build.op("Identity", x), ir.DataType.FLOAT, x.shape),
            "gates": (gates, ir.DataType.FLOAT, ir.Shape(["S", spec.top_k])),
            "chosen": (chosen, ir.DataType.INT64, ir.Shape(["S", spec.top_k])),
        }
        for name, (value, dtype, shape) in named.items():
            value.name, value.dtype, value.shape = f"{name}.{index}", dtype, shape
            graph.outputs.append(value)
        routed = floats(f"routed.{index}", 1, "S", "D")
        graph.inputs.append(routed)
        new = add_meta(build, x, routed, weights, spec)
        graph.insert_before(node, build.nodes)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    if nodes:
        del model.functions[(MEDMOE, "MoE", "")]
        del graph.opset_imports[MEDMOE]
    return model, bool(nodes)


def split(model: ir.Model) -> Iterator[ir.Model]:
    """The stages of a cut decoder, each a model of its own: stage n + 1 begins with `routed.n`."""
    graph = model.graph
    stages = _stages(graph)
    last = max(stages.values())
    for stage in range(last + 1):
        reads: dict[ir.Value, None] = {}
        writes: dict[ir.Value, None] = {}
        for value, own in stages.items():
            if own > stage:
                continue
            used_later = any(stages.get(user.outputs[0], INPUT) > own for user, _ in value.uses())
            if own == stage and (value.is_graph_output() or used_later):
                writes[value] = None
            if any(stages.get(user.outputs[0]) == stage for user, _ in value.uses()) and (
                own < stage or value.is_graph_input()
            ):
                reads[value] = None
        for value in writes:
            value.dtype = value.dtype or ir.DataType.FLOAT  # what is handed on are activations
        part = ir.convenience.extract(graph, list(reads), list(writes))
        part.name = f"segment.{stage}"
        yield ir.Model(part, ir_version=model.ir_version)


def _stages(graph: ir.Graph) -> dict[ir.Value, int]:
    """Of every value that depends on an input, the stage that computes it.

    Inputs are there from the start, `routed.n` from the end of stage n. What depends on weights
    alone belongs to no stage: each that reads it has its own.
    """
    stages = {
        value: int(str(value.name).removeprefix("routed.")) + 1
        if str(value.name).startswith("routed.")
        else INPUT
        for value in graph.inputs
    }
    for node in graph:
        read = [stages[value] for value in node.inputs if value in stages]
        if read:
            stages.update(dict.fromkeys(node.outputs, max(0, *read)))
    return stages


def _place_weights(model: ir.Model, stored: Mapping[str, ir.TensorProtocol]) -> None:
    """Take every weight from where it lies in `decoder.data` already; in the order of names."""
    initializers = model.graph.initializers
    for name, value in sorted(initializers.items()):
        initializers[name] = initializers.pop(name)
        tensor = stored[name]
        assert tensor_of(value).nbytes == tensor.nbytes
        value.const_value = tensor
