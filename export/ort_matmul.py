"""Pass: `DequantizeLinear -> MatMul` as ONNX Runtime's W8A8 `DynamicQuantizeMatMul`.

Activations are quantised to 8 bits as they arrive, one scale for the whole input; products
accumulate in int32.
"""

import onnx_ir as ir

from medmoe_edge.export.builder import CONTRIB


def lower_matmul(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every pair, also inside branches; returns `(model, modified)`."""
    pairs = [
        (node, weight.producer())
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "MatMul" and (weight := node.inputs[1]) is not None
    ]
    fused = [(node, dequantise) for node, dequantise in pairs if _dequantises(dequantise)]
    for node, dequantise in fused:
        assert dequantise is not None
        replacement = ir.node(
            "DynamicQuantizeMatMul", [node.inputs[0], *dequantise.inputs], domain=CONTRIB
        )
        old, new = node.outputs[0], replacement.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, replacement)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if not dequantise.outputs[0].uses():
            model.graph.remove(dequantise, safe=True)
        model.graph.opset_imports[CONTRIB] = 1
    return model, bool(fused)


def _dequantises(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"
