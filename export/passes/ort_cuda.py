"""Pass: `DequantizeLinear -> MatMul` as ONNX Runtime runs it on CUDA, `MatMulNBits`.

Groups stay as they are. A scale per output channel becomes blocks that repeat it: the same numbers,
and the kernel reads 8 bits a weight, where `DequantizeLinear` before a `MatMul` would write the
weights in fp16 and read them again at every token. 2-bit integers are stored in 4: CUDA's fast
kernels (`fpA_intB`: blocks of 32, 64 or 128) know 4 and 8.
No `accuracy_level` is set: activations keep their type. CUDA knows no other way; the CPU provider,
which runs this graph too, is exact so, and slow with 8 bits.

Known from ONNX Runtime's source and its CPU provider; docs/verification.md tells what ran on CUDA.

Pass: `medmoe::MoE` for ONNX Runtime on CUDA, `com.microsoft::QMoE`, or `MoE` for float weights.

The routed experts become one op; routing, meta expert and residual mix stay outside.

Routing. Given router logits, the CPU provider softmaxes over the chosen experts and the CUDA one
over all, normalised or not; both would choose in the precision of their input. So the choice and
the gates g are made outside, in fp32, and the op is fed log(g), with a floor for who was not
chosen: any softmax over that gives the gates back, sum 1. For k = 1, where Med-MoE weighs with p1
itself, that gives 1, and p1 is multiplied with the output.

Weights are the stored integers and scales, stacked: `[E, N, K bits / 8]` and `[E, N]` per channel
or `[E, N, K / block]`. SwiGLU's gate and up are one matrix whose rows alternate
(`swiglu_fusion` 1: the only form both providers have). GELU is the tanh form on both.
One node has one format: where experts differ, as in a mixed export, all are stored in the widest
bits and smallest groups among them. The numbers are the same, the savings of the narrower lost.
2 bits are stored in 4.
`weights_prepacked` 0 declares the schema's own layout, which CUDA's kernel repacks for its tensor
cores when the session starts; its default would be a layout made offline.

From ONNX Runtime 1.31's schema and source: `QMoE` on CUDA wants fp16 or bf16 (`to_half_graph`
makes it so), channels in multiples of 64, groups in multiples of 32; no earlier release was looked
at. The CPU provider takes fp32 and fp16, exact but for 8 bits in groups, where it rounds
activations to 8 bits.

Pass: the experts of a graph for ONNX Runtime on CUDA, taken from slots instead of initializers.

What `lower_moe_cuda` made of each layer, one op over that layer's E stacked experts, becomes the
same op over the slots, in which experts of any layer may lie: it never looks into a slot that it
has no gate for, and nothing is gathered or copied. One graph input per kind of weight holds that
kind of every slot, `slots.<kind>` `[slots, ...]`, and is shared by all layers. The input `table`
`[M, E]` int32 names each expert's slot, -1 where it is absent: the gates that the graph computed
for experts are put to their slots, those of absent ones dropped, and the step must be run again
(`runtimes/slots/slots.py`). The outputs `chosen.<m>` `[B, S, K]` tell which experts it chose.

Executed on ONNX Runtime's CPU provider: the same bits whoever else is absent, and those of the
resident graph but for rounding with int4, where that packs its constants, and with two experts a
token in fp16, whose gates are a softmax over another number of columns.

On CUDA only `MoE`, of fp16 weights, can be had so far (`targets.plan_target`). The kernel of `QMoE`
repacks its weights when the session starts, which it can do with constants only; slots need what
that makes, `weights_prepacked` 1, made ahead of time. ONNX Runtime 1.31 makes it ahead of time in
its builds for CUDA alone (`pack_weights_for_cuda_mixed_gemm`); written anew and not tried on a GPU,
it would be garbage that nobody notices (github.com/microsoft/onnxruntime/issues/28748).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Self, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge._types import there
from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import (
    CONTRIB,
    Builder,
    Pools,
    Stacks,
    declare_chosen,
    register,
    replace_node,
    tensor_of,
)
from medmoe_edge.export.decoder import MoESpec, Weights, add_meta, replace_moe, route
from medmoe_edge.export.quantise import Array, StoredMatrix, lazy_tensor

BLOCKS = (128, 64, 32, 16)
LEAST_BITS = 4


def lower_matmul_cuda(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every pair whose width divides into blocks; returns `(model, modified)`."""
    pairs = [
        (node, matrix, block)
        for node in model.graph
        if node.op_type == "MatMul"
        and (matrix := StoredMatrix.behind(node.inputs[1])) is not None
        and (block := matrix.group or _block(matrix.width)) is not None
    ]
    for node, matrix, block in pairs:
        build = Builder()
        replace_node(node, build, _product(build, model.graph, node.inputs[0], matrix, block))
        model.graph.opset_imports[CONTRIB] = 1
    if pairs:
        RemoveUnusedNodesPass()(model)
    return model, bool(pairs)


