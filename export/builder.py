"""How graphs are made with onnx-ir and saved: their nodes, and weights in a file beside them.

Weights are streamed into one `.data` file, each expert's bytes together. Every expert and meta
expert begins on a page, after all other weights, so that it can be mapped, read ahead and dropped
by itself.

Experts that a graph takes from slots: its inputs for them, and their own file.

A graph whose experts are paged in device memory has one input per kind of weight, `slots.<kind>`
`[slots, ...]`, shared by all layers, and the input `table` `[M, E]` int32: each expert's slot, -1
where it is absent. How many slots there are is known only when a model is loaded: engines and
graphs are for any number. The outputs `chosen.<m>` `[1, S, K]` tell which experts a step chose; one
that was absent is fetched, and the step run again (`runtimes/slots/slots.py`).

The experts lie in `experts.data`, each a contiguous extent that begins on a page: its kinds one
after the other in the order of the manifest's `paging.slots`, in the layout of the slots.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from medmoe_edge._types import Counting, no_counting, there
from medmoe_edge.bundle.recorded import INLINE_BYTES
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import CheckpointError

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


def replace_node(node: ir.Node, build: Builder, *made: ir.Value) -> None:
    """Put what was built, whose results are `made`, in the place of a node."""
    graph, pairs = there(node.graph), list(zip(node.outputs, made, strict=True))
    for old, new in pairs:
        new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(node, build.nodes)
    for old, new in pairs:
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def fix_names(model: ir.Model) -> None:
    """Give every value a name of its own: branches and the graph around them share one name space.

    `NameFixPass` forgets the names in a branch before it comes to what follows in the graph. Of
    that, ONNX Runtime minds what does not wait for the branch, which it may put before it.
    """
    NameFixPass()(model)
    nodes = list(model.graph)
    for place, node in enumerate(nodes):
        if not (branches := _branches(node)):
            continue
        around, waiting = set[str | None](), set(node.outputs)
        for later in nodes[place + 1 :]:
            inside = (inner for branch in _branches(later) for inner in branch)
            if any(read in waiting for each in (later, *inside) for read in each.inputs):
                waiting.update(later.outputs)
            else:
                around.update(value.name for value in later.outputs)
        for branch in branches:
            for value in (value for inner in branch for value in inner.outputs):
                if value.name in around:
                    value.name = f"{branch.name}.{value.name}"


def _branches(node: ir.Node) -> list[ir.Graph]:
    return [
        attribute.as_graph()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
    ]


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


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of a tensor's name, which several nodes may share."""
    if (found := graph.initializers.get(str(tensor.name))) is None:
        graph.register_initializer(found := initializer(tensor))
    return found


