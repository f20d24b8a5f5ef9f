"""Pass: `medmoe::Attention` as ONNX Runtime's `GroupQueryAttention`, which its CPU and CUDA share.

The graph's input `start` becomes that op's two: `seqlens_k` `[1]`, the last position of this step,
and `total_length` `[]`, the positions then in the cache. A buffer may be bound both as `past_*` and
as `present_*`: the cache is then written in place.
"""

import onnx_ir as ir

from medmoe_edge.export.builder import CONTRIB, MEDMOE, Builder, drop_function

ORT_OPSET = 21  # what is left needs no later one, and more releases of ONNX Runtime read it


def lower_attention(model: ir.Model) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::Attention` and drop the function; returns `(model, modified)`."""
    graph = model.graph
    nodes = [node for node in graph if node.domain == MEDMOE and node.op_type == "Attention"]
    if not nodes:
        return model, False
    lengths = [
        ir.val("seqlens_k", ir.DataType.INT32, [1]),
        ir.val("total_length", ir.DataType.INT32, []),
    ]
    for node in nodes:
        _replace(graph, node, lengths)
    places = [value.name for value in graph.inputs]
    at = places.index("start")
    graph.inputs[at : at + 1] = lengths
    drop_function(model, "Attention")
    graph.opset_imports[CONTRIB] = 1
    graph.opset_imports[""] = ORT_OPSET
    return model, True


def _replace(graph: ir.Graph, node: ir.Node, lengths: list[ir.Value]) -> None:
    q, k, v, past_key, past_value, _, cos, sin = node.inputs
    build = Builder()
    heads = node.attributes["num_heads"].as_int()
    outputs = build.ops(
        "GroupQueryAttention",
        *(q, k, v, past_key, past_value, *lengths, cos, sin),
        outputs=3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=heads,
        do_rotary=1,
    )
    for old, new in zip(node.outputs, outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(node, build.nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