def _block(width: int) -> int | None:
    return next((block for block in BLOCKS if width % block == 0), None)


def _product(
    build: Builder, graph: ir.Graph, x: ir.Value | None, matrix: StoredMatrix, block: int
) -> ir.Value:
    bits = max(matrix.bits, LEAST_BITS)
    tensors = matrix.in_blocks(block, bits, "blocks.scale")
    weight, scale = (register(graph, tensor) for tensor in tensors)
    return build.op(
        "MatMulNBits",
        *(x, weight, as_float(build, scale)),
        domain=CONTRIB,
        K=matrix.width,
        N=matrix.channels,
        bits=bits,
        block_size=block,
    )


def as_float(build: Builder, scale: ir.Value) -> ir.Value:
    """Scales in fp32, as the op wants them beside fp32 activations."""
    if scale.dtype == ir.DataType.FLOAT:
        return scale
    return build.op("Cast", scale, to=int(ir.DataType.FLOAT))


T = TypeVar("T")
FLOOR = 1e-30  # the gate of an expert that was not chosen, where its logarithm is wanted
TILE = 64  # channels of QMoE's interleaved weights on CUDA
MATRICES = {  # of the op, and what each of them holds
    "swiglu": (("gate", "up"), ("down",)),
    "gelu_tanh": (("fc1",), ("fc2",)),
}
ACTIVATION: dict[str, dict[str, int | float | str]] = {
    "swiglu": {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    },
    "gelu_tanh": {"activation_type": "gelu"},
}


