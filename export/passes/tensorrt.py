"""Pass: `medmoe::MoE` for TensorRT proper, as routing in standard ops and two plugin nodes.

`medmoe_edge/kernels` says what the two ops take and give. Routing, gates and the last sum are fp32;
only the plugin's activations are fp16 or bf16, cast at its border. The integers and scales
are those that the weights were stored in, the ones of 4 bits packed as for `MatMulNBits`. A later
pass to half must keep nodes of the domain `medmoe`: their gates and scales in fp32 stay so.

Pass: `medmoe::MoE` for an engine whose experts are in slots, in standard ops.

Constants that an engine was built with never leave its memory. So the experts' weights become
inputs, bound to slots (`external_data.py`), and what a step needs of them is gathered: of the E
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
place: not even NaN or infinite.

Pass: `medmoe::MoE` of experts as deltas from the meta expert (`ort_cpu.py` derives it), in standard
ops without branches, for every GPU. Each delta runs on every token, weighed with zero where it was
not chosen: the meta expert runs once, and deltas are what is small. The plugin, whose kernels hold
whole experts, has no part in it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from medmoe_edge._types import there
from medmoe_edge.errors import ConfigError
from medmoe_edge.export.builder import (
    MEDMOE,
    Builder,
    Pools,
    Stacks,
    declare_chosen,
    register,
    tensor_of,
    unlike,
)
from medmoe_edge.export.decoder import (
    EXPERT_WEIGHTS,
    MATRICES,
    MoESpec,
    Weights,
    add_meta,
    affine,
    feed_forward,
    replace_moe,
    route,
)
from medmoe_edge.export.half import halved
from medmoe_edge.export.passes.ort_cpu import delta_base, delta_output, delta_part, share_of
from medmoe_edge.export.quantise import StoredMatrix, lazy_tensor
from medmoe_edge.kernels import OPS, PARTS, TILES, Kernel, namespace

PLUGIN = {"plugin_version": "1", "aot": 1}


def lower_moe_to_plugin(
    model: ir.Model, spec: MoESpec, half: ir.DataType = ir.DataType.FLOAT16
) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::MoE` node and drop the function; returns `(model, modified)`.

    `half` is FLOAT16 or BFLOAT16. Raises `ConfigError` where an expert's matrices are not stored in
    a format that the plugin has kernels for.
    """
    modified = replace_moe(
        model,
        spec,
        lambda build, x, weights: _Lowering(model, build, x, weights, spec, half).y(),
    )
    if modified:
        RemoveUnusedNodesPass()(model)
        NameFixPass()(model)
    return model, modified


