"""Pass: `medmoe::MoE` for an engine whose experts are in slots, in standard ops.

Constants that an engine was built with never leave its memory. So the experts' weights become
inputs, bound to slots (`expert_slots.py`), and what a step needs of them is gathered: of the E
experts the n = min(E, S K) that some of its S tokens weigh most. n follows from shapes alone, so a
decode step of one token reads its K experts and is still one CUDA graph; a long prefill reads all.
A copy of what was gathered is what this costs, n experts' matrices one at a time: where all experts
fit into the GPU, an engine that holds them is the better one.

TensorRT takes integers of 8 bits as inputs and none of 4. Those are two in a byte: 16 high + low,
where the low one, from zero up, is of the first half of the rows and the high one of the second.
Tried with TensorRT for RTX 1.7.1, which builds it; there was no GPU to execute it on. On ONNX
Runtime's CPU provider it gives the same bits however few slots there are, and those of the graph
with constants but for the rounding of products of other shapes.

An expert that is absent has no part in the sum, whatever lies in the slot that is read in its
place: not even a number that is none.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from medmoe_edge.export.builder import Builder, tensor_of
from medmoe_edge.export.expert_slots import Pools, Stacks, declare_chosen, unlike
from medmoe_edge.export.moe_op import (
    EXPERT_WEIGHTS,
    MoESpec,
    Weights,
    add_meta,
    feed_forward,
    replace_moe,
    route,
)
from medmoe_edge.export.passes.half_graph import halved
from medmoe_edge.export.stored_matrix import StoredMatrix, lazy_tensor

BYTE = 8  # bits
PAIR = 16  # what the high one of two integers in a byte counts


def lower_moe_to_slots(model: ir.Model, spec: MoESpec, half: ir.DataType) -> list[Stacks]:
    """Do so to every layer; returns what the layers' experts were, to be stored by themselves.

    `half`, FLOAT16 or BFLOAT16, is what weights and biases that are no integers are stored in. The
    passes that follow must leave those nodes as they are that read a slot (`reads_slots`). Raises
    `CheckpointError` where experts differ in shape or format.
    """
    count = sum(node.op_type == "MoE" for node in model.graph)
    pools = Pools(count, spec.num_experts)
    layers: list[Stacks] = []

    def lower(build: Builder, x: ir.Value, weights: Weights) -> ir.Value:
        layer = _Layer(build, x, weights, spec, half, pools)
        chosen, y = layer.lowered(len(layers))
        declare_chosen(model.graph, chosen, len(layers))
        layers.append(layer.stacks)
        return y

    replace_moe(model, spec, lower)
    pools.declare(model.graph)
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
    return layers


class _Layer:
    """One node on its way; of its E experts n are gathered."""

    def __init__(
        self,
        build: Builder,
        x: ir.Value,
        weights: Weights,
        spec: MoESpec,
        half: ir.DataType,
        pools: Pools,
    ) -> None:
        self.build, self.x, self.weights, self.spec = build, x, weights, spec
        self.half, self.pools = half, pools
        self.stacks: dict[str, ir.TensorProtocol] = {}

    def lowered(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """The chosen experts `[1, S, K]`, and the op's result, of the shape of x."""
        build, spec = self.build, self.spec
        gates, chosen, probabilities = route(build, self.x, self.weights, spec.top_k)
        nothing = build.op("ConstantOfShape", build.op("Shape", probabilities))
        spread = build.op("ScatterElements", nothing, chosen, gates, axis=-1)  # [1, S, E]
        read = self._most_weighed(spread)  # [n]
        row = build.op("Gather", self.pools.table, build.constant(layer), axis=0)  # [E]
        slots = build.op("Gather", row, read, axis=0)
        share = build.op("Gather", spread, read, axis=2)  # [1, S, n]
        share = build.op("Transpose", share, perm=[2, 1, 0])  # [n, S, 1]
        there = build.op("GreaterOrEqual", slots, build.constant(0, np.int32))
        there = build.op("Unsqueeze", there, build.constant([1, 2]))
        counts = build.op("And", there, build.op("Greater", share, self._zero()))
        at = build.op("Max", slots, build.constant(0, np.int32))
        experts = {name: self._gathered(name, at) for name in EXPERT_WEIGHTS[spec.activation]}
        parts = feed_forward(build, self.x, experts, "", spec.activation)  # [n, S, D]
        parts = build.op("Where", counts, build.op("Mul", parts, share), self._zero())
        routed = build.op("ReduceSum", parts, build.constant([0]), keepdims=1)
        return chosen, add_meta(build, self.x, routed, self.weights, spec)

    def _most_weighed(self, spread: ir.Value) -> ir.Value:
        """Among them are all experts that were chosen: no more than K for each token."""
        build = self.build
        weight = build.op("ReduceMax", spread, build.constant([0, 1]), keepdims=0)  # [E]
        tokens = build.op("Shape", self.x, start=1, end=2)
        chosen = build.op("Mul", tokens, build.constant([self.spec.top_k]))
        count = build.op("Min", chosen, build.constant([self.spec.num_experts]))
        return build.ops("TopK", weight, count, outputs=2, axis=-1)[1]

    def _gathered(self, name: str, at: ir.Value) -> ir.Value:
        """A weight of the experts in some slots: matrices `[n, K, N]` or biases `[n, 1, N]`."""
        owners = [f"experts.{index}." for index in range(self.spec.num_experts)]
        values = [self.weights[owner + name] for owner in owners]
        matrices = [StoredMatrix.behind(value) for value in values]
        first = matrices[0]
        if len({(each and each.bits, each and each.group) for each in matrices}) > 1:
            raise unlike(str(values[-1].name))
        if first is None:
            return self._floats(name, [tensor_of(value) for value in values], at)
        stored = [matrix for matrix in matrices if matrix is not None]
        read = packed if first.bits < BYTE else whole
        integers = self._from_slots(name, [read(matrix) for matrix in stored], at)
        kind = name.replace(".weight", ".scale")
        scale = self._from_slots(kind, [scales(matrix) for matrix in stored], at)
        return self.build.op(
            "DequantizeLinear",
            self._unpacked(integers) if first.bits < BYTE else integers,
            self.build.op("Cast", scale, to=int(ir.DataType.FLOAT)),
            axis=1,
            block_size=first.group or first.width,
        )

    def _floats(self, name: str, tensors: Sequence[ir.TensorProtocol], at: ir.Value) -> ir.Value:
        value = self._from_slots(name, [halved(tensor, self.half) for tensor in tensors], at)
        value = self.build.op("Cast", value, to=int(ir.DataType.FLOAT))
        if name.endswith(".bias"):
            value = self.build.op("Unsqueeze", value, self.build.constant([1]))
        return value

    def _from_slots(
        self, kind: str, experts: Sequence[ir.TensorProtocol], at: ir.Value
    ) -> ir.Value:
        """Make an input of what is stored of each expert, and gather from it."""
        first = experts[0]
        stack = lazy_tensor(
            str(first.name),
            lambda: np.stack([tensor.numpy() for tensor in experts]),
            first.dtype,
            [len(experts), *first.shape.numpy()],
        )
        pool = self.pools.input_for(kind, stack)
        self.stacks[str(pool.name)] = stack
        value = self.build.op("Gather", pool, at, axis=0)
        value.dtype = first.dtype
        return value

    def _unpacked(self, pairs: ir.Value) -> ir.Value:
        """Bytes `[n, K / 2, N]` to integers of 4 bits `[n, K, N]`, exact in half too."""
        build = self.build
        sixteen, middle = (build.constant(v, np.float32) for v in (PAIR, PAIR // 2))
        value = build.op("Cast", pairs, to=int(ir.DataType.FLOAT))
        high = build.op("Floor", build.op("Div", value, sixteen))
        low = build.op("Sub", build.op("Sub", value, build.op("Mul", high, sixteen)), middle)
        both = build.op("Concat", low, high, axis=1)
        return build.op("Cast", both, to=int(ir.DataType.INT8))

    def _zero(self) -> ir.Value:
        return self.build.constant(0, np.float32)


def whole(matrix: StoredMatrix) -> ir.TensorProtocol:
    """Integers `[K, N]` of 8 bits."""
    return matrix.integers


def packed(matrix: StoredMatrix) -> ir.TensorProtocol:
    """Integers of 4 bits or 2 as bytes `[K / 2, N]`."""

    def pairs() -> npt.NDArray[np.int8]:
        low, high = np.split(matrix.integers.numpy().astype(np.int8), 2)
        return (PAIR * high + low + PAIR // 2).astype(np.int8)

    shape = [matrix.width // 2, matrix.channels]
    return lazy_tensor(str(matrix.integers.name), pairs, ir.DataType.INT8, shape)


def scales(matrix: StoredMatrix) -> ir.TensorProtocol:
    """Scales `[K / group, N]` as they are stored, `[1, N]` where there is one per channel."""
    groups = matrix.width // matrix.group if matrix.group else 1
    return lazy_tensor(
        str(matrix.scale.name),
        lambda: matrix.scale.numpy().reshape(groups, -1),
        matrix.scale.dtype,
        [groups, matrix.channels],
    )