def lower_moe_cuda(model: ir.Model, spec: MoESpec) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::MoE` node and drop the function; returns `(model, modified)`.

    Raises `CheckpointError` for quantised experts whose sizes CUDA's kernel cannot take.
    """
    graph = model.graph
    modified = replace_moe(
        model, spec, lambda build, x, weights: _layer(build, graph, x, weights, spec)
    )
    if modified:
        graph.opset_imports[CONTRIB] = 1
        RemoveUnusedNodesPass()(model)
    return model, modified


def _layer(
    build: Builder, graph: ir.Graph, x: ir.Value, weights: Weights, spec: MoESpec
) -> ir.Value:
    gates, chosen, probabilities = route(build, x, weights, spec)
    nothing = build.op("ConstantOfShape", build.op("Shape", probabilities))
    spread = build.op("ScatterElements", nothing, chosen, gates, axis=-1)  # [B, S, E]
    floor = build.constant(FLOOR, np.float32)
    logits = build.op("Log", build.op("Max", spread, floor))
    logits = build.op("Reshape", logits, build.constant([-1, spec.num_experts]))  # [T, E]
    routed = _experts(build, graph, x, logits, weights, spec)
    if spec.top_k == 1:
        routed = build.op("Mul", routed, gates)
    return add_meta(build, x, routed, weights, spec)


def _experts(
    build: Builder, graph: ir.Graph, x: ir.Value, logits: ir.Value, weights: Weights, spec: MoESpec
) -> ir.Value:
    """The experts' sum, weighted with the softmax of `logits` over the chosen."""
    stacks = [_Stack.of(weights, spec, parts) for parts in MATRICES[spec.activation]]
    attributes = ACTIVATION[spec.activation] | {"k": spec.top_k, "normalize_routing_weights": 1}
    if not all(stack.quantised for stack in stacks):
        inputs = [value for stack in stacks for value in (stack.floats(graph), stack.bias(graph))]
        return build.op("MoE", x, logits, *inputs, domain=CONTRIB, **attributes)
    matrices = [matrix for stack in stacks for row in stack.quantised for matrix in row]
    _check_sizes(matrices)
    bits = max(LEAST_BITS, *(matrix.bits for matrix in matrices))
    group = min((matrix.group for matrix in matrices if matrix.group), default=None)
    inputs = [
        value
        for stack in stacks
        for value in (*stack.stored(build, graph, bits, group), stack.bias(graph))
    ]
    attributes |= {"expert_weight_bits": bits, "weights_prepacked": 0}
    if group is not None:
        attributes["block_size"] = group
    return build.op("QMoE", x, logits, *inputs, domain=CONTRIB, **attributes)


def _check_sizes(matrices: Sequence[StoredMatrix]) -> None:
    for matrix in matrices:
        if matrix.width % TILE:
            raise CheckpointError(
                f"{matrix.integers.name} reads {matrix.width} channels, which ONNX Runtime's "
                f"quantised experts on CUDA cannot: they need multiples of {TILE}.",
                "Export it in fp32, or for ONNX Runtime's CPU.",
            )


@dataclass(frozen=True)
class _Stack:
    """One of the op's two matrices, of all experts: `weights[e]` are the parts of expert e's.

    The rows of the parts alternate. `quantised` is what is stored of them, empty for floats.
    """

    name: str
    weights: list[list[ir.Value]]
    biases: list[ir.Value]
    quantised: list[list[StoredMatrix]]

    @classmethod
    def of(cls, weights: Weights, spec: MoESpec, parts: Sequence[str]) -> Self:
        owners = [f"experts.{index}." for index in range(spec.num_experts)]
        values = [[weights[f"{owner}{part}.weight"] for part in parts] for owner in owners]
        biases = [f"{owner}{parts[0]}.bias" for owner in owners]
        stored = [[StoredMatrix.behind(value) for value in row] for row in values]
        whole = [[matrix for matrix in row if matrix is not None] for row in stored]
        layer = str(values[0][0].name).partition("experts.0.")[0]
        return cls(
            f"{layer}experts.{'_'.join(parts)}",
            values,
            [weights[name] for name in biases if name in weights],
            whole if all(map(all, stored)) else [],
        )

    def stored(
        self, build: Builder, graph: ir.Graph, bits: int, group: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """Packed weights `[E, N, K bits / 8]` and scales `[E, N]` or `[E, N, K / group]`."""
        rows, matrix = self.quantised, self.quantised[0][0]
        shape = [len(rows), len(rows[0]) * matrix.channels]
        halves = all(m.scale.dtype == ir.DataType.FLOAT16 for row in rows for m in row)
        kind = ir.DataType.FLOAT16 if halves else ir.DataType.FLOAT
        weight = lazy_tensor(
            f"{self.name}.weight.packed",
            lambda: _stacked(rows, lambda m: m.packed(bits)),
            ir.DataType.UINT8,
            [*shape, matrix.width * bits // 8],
        )
        scale = lazy_tensor(
            f"{self.name}.weight.scale",
            lambda: _stacked(rows, lambda m: m.scales(group)).astype(kind.numpy(), copy=False),
            kind,
            [*shape, *([] if group is None else [matrix.width // group])],
        )
        return register(graph, weight), as_float(build, register(graph, scale))

    def floats(self, graph: ir.Graph) -> ir.Value:
        """Weights `[E, N, K]` as they are."""
        rows = [[tensor_of(value) for value in row] for row in self.weights]
        width, channels = rows[0][0].shape.numpy()
        return register(
            graph,
            lazy_tensor(
                f"{self.name}.weight",
                lambda: _stacked(rows, lambda tensor: tensor.numpy().T),
                ir.DataType.FLOAT,
                [len(rows), len(rows[0]) * int(channels), int(width)],
            ),
        )

    def bias(self, graph: ir.Graph) -> ir.Value | None:
        """Biases `[E, N]`, where there are any: never with SwiGLU, so nothing alternates."""
        if not self.biases:
            return None
        tensors = [tensor_of(value) for value in self.biases]
        return register(
            graph,
            lazy_tensor(
                f"{self.name}.bias",
                lambda: np.stack([tensor.numpy() for tensor in tensors]),
                ir.DataType.FLOAT,
                [len(tensors), int(tensors[0].shape.numpy()[0])],
            ),
        )


def _stacked(rows: Sequence[Sequence[T]], read: Callable[[T], Array]) -> Array:
    """`[N, ...]` of every part of every expert as `[E, parts N, ...]`, the parts alternating."""
    experts = []
    for row in rows:
        parts = np.stack([read(part) for part in row], axis=1)  # [N, parts, ...]
        experts.append(parts.reshape(-1, *parts.shape[2:]))
    return np.stack(experts)


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
    build, logits = Builder(), there(node.inputs[1])
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
    return there(there(node).inputs[1])
