"""A thin layer over onnx-ir's tape, so that a graph reads as it runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 24
IR_VERSION = 10
CONTRIB = "com.microsoft"
MEDMOE = "medmoe"


class Builder:
    """Collects the nodes of one graph, function or branch."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """What was emitted, in order."""
        return self._tape.nodes

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """One node with one output."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """One node with several outputs."""
        return self._tape.op_multi_out(
            op_type, inputs, attributes, num_outputs=outputs, domain=domain
        )

    def constant(self, value: Any, dtype: type[np.generic] = np.int64) -> ir.Value:
        """A small constant; a node, since functions and branches hold no initializers."""
        return self._tape.op("Constant", [], {"value": ir.tensor(np.asarray(value, dtype))})


def replace_node(node: ir.Node, build: Builder, new: ir.Value) -> None:
    """Put what was built, whose result is `new`, in the place of a node with one output."""
    old, graph = node.outputs[0], node.graph
    assert graph is not None
    new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(node, build.nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def drop_function(model: ir.Model, name: str) -> None:
    """Forget an op of ours that no node uses any more, and our domain with the last of them."""
    del model.functions[(MEDMOE, name, "")]
    if not any(node.domain == MEDMOE for node in model.graph):
        del model.graph.opset_imports[MEDMOE]


def initializer(tensor: ir.TensorProtocol) -> ir.Value:
    """A stored tensor as a value of the same name."""
    return ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


def floats(name: str, *shape: int | str) -> ir.Value:
    """A named float value of known shape, for inputs and outputs."""
    return ir.val(name, ir.DataType.FLOAT, shape)


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor behind an initializer."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value
