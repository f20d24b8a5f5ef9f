"""Pass: `medmoe::MoE` for ONNX Runtime on CUDA, `com.microsoft::QMoE`, or `MoE` for float weights.

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
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge.errors import CheckpointError
from medmoe_edge.export.builder import CONTRIB, Builder, tensor_of
from medmoe_edge.export.moe_op import MoESpec, Weights, add_meta, replace_moe, route
from medmoe_edge.export.passes.ort_cuda_matmul import LEAST_BITS, as_float, register
from medmoe_edge.export.stored_matrix import Array, StoredMatrix, lazy_tensor

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
    gates, chosen, probabilities = route(build, x, weights, spec.top_k)
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
