"""Pass: the experts of a graph for ONNX Runtime on CUDA, taken from slots instead of initializers.

What `lower_moe_cuda` made of each layer, one op over that layer's E stacked experts, becomes the
same op over the slots, in which experts of any layer may lie: it never looks into a slot that it
has no gate for, and nothing is gathered or copied. One graph input per kind of weight holds that
kind of every slot, `slots.<kind>` `[slots, ...]`, and is shared by all layers. The input `table`
`[M, E]` int32 names each expert's slot, -1 where it is absent: the gates that the graph computed
for experts are put to their slots, those of absent ones dropped, and the step must be run again
(`runtimes/slots_replay.py`). The outputs `chosen.<m>` `[B, S, K]` tell which experts it chose.

Executed on ONNX Runtime's CPU provider: the same bits whoever else is absent, and those of the
resident graph but for int4, where that packs its constants and rounds otherwise. For CUDA one thing
is missing: its kernel repacks `QMoE`'s weights when the session starts, which it can do with
constants only. Slots need the layout that this makes (`weights_prepacked` 1), made ahead of time.
"""

from collections.abc import Mapping
from math import log

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import CONTRIB, Builder, tensor_of
from medmoe_edge.export.ort_cuda_moe import FLOOR

KINDS = {  # of the ops' inputs behind tokens and logits, by their schemas
    "MoE": ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"),
    "QMoE": ("fc1.weight", "fc1.scale", "fc1.bias", "fc2.weight", "fc2.scale", "fc2.bias"),
}
TABLE = "table"

Stacks = Mapping[str, ir.TensorProtocol]
"""A layer's weights by the name of the input that takes their place, `[E, ...]`."""


def take_experts_from_slots(model: ir.Model, slots: int) -> list[Stacks]:
    """Do so to every layer; returns what the layers' experts were, to be stored by themselves.

    Raises `CheckpointError` where they differ in shape or format, as those of a mixed export may.
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == CONTRIB and node.op_type in KINDS]
    pools: dict[str, ir.Value] = {}
    layers = [_replace_weights(graph, node, slots, pools) for node in nodes]
    if nodes:
        experts = next(iter(layers[0].values())).shape.numpy()[0]
        table = ir.val(TABLE, ir.DataType.INT32, (len(nodes), experts))
        graph.inputs.extend([table, *pools.values()])
        for row, node in enumerate(nodes):
            _route_to_slots(graph, node, table, row, slots)
        RemoveUnusedNodesPass()(model)
    return layers


def _replace_weights(
    graph: ir.Graph, node: ir.Node, slots: int, pools: dict[str, ir.Value]
) -> Stacks:
    taken = {}
    for place, kind in enumerate(KINDS[node.op_type], 2):
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is None:
            continue
        cast = value.producer()  # scales of groups are stored in fp16
        tensor = tensor_of(value if cast is None else cast.inputs[0])
        name, shape = f"slots.{kind}", (slots, *tensor.shape.numpy()[1:])
        pool = pools.setdefault(name, ir.val(name, tensor.dtype, shape))
        if (pool.dtype, pool.shape) != (tensor.dtype, ir.Shape(shape)):
            raise CheckpointError(
                f"{tensor.name} is stored otherwise than in the layers before it.",
                "Export in one precision to page experts on CUDA.",
            )
        build = Builder()
        new = pool if cast is None else build.op("Cast", pool, to=int(ir.DataType.FLOAT))
        graph.insert_before(node, build.nodes)
        node.replace_input_with(place, new)
        taken[name] = tensor
    return taken


def _route_to_slots(graph: ir.Graph, node: ir.Node, table: ir.Value, row: int, slots: int) -> None:
    """From logits of experts `[T, E]` to those of slots, the last of which is for absent ones."""
    build, logits = Builder(), node.inputs[1]
    chosen = _chosen(logits)
    chosen.name = f"chosen.{row}"
    graph.outputs.append(chosen)
    shape = build.op("Shape", logits)
    tokens = build.op("Shape", logits, end=1)
    wide = build.op("Concat", tokens, build.constant([slots + 1]), axis=0)
    nobody = build.op("Expand", build.constant(log(FLOOR), np.float32), wide)  # [T, slots + 1]
    own = build.op("Gather", table, build.constant(row), axis=0)  # [E]
    places = build.op("Expand", own, shape)  # -1 is the last column
    spread = build.op("ScatterElements", nobody, places, logits, axis=1)
    one = build.constant([1])
    kept = build.op("Slice", spread, build.constant([0]), build.constant([slots]), one)
    graph.insert_before(node, build.nodes)
    node.replace_input_with(1, kept)


def _chosen(logits: ir.Value | None) -> ir.Value:
    """The experts `[B, S, K]` whose gates the logits are."""
    node = logits.producer() if logits is not None else None
    while node is not None and node.op_type != "ScatterElements":
        before = node.inputs[0]
        node = before.producer() if before is not None else None
    assert node is not None
    chosen = node.inputs[1]
    assert chosen is not None
    chosen.dtype = ir.DataType.INT64
    return chosen
