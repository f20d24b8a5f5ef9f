"""Passes to half precision: weights alone, or a whole graph.

Pass: large weights stored in fp16 behind `Cast`; the arithmetic stays fp32.

For what is small beside the decoder and costs most when it errs: the vision tower. In int8 per
channel nano's image tokens are off by 1 to 2% of their length, and on pictures unlike those it was
trained on that alone sends one token in a hundred to another expert; in fp16 it is nothing.

Pass: a graph of fp32 arithmetic becomes one of fp16 or bf16.

Inputs and outputs keep their types behind `Cast`s, but for the KV cache (`past_*`, `present_*`),
which becomes half. Weights, and the scales of quantised ones, are halved when they are written.
Some nodes are kept in fp32, with `Cast`s around them: what the caller says (`routing` says the
routers), and ops that ONNX does not define on half. `LayerNormalization` need not be: by definition
(`stash_type` 1) its statistics are fp32.

Types follow ONNX's own schemas. Every op of another domain yields the type of its first input,
which holds for those that this project emits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import defs
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge._types import there
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import replace_initializer, tensor_of
from medmoe_edge.export.stored import SCALE

SMALL = 256  # weights: below, they stay as they are


def halve_weights(model: ir.Model) -> tuple[ir.Model, bool]:
    """Store the graph's large fp32 weights in fp16, lazily; returns `(model, modified)`."""
    chosen = [
        value
        for value in model.graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT
        and tensor_of(value).size >= SMALL
        and not str(value.name).endswith(SCALE)  # of integers: as exact as they were made
    ]
    for value in chosen:
        name = str(value.name)
        half = halved(tensor_of(value), ir.DataType.FLOAT16, name)
        stored = replace_initializer(model.graph, value, half)
        cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = f"{name}.float"
        model.graph.insert_before(model.graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
    return model, bool(chosen)


def to_half(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.float16]:
    """The array in fp16; raises `CheckpointError` where that cannot hold its values."""
    with np.errstate(over="ignore"):  # seen in the next line
        stored = array.astype(np.float16)
    if not np.isfinite(stored).all():
        raise CheckpointError(
            f"The tensor {name} holds values that fp16 cannot.",
            "Its training diverged: use an earlier checkpoint, or export with --fp32.",
        )
    return stored


Keep = Callable[[ir.Node], bool]
FLOAT = ir.DataType.FLOAT
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
CACHES = ("past_", "present_")
ROUTING = (".router.", ".coefficient.")


def to_half_graph(model: ir.Model, dtype: ir.DataType, keep_fp32: Keep) -> tuple[ir.Model, bool]:
    """Compute in `dtype`, FLOAT16 or BFLOAT16, but for the nodes to keep; `(model, modified)`.

    The graph has no functions and no branches: lower or inline them before. Values that fp16 cannot
    hold raise `CheckpointError` when they are written.
    """
    if dtype not in HALVES or model.functions or any(_has_branches(node) for node in model.graph):
        raise ValueError(f"{dtype} of a graph with functions or branches is not made")
    halver = _Halver(model.graph, dtype, keep_fp32)
    modified = halver.run()
    if modified:
        RemoveUnusedNodesPass()(model)
    return model, modified


def routing(model: ir.Model) -> Keep:
    """Says the nodes that decide who runs: routers, coefficients, what depends on these alone."""
    found: set[ir.Node] = set()
    decided: set[ir.Value] = set()
    for node in model.graph:
        varying = [value for value in node.inputs if value is not None and not _is_constant(value)]
        reads = any(part in str(value.name) for value in node.inputs for part in ROUTING if value)
        if reads or (varying and all(value in decided for value in varying)):
            found.add(node)
            decided.update(node.outputs)
    return found.__contains__


def root_mean_squares(model: ir.Model) -> Keep:
    """Says the nodes between an RMSNorm's input and its root: squares are beyond fp16."""
    found: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type == "ReduceMean":
            made, (added,) = there(node.inputs[0]).producer(), node.outputs[0].consumers()
            (root,) = added.outputs[0].consumers()
            found |= {there(made), node, added, root}
    return found.__contains__


class _Halver:
    """`floats` are the values that were fp32, `halves` those of them that are half by now."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, keep_fp32: Keep) -> None:
        self.graph, self.dtype = graph, dtype
        self.kept = {node for node in graph if keep_fp32(node)}
        self.floats: set[ir.Value] = set()
        self.halves: set[ir.Value] = set()
        self.casts: dict[ir.Value, ir.Value] = {}

    def run(self) -> bool:
        """Convert the graph; False where nothing in it was fp32."""
        nodes = list(self.graph)
        self._find_floats(nodes)
        if not self.floats:
            return False
        self._halve_sources()
        for node in nodes:
            self._convert(node)
        for index, value in enumerate(self.graph.outputs):
            if value in self.floats:
                self._convert_output(index, value)
        return True

    def _find_floats(self, nodes: list[ir.Node]) -> None:
        sources = [*self.graph.inputs, *self.graph.initializers.values()]
        self.floats |= {value for value in sources if value.dtype == FLOAT}
        for node in nodes:
            types = [self._yields_float(node, index) for index in range(len(node.outputs))]
            self.floats |= {value for value, yes in zip(node.outputs, types, strict=True) if yes}
            if any(self._refuses(node, index) for index in range(len(node.inputs))):
                self.kept.add(node)

    def _yields_float(self, node: ir.Node, index: int) -> bool:
        if node.op_type == "Cast":
            return node.attributes["to"].as_int() == FLOAT
        if node.op_type in ("Constant", "ConstantOfShape"):
            return _filling(node).dtype == FLOAT
        if node.op_type == "DequantizeLinear":
            return node.inputs[1] in self.floats
        if node.domain != "":
            return node.inputs[0] in self.floats
        kind = _formal(self._schema(node).outputs, index).type_str
        return kind == "tensor(float)" or any(
            value in self.floats
            for place, value in enumerate(node.inputs)
            if _formal(self._schema(node).inputs, place).type_str == kind
        )

    def _refuses(self, node: ir.Node, index: int) -> bool:
        """Whether the op takes this input in fp32 but not in half, and its output with it."""
        if node.domain != "" or node.inputs[index] not in self.floats:
            return False
        kind = _formal(self._schema(node).inputs, index).type_str
        half = f"tensor({self.dtype.name.lower()})"
        return any(
            constraint.type_param_str == kind and half not in constraint.allowed_type_strs
            for constraint in self._schema(node).type_constraints
        )

    def _wanted(self, node: ir.Node, index: int) -> ir.DataType:
        """The type in which the node, once converted, reads an input that was fp32."""
        if node in self.kept:
            return FLOAT
        if node.domain == "":
            kind = _formal(self._schema(node).inputs, index).type_str
            return FLOAT if kind == "tensor(float)" else self.dtype
        return self.dtype

    def _schema(self, node: ir.Node) -> defs.OpSchema:
        return defs.get_schema(node.op_type, self.graph.opset_imports[""], "")

    def _halve_sources(self) -> None:
        """Caches, and the weights and constants that nobody wants in fp32."""
        for value in self.graph.inputs:
            if value in self.floats and str(value.name).startswith(CACHES):
                self._turn_half(value)
        outputs = set(self.graph.outputs)
        for value in list(self.graph.initializers.values()):
            if value in self.floats and value not in outputs and self._all_want_half(value):
                self._halve_initializer(value)
        for node in self.graph:
            value = node.outputs[0]
            if node.op_type == "Constant" and value in self.floats:
                if self._all_want_half(value) and value not in outputs:
                    self._halve_attribute(node)
                    self._turn_half(value)
                self.kept.add(node)

    def _all_want_half(self, value: ir.Value) -> bool:
        return all(self._wanted(use.node, use.idx) == self.dtype for use in value.uses())

    def _halve_initializer(self, value: ir.Value) -> None:
        half = halved(tensor_of(value), self.dtype, str(value.name))
        stored = replace_initializer(self.graph, value, half)
        value.replace_all_uses_with(stored)
        self.floats.add(stored)
        self.halves.add(stored)

    def _halve_attribute(self, node: ir.Node) -> None:
        tensor = halved(_filling(node), self.dtype)
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)

    def _convert(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value in self.floats:
                node.replace_input_with(index, self._as(there(value), self._wanted(node, index)))
        if node in self.kept or not any(value in self.floats for value in node.outputs):
            return
        if node.op_type == "Cast":
            self._convert_cast(node)
            return
        if node.op_type == "ConstantOfShape":
            self._halve_attribute(node)
        for value in node.outputs:
            if value in self.floats:
                self._turn_half(value)

    def _convert_cast(self, node: ir.Node) -> None:
        source, result = there(node.inputs[0]), node.outputs[0]
        if source.dtype == self.dtype:  # stored in half already, as scales of groups are
            result.replace_all_uses_with(source)
            self.floats.add(source)
            self.halves.add(source)
            return
        node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))
        self._turn_half(result)

    def _convert_output(self, index: int, value: ir.Value) -> None:
        name = str(value.name)
        wanted = self.dtype if name.startswith(CACHES) else FLOAT
        converted = self._as(value, wanted)
        if converted is not value:
            value.name, converted.name = f"{name}.computed", name
            converted.shape = value.shape
            self.graph.outputs[index] = converted

    def _turn_half(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self.dtype)  # a new one: values may share theirs
        self.halves.add(value)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in `dtype`: itself, or behind a `Cast` that all its users share."""
        if (value in self.halves) == (dtype == self.dtype):
            return value
        if value not in self.casts:
            cast = ir.node("Cast", [value], {"to": int(dtype)})
            result = cast.outputs[0]
            result.name, result.dtype = f"{value.name}.{dtype.name.lower()}", dtype
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], cast)
            else:
                self.graph.insert_after(producer, cast)
            self.casts[value] = result
        return self.casts[value]


def _filling(node: ir.Node) -> ir.TensorProtocol:
    """The value of a `Constant` or `ConstantOfShape`, in whichever attribute it is."""
    if node.op_type == "Constant":
        return there(ir.convenience.get_const_tensor(node.outputs[0]))
    given = node.attributes.get("value")
    return ir.tensor([0.0], FLOAT) if given is None else given.as_tensor()


def halved(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str | None = None) -> ir.LazyTensor:
    """A tensor in FLOAT16 or BFLOAT16, made when it is written; raises as `to_half` does."""
    name = name or tensor.name

    def half() -> ir.TensorProtocol:
        if dtype == ir.DataType.FLOAT16:
            return ir.tensor(to_half(tensor.numpy(), str(name)), name=name)
        return ir.tensor(tensor.numpy().astype(ml_dtypes.bfloat16), dtype, name=name)

    return ir.LazyTensor(half, dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _formal(
    parameters: Sequence[defs.OpSchema.FormalParameter], index: int
) -> defs.OpSchema.FormalParameter:
    """The schema's parameter of an input or output; the last one may stand for many."""
    return parameters[min(index, len(parameters) - 1)]


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() or (node is not None and node.op_type == "Constant")


def _has_branches(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    )
