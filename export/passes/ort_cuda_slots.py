"""Pass: the experts of a graph for ONNX Runtime on CUDA, taken from slots instead of initializers.

What `lower_moe_cuda` made of each layer, one op over that layer's E stacked experts, becomes the
same op over the slots, in which experts of any layer may lie: it never looks into a slot that it
has no gate for, and nothing is gathered or copied. One graph input per kind of weight holds that
kind of every slot, `slots.<kind>` `[slots, ...]`, and is shared by all layers. The input `table`
`[M, E]` int32 names each expert's slot, -1 where it is absent: the gates that the graph computed
for experts are put to their slots, those of absent ones dropped, and the step must be run again
(`runtimes/slots/replay.py`). The outputs `chosen.<m>` `[B, S, K]` tell which experts it chose.

Executed on ONNX Runtime's CPU provider: the same bits whoever else is absent, and those of the
resident graph but for rounding with int4, where that packs its constants, and with two experts a
token in fp16, whose gates are a softmax over another number of columns.

On CUDA only `MoE`, of fp16 weights, can be had so far (`targets.plan_target`). The kernel of `QMoE`
repacks its weights when the session starts, which it can do with constants only; slots need what
that makes, `weights_prepacked` 1, made ahead of time. ONNX Runtime 1.31 makes it ahead of time in
its builds for CUDA alone (`pack_weights_for_cuda_mixed_gemm`); written anew and not tried on a GPU,
it would be garbage that nobody notices (github.com/microsoft/onnxruntime/issues/28748).
"""

from math import log

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge.export.builder import CONTRIB, Builder, tensor_of
from medmoe_edge.export.expert_slots import Pools, Stacks, declare_chosen
from medmoe_edge.export.passes.ort_cuda_moe import FLOOR

KINDS = {  # of the ops' inputs behind tokens and logits, by their schemas
    "MoE": ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"),
    "QMoE": ("fc1.weight", "fc1.scale", "fc1.bias", "fc2.weight", "fc2.scale", "fc2.bias"),
}


def take_experts_from_slots(model: ir.Model) -> list[Stacks]:
    """Do so to every layer; returns what the layers' experts were, to be stored by themselves.

    Raises `CheckpointError` where they differ in shape or format, as those of a mixed export may.
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == CONTRIB and node.op_type in KINDS]
    if not nodes:
        return []
    pools = Pools(len(nodes), int(_stored(nodes[0], 2).shape.numpy()[0]))
    layers = [_replace_weights(graph, node, pools) for node in nodes]
    pools.declare(graph)
    for row, node in enumerate(nodes):
        _route_to_slots(graph, node, pools, row)
    RemoveUnusedNodesPass()(model)
    return layers


def _replace_weights(graph: ir.Graph, node: ir.Node, pools: Pools) -> Stacks:
    taken = {}
    for place, kind in enumerate(KINDS[node.op_type], 2):
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is None:
            continue
        tensor = _stored(node, place)
        pool, build = pools.input_for(kind, tensor), Builder()
        cast = value.producer() is not None
        new = build.op("Cast", pool, to=int(ir.DataType.FLOAT)) if cast else pool
        graph.insert_before(node, build.nodes)
        node.replace_input_with(place, new)
        taken[str(pool.name)] = tensor
    return taken


def _stored(node: ir.Node, place: int) -> ir.TensorProtocol:
    """The constant behind an input; scales of groups are stored in fp16, behind a `Cast`."""
    value = node.inputs[place]
    cast = value.producer() if value is not None else None
    return tensor_of(value if cast is None else cast.inputs[0])


def _route_to_slots(graph: ir.Graph, node: ir.Node, pools: Pools, row: int) -> None:
    """From logits of experts `[T, E]` to those of slots, the last of which is for absent ones."""
    build, logits = Builder(), node.inputs[1]
    assert logits is not None
    dtype = (logits.dtype or ir.DataType.FLOAT).numpy().type
    declare_chosen(graph, _chosen(logits), row)
    slots = build.op("Shape", node.inputs[2], end=1)
    shape = build.op("Shape", logits)
    tokens = build.op("Shape", logits, end=1)
    wide = build.op("Concat", tokens, build.op("Add", slots, build.constant([1])), axis=0)
    nobody = build.op("Expand", build.constant(log(FLOOR), dtype), wide)  # [T, slots + 1]
    own = build.op("Gather", pools.table, build.constant(row), axis=0)  # [E]
    places = build.op("Expand", own, shape)  # -1 is the last column
    spread = build.op("ScatterElements", nobody, places, logits, axis=1)
    one = build.constant([1])
    kept = build.op("Slice", spread, build.constant([0]), slots, one)
    graph.insert_before(node, build.nodes)
    node.replace_input_with(1, kept)


def _chosen(logits: ir.Value) -> ir.Value:
    """The experts `[B, S, K]` whose gates the logits are."""
    node = logits.producer()
    while node is not None and node.op_type != "ScatterElements":
        before = node.inputs[0]
        node = before.producer() if before is not None else None
    assert node is not None
    chosen = node.inputs[1]
    assert chosen is not None
    return chosen
