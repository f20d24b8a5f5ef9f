"""A bundle's vision graph in floats: what targets with fast half arithmetic begin with.

A GPU multiplies the hundreds of rows of an image faster in half than it unpacks 8 bits, and
TensorRT knows no `MatMulNBits`.
"""

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.export.builder import CONTRIB, Builder, initializer, replace_node
from medmoe_edge.export.stored import PACKED, StoredWeights, load_graph
from medmoe_edge.export.stored_matrix import Array, lazy_tensor


def float_vision(bundle: Bundle) -> ir.Model:
    """The vision tower and projector as standard ONNX; weights are read when they are written.

    Every `MatMulNBits` is the `MatMul` with what its integers stand for. Raises `BundleError` where
    the graph cannot be read.
    """
    path = bundle.path("vision.onnx")
    model, stored = load_graph(path), StoredWeights(path)
    for node in list(model.graph):
        if node.op_type != "MatMulNBits":
            continue
        x, packed = node.inputs[:2]
        assert packed is not None
        weight = _dequantised(stored, str(packed.name).removesuffix(PACKED))
        model.graph.register_initializer(weight)
        build = Builder()
        replace_node(node, build, build.op("MatMul", x, weight))
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports.pop(CONTRIB, None)
    return model


def _dequantised(stored: StoredWeights, name: str) -> ir.Value:
    found = stored.quantised(name)
    assert found is not None
    shape = list(found[0].shape.numpy())
    return initializer(lazy_tensor(name, partial(_product, *found), ir.DataType.FLOAT, shape))


def _product(integers: ir.TensorProtocol, scale: ir.TensorProtocol) -> Array:
    """Integers `[K, N]` times the scales of their groups `[K / group, N]`."""
    groups, channels = scale.shape.numpy()
    grouped = integers.numpy().reshape(groups, -1, channels).astype(np.float32)
    weight: Array = (grouped * scale.numpy()[:, None].astype(np.float32)).reshape(-1, channels)
    return weight