def replace_initializer(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor under the name of an initializer, which it stands in for from now on."""
    del graph.initializers[str(value.name)]
    return register(graph, tensor)


def floats(name: str, *shape: int | str) -> ir.Value:
    """A named float value of known shape, for inputs and outputs."""
    return ir.val(name, ir.DataType.FLOAT, shape)


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor behind an initializer."""
    return there(there(value).const_value)


PAGE = 4096
OWNER = re.compile(r"(.*\.ffn\.(?:experts\.\d+|meta))\.")


Extents = dict[str, list[int]]  # owner -> [offset, bytes]


def save_model(
    model: ir.Model,
    folder: Path,
    name: str,
    *,
    progress: Counting = no_counting,
) -> Extents:
    """Write `name.onnx` and `name.data` into `folder`, one tensor in memory at a time.

    `progress` is called with the bytes done and the bytes in all. Returns where each expert lies in
    the data file. Raises `CheckpointError`.
    """
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    large = [value for value in values if tensor_of(value).nbytes >= INLINE_BYTES]
    total = sum(tensor_of(value).nbytes for value in large)
    extents: Extents = {}
    previous = ""
    done = 0
    with (folder / f"{name}.data").open("wb") as file:
        for value in sorted(large, key=_group):  # stable: order within a group is kept
            group = _group(value)
            if group != previous:
                file.write(bytes(-file.tell() % PAGE))
                previous = group
            offset = file.tell()
            tensor = tensor_of(value)
            length = file.write(_bytes(tensor))
            done += length
            progress(done, total)
            value.const_value = ir.ExternalTensor(
                f"{name}.data",
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=folder,
            )
            if group:
                start = extents.setdefault(group, [offset, 0])[0]
                extents[group][1] = offset + length - start
    for value in values:
        if value not in large:  # read now: inside `ir.save` an error would lose its type
            value.const_value = ir.tensor(tensor_of(value).numpy(), name=value.name)
    ir.save(model, folder / f"{name}.onnx")
    return extents


def _group(value: ir.Value) -> str:
    """The expert that owns a weight; the empty string, which sorts first, for all others."""
    match = OWNER.match(value.name or "")
    return match[1] if match else ""


def _bytes(tensor: ir.TensorProtocol) -> bytes:
    data = tensor.tobytes()
    if len(data) != tensor.nbytes:
        raise CheckpointError(
            f"The tensor {tensor.name} changed its size while it was read.",
            "Do not change the checkpoint during an export.",
        )
    return data


FILE = "experts.data"
SLOTS = "slots."


Stacks = Mapping[str, ir.TensorProtocol]

"""A layer's weights by the name of the input that takes their place, `[E, ...]`."""


class Pools:
    """The inputs of a graph of so many layers that its experts' weights come from."""

    def __init__(self, layers: int, experts: int) -> None:
        self.table = ir.val("table", ir.DataType.INT32, (layers, experts))
        self.inputs: dict[str, ir.Value] = {}

    def input_for(self, kind: str, stack: ir.TensorProtocol) -> ir.Value:
        """`slots.<kind>` for a stack `[E, ...]`.

        Raises `CheckpointError` where experts differ in shape or format, as those of a mixed export
        may.
        """
        name, shape = f"{SLOTS}{kind}", ir.Shape(["slots", *stack.shape.numpy()[1:]])
        pool = self.inputs.setdefault(name, ir.val(name, stack.dtype, shape))
        if (pool.dtype, pool.shape) != (stack.dtype, shape):
            raise unlike(str(stack.name))
        return pool

    def declare(self, graph: ir.Graph) -> None:
        """Make them and the table inputs of the graph."""
        graph.inputs.extend([self.table, *self.inputs.values()])


def declare_chosen(graph: ir.Graph, chosen: ir.Value, layer: int) -> None:
    """Make the experts `[1, S, K]` of the n-th layer that has some an output."""
    chosen.name, chosen.dtype = f"chosen.{layer}", ir.DataType.INT64
    graph.outputs.append(chosen)


def reads_slots(node: ir.Node) -> bool:
    """Whether a node reads experts' weights: it takes them as they are stored."""
    return any(str(value.name).startswith(SLOTS) for value in node.inputs if value is not None)


def unlike(name: str) -> CheckpointError:
    """What is wrong with a weight that does not fit the slots of others."""
    return CheckpointError(
        f"{name} is stored otherwise than those before it.",
        "Export in one precision to page experts in a GPU's memory.",
    )


def write_experts(folder: Path, config: ModelConfig, layers: Sequence[Stacks]) -> dict[str, Any]:
    """Write `experts.data`; returns the manifest's `experts` and `paging`.

    One layer's experts are in memory at a time.
    """
    extents: Extents = {}
    hashes = {}
    with (folder / FILE).open("wb") as file:
        for owner, content in _experts(config, layers):
            file.write(bytes(-file.tell() % PAGE))
            extents[owner] = [file.tell(), len(content)]
            hashes[owner] = {"sha256": hashlib.sha256(content).hexdigest()}
            file.write(content)
    slots = {
        name: {
            "dtype": stack.dtype.numpy().name,
            "shape": list(stack.shape.numpy()[1:]),
            "bytes": stack.nbytes // stack.shape.numpy()[0],
        }
        for name, stack in layers[0].items()
    }
    return {"experts": extents, "paging": {"file": FILE, "slots": slots, "experts": hashes}}


def _experts(config: ModelConfig, layers: Sequence[Stacks]) -> Iterator[tuple[str, bytes]]:
    for layer, stacks in zip(config.moe_layers, layers, strict=True):
        arrays = [stack.numpy() for stack in stacks.values()]
        for number in range(there(config.moe).num_experts):
            owner = f"decoder.layers.{layer}.ffn.experts.{number}"
            yield owner, b"".join(array[number].tobytes() for array in arrays)