class _Lowering:
    """One node on its way; T tokens take S slots each, E experts count the meta expert."""

    def __init__(
        self,
        model: ir.Model,
        build: Builder,
        x: ir.Value,
        weights: Weights,
        spec: MoESpec,
        half: ir.DataType,
    ) -> None:
        self.model, self.build, self.x, self.weights = model, build, x, weights
        self.spec, self.half = spec, half
        self.experts = spec.num_experts + spec.meta_expert
        self.slots = spec.top_k + spec.meta_expert

    def y(self) -> ir.Value:
        """The op's result, of the shape of x."""
        build = self.build
        width = build.op("Shape", self.x, start=2)
        x = build.op("Reshape", self.x, build.op("Concat", build.constant([-1]), width, axis=0))
        gates, chosen = self._slots(x)
        order, offsets = self._sorted(build.op("Reshape", chosen, build.constant([-1, 1])))
        tokens = build.op("Div", order, build.constant(self.slots, np.int32))
        hidden = self._plugin("hidden", self._cast(x, self.half), tokens, offsets)
        parts = self._plugin("output", hidden, order, gates, offsets)
        by_token = build.op("Concat", build.constant([-1, self.slots]), width, axis=0)
        parts = build.op("Reshape", self._cast(parts, ir.DataType.FLOAT), by_token)
        total = build.op("ReduceSum", parts, build.constant([1]), keepdims=0)
        return build.op("Reshape", total, build.op("Shape", self.x))

    def _slots(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Gates fp32 and experts int32 of the slots, both `[T, S]`."""
        build = self.build
        gates, chosen, _ = route(build, x, self.weights, self.spec)
        chosen = self._cast(chosen, ir.DataType.INT32)
        if not self.spec.meta_expert:
            return gates, chosen
        shape = build.op("Concat", build.op("Shape", gates, end=1), build.constant([1]), axis=0)
        last = build.op("Expand", build.constant(self.experts - 1, np.int32), shape)  # [T, 1]
        share = build.op("Expand", build.constant(1.0, np.float32), shape)
        if self.spec.use_residual:
            mix = build.op("Softmax", affine(build, x, self.weights, "coefficient."), axis=-1)
            first, second = build.ops("Split", mix, outputs=2, axis=-1, num_outputs=2)
            gates, share = build.op("Mul", gates, first), build.op("Add", share, second)
        return (
            build.op("Concat", gates, share, axis=1),
            build.op("Concat", chosen, last, axis=1),
        )

    def _sorted(self, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
        """`order` and `offsets` of the slots `[T * S, 1]`: a counting sort, which is stable.

        Counts are fp32, exact to 2^24 slots: TensorRT's parser lists no CumSum of integers.
        """
        build = self.build
        each = build.constant(np.arange(self.experts), np.int32)
        mine = self._cast(build.op("Equal", chosen, each), ir.DataType.FLOAT)  # [T * S, E]
        down, across = build.constant(0), build.constant(0)
        counts = build.op("ReduceSum", mine, build.constant([0]), keepdims=0)
        ends = build.op("CumSum", counts, across)
        begins = build.op("Sub", ends, counts)
        # the place of a slot: where its expert begins, after those of its expert before it
        earlier = build.op("Sub", build.op("CumSum", mine, down), mine)
        places = build.op("Mul", mine, build.op("Add", earlier, begins))
        places = build.op("ReduceSum", places, build.constant([1]), keepdims=0)
        places = self._cast(places, ir.DataType.INT32)
        count = build.op("Squeeze", build.op("Shape", places), build.constant([0]))
        numbers = self._cast(
            build.op("Range", build.constant(0), count, build.constant(1)), ir.DataType.INT32
        )
        order = build.op("ScatterElements", numbers, places, numbers, axis=0)
        first = build.constant([0], np.int32)
        ends = self._cast(ends, ir.DataType.INT32)
        return order, build.op("Concat", first, ends, axis=0)

    def _plugin(self, kernel: Kernel, *leading: ir.Value) -> ir.Value:
        """One plugin node on all experts' parts for it."""
        names = [f"experts.{index}." for index in range(self.spec.num_experts)]
        names += ["meta."] * self.spec.meta_expert
        parts: list[ir.Value] = []
        groups: dict[int | None, str] = {}
        for owner, part in itertools.product(names, PARTS[kernel, self.spec.activation]):
            matrix, _, kind = part.partition(".")
            if kind == "bias":
                parts.append(self._cast(self.weights[owner + part], self.half))
            elif not kind:
                stored, group = self._stored(self.weights[f"{owner}{matrix}.weight"])
                parts += stored
                groups.setdefault(group, str(stored[0].name).removesuffix(".packed"))
        if len(groups) > 1:
            raise ConfigError(
                f"{' and '.join(groups.values())} are in formats that one kernel cannot mix.",
                "Export with --int8 or --int4, which store all experts alike.",
            )
        result = self.build.op(
            OPS[kernel],
            *leading,
            *parts,
            domain=MEDMOE,
            plugin_namespace=namespace(self.spec.activation, self.experts),
            **PLUGIN,
            **({"activation": self.spec.activation} if kernel == "hidden" else {}),
        )
        result.dtype = self.half
        return result

    def _stored(self, weight: ir.Value) -> tuple[list[ir.Value], int | None]:
        """The integers and scales behind a matrix, as the kernels take them, and the group size."""
        matrix = StoredMatrix.behind(weight)
        if matrix is None:
            raise _no_kernel(weight.name, "not quantised")
        if (matrix.bits, matrix.group) == (8, None):
            return [self._initializer(matrix.integers), self._initializer(matrix.scale)], None
        if matrix.bits != 4 or matrix.group is None or matrix.group not in TILES:
            form = f"{matrix.bits} bits in groups of {matrix.group}"
            raise _no_kernel(matrix.integers.name, form)
        return [self._initializer(tensor) for tensor in _packed(matrix)], matrix.group

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        return register(self.model.graph, tensor)

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        result = self.build.op("Cast", value, to=int(to))
        result.dtype = to
        return result


def _packed(matrix: StoredMatrix) -> list[ir.LazyTensor]:
    """Bytes `[N, K / group, group / 2]` under INT8, and scales `[N, K / group]`."""
    assert matrix.group is not None
    shape = [matrix.channels, matrix.width // matrix.group, matrix.group // 2]
    name = matrix.integers.name

    def bytes_in_groups() -> npt.NDArray[np.int8]:
        return matrix.packed(4).view(np.int8).reshape(shape)

    return [
        lazy_tensor(f"{name}.packed", bytes_in_groups, ir.DataType.INT8, shape),
        lazy_tensor(
            f"{name}.groups.scale",
            lambda: matrix.scales(matrix.group),
            matrix.scale.dtype,
            shape[:2],
        ),
    ]


def _no_kernel(name: str | None, stored: str) -> ConfigError:
    return ConfigError(
        f"The TensorRT plugin has no kernel for {name}: it is {stored}.",
        "Export with --int8 or --int4.",
    )


def lower_deltas_everywhere(model: ir.Model, spec: MoESpec) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::MoE` and drop the function; returns `(model, modified)`.

    Experts' matrices must be as `stored.specification` has those of deltas; others are left.
    """
    modified = has_deltas(model) and replace_moe(
        model, spec, lambda build, x, weights: _delta_layer(build, x, weights, spec)
    )
    if modified:
        RemoveUnusedNodesPass()(model)
        NameFixPass()(model)
    return model, modified


def has_deltas(model: ir.Model) -> bool:
    """Whether a specification's experts are sums of the meta expert and deltas."""
    nodes = (node for node in model.graph if node.op_type == "MoE")
    made = (value.producer() for node in nodes for value in node.inputs[1:] if value is not None)
    return any(node is not None and node.op_type == "Add" for node in made)


def _delta_layer(build: Builder, x: ir.Value, weights: Weights, spec: MoESpec) -> ir.Value:
    held, parts = dict(weights), MATRICES[spec.activation]
    for index, part in itertools.product(range(spec.num_experts), parts):
        stem = f"experts.{index}.{part}"
        held |= {
            f"{stem}.{name}": value for name, value in _delta(weights[f"{stem}.weight"]).items()
        }
    base = delta_base(build, x, held, spec)
    hidden, total = base.hidden, build.constant(0, np.float32)
    for index in range(spec.num_experts):
        share = share_of(build, base.gates, base.chosen, index)
        given = (base.tokens, share, *base.products)
        own, added = delta_part(build, given, held, f"experts.{index}.", spec.activation)
        hidden, total = build.op("Add", hidden, own), build.op("Add", total, added)
    y = delta_output(build, base, (hidden, total), held, spec)
    return build.op("Reshape", y, build.op("Shape", x))


def _delta(whole: ir.Value) -> dict[str, ir.Value]:
    """What is added to the meta expert's matrix, as `delta_part` names it."""
    _, delta = map(there, there(whole.producer()).inputs)
    product = delta.producer()
    if product is None or product.op_type != "MatMul":
        return {"delta": delta}
    a, b = map(there, product.inputs)
    return {"delta.a": a, "delta.b": b}


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


@dataclass(frozen=True)
class _Layer:
    """One node on its way; of its E experts n are gathered."""

    build: Builder
    x: ir.Value
    weights: Weights
    spec: MoESpec
    half: ir.DataType
    pools: Pools
    stacks: dict[str, ir.TensorProtocol] = field(default_factory=dict)

    def lowered(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """The chosen experts `[1, S, K]`, and the op's result, of the shape of x."""
        build, spec = self.build, self.spec
        gates, chosen, probabilities = route(build, self.x, self.weights, spec)
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
