"""Pass: `medmoe::Attention` as ONNX Runtime's `GroupQueryAttention`, which its CPU and CUDA share.

The graph's input `start` becomes that op's two: `seqlens_k` `[1]`, the last position of this step,
and `total_length` `[]`, the positions then in the cache. A buffer may be bound both as `past_*` and
as `present_*`: the cache is then written in place.

Pass: `DequantizeLinear -> MatMul` as ONNX Runtime runs it on a CPU.

Weights with a scale per output channel become W8A8 `DynamicQuantizeMatMul`: activations are
quantised to 8 bits as they arrive, products accumulate in int32. It takes one scale for its whole
input, so every token is divided by its largest magnitude before and multiplied with it after: that
gives each token a scale of its own, and its error no longer depends on its neighbours.
On processors without VNNI its kernel (`vpmaddubsw`: AVX2, AVX-512) adds the products of stored
neighbours 2i and 2i + 1 along K in 16 bits, with saturation; activations go up to 255. So it is
exact there, and the same everywhere, if and only if |w_2i + w_2i+1| <= 128 in every column: the
bound of `calibration.formats.Format.pair_bound`, which every quantiser keeps while it chooses
integers, and which costs nothing at run time. Unsigned weights would be exact too, but have no VNNI
kernel; ONNX Runtime's `session.x64quantprecision` makes them of signed ones, but not of those that
the branch of an `If` takes from outside.
Weights in groups become `MatMulNBits`, whose activations are quantised to 8 bits in blocks of a row
(`accuracy_level` 4; at level 0 its 8-bit kernel is a hundred times slower); it is exact everywhere.

Pass: `medmoe::MoE` for ONNX Runtime on a CPU, one `If` per expert.

Only the experts that some token was routed to run, on those tokens alone.

Pass: the same with experts as what they add to the meta expert, E = meta + D.

The first products of an expert are those of the meta expert and D's, and the last product is
linear in what goes into it. With h the hidden layer of each (`silu(gate x) * up x`), g the gates:

    g down_e(h_e) + down_m(h_m) = down_m(g h_e + h_m) + g Ddown_e(h_e)

so one full feed-forward serves the meta expert and all routed ones, for any routing of each token,
exactly; with a residual coefficient c it is c_0 g for g, and 1 + c_1 for the meta expert's 1.
Biases are kept whole: an expert's own in place of the meta expert's where GELU is computed, both at
the end. What D then takes, in products and bytes, is what its form takes: a low rank, or few bits.

Pass: the three products before attention as one, whose result ONNX Runtime's op takes as it is.

A prefill quantises its tokens once instead of three times and multiplies a wider matrix: measured
at StableLM's size, 23 ms a layer instead of 28 for 640 tokens. The same for gate and up would have
to split the product, which copies it: that costs what it saves.

The fused weights are stored as `attention.qkv.*`, the channels of q, k and v one after the other.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge._types import there
from medmoe_edge.calibration.quantisers import DeltaForm
from medmoe_edge.export.builder import (
    CONTRIB,
    MEDMOE,
    Builder,
    drop_function,
    fix_names,
    register,
    replace_node,
    tensor_of,
)
from medmoe_edge.export.decoder import (
    MATRICES,
    MoESpec,
    Weights,
    add_meta,
    affine,
    feed_forward,
    replace_moe,
    route_tokens,
)
from medmoe_edge.export.quantise import (
    PARTS,
    Array,
    StoredMatrix,
    insert_dequantise,
    lazy_tensor,
    no_values,
)
from medmoe_edge.export.weights import Importance, delta_tensors

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
        q, k, v, past_key, past_value, _, cos, sin = node.inputs
        build, heads = Builder(), node.attributes["num_heads"].as_int()
        outputs = build.ops(
            "GroupQueryAttention",
            *(q, k, v, past_key, past_value, *lengths, cos, sin),
            outputs=3,
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=heads,
            do_rotary=1,
        )
        replace_node(node, build, *outputs)
    places = [value.name for value in graph.inputs]
    at = places.index("start")
    graph.inputs[at : at + 1] = lengths
    drop_function(model, "Attention")
    graph.opset_imports[CONTRIB] = 1
    graph.opset_imports[""] = ORT_OPSET
    return model, True


def lower_matmul(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse every pair, also inside branches; returns `(model, modified)`."""
    pairs = [
        (node, matrix)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "MatMul" and (matrix := StoredMatrix.behind(node.inputs[1])) is not None
    ]
    peaks: dict[tuple[object, ir.Value], tuple[ir.Value, ir.Value]] = {}
    packed: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # some matrices have several readers
    for node, matrix in pairs:
        build, (x, weight) = Builder(), map(there, node.inputs)
        graph, dequantise = node.graph, there(weight.producer())
        if matrix.group is not None:
            if weight not in packed:
                packed[weight] = _packed(model.graph, dequantise, matrix)
            new = _in_groups(build, x, packed[weight], matrix)
        else:
            if (graph, x) not in peaks:
                peaks[graph, x] = _per_token(build, x)
            scaled, peak = peaks[graph, x]
            y = build.op("DynamicQuantizeMatMul", scaled, *dequantise.inputs, domain=CONTRIB)
            new = build.op("Mul", y, peak)
        replace_node(node, build, new)
        model.graph.opset_imports[CONTRIB] = 1
    if pairs:
        RemoveUnusedNodesPass()(model)
        fix_names(model)
    return model, bool(pairs)


def _per_token(build: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x over each token's largest magnitude, and those magnitudes `[..., 1]`."""
    magnitude = build.op("ReduceMax", build.op("Abs", x), build.constant([-1]), keepdims=1)
    peak = build.op("Max", magnitude, build.constant(np.finfo(np.float32).tiny, np.float32))
    return build.op("Div", x, peak), peak


def _packed(
    graph: ir.Graph, dequantise: ir.Node, matrix: StoredMatrix
) -> tuple[ir.Value, ir.Value]:
    """Integers `[N, groups, bytes]` and scales `[N, groups]` as floats."""
    assert matrix.group is not None
    stored = matrix.in_blocks(matrix.group, matrix.bits, "groups.scale")
    inputs = [register(graph, tensor) for tensor in stored]
    per_row = ir.node("Cast", inputs[1:], {"to": int(ir.DataType.FLOAT)})
    graph.insert_before(dequantise, per_row)
    return inputs[0], per_row.outputs[0]


def _in_groups(
    build: Builder, x: ir.Value, packed: tuple[ir.Value, ir.Value], matrix: StoredMatrix
) -> ir.Value:
    return build.op(
        "MatMulNBits",
        *(x, *packed),
        domain=CONTRIB,
        K=matrix.width,
        N=matrix.channels,
        bits=matrix.bits,
        block_size=matrix.group,
        accuracy_level=4,
    )


def lower_moe(model: ir.Model, spec: MoESpec) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::MoE` node and drop the function; returns `(model, modified)`."""
    modified = replace_moe(
        model, spec, lambda build, x, weights: _routed_experts(build, x, weights, spec)
    )
    if modified:
        fix_names(model)
    return model, modified


def lower_deltas(
    model: ir.Model,
    spec: MoESpec,
    form_of: Callable[[str], DeltaForm],
    importance: Importance = lambda _: None,
) -> tuple[ir.Model, bool]:
    """Replace every `medmoe::MoE` node by experts as deltas; returns `(model, modified)`.

    Their weights become `experts.N.gate.delta`, or of a low rank the factors `.delta.a` and
    `.delta.b`; they are computed when they are written. The experts must have the meta expert's
    shapes.

    Args:
        model: A decoder as it was specified, its weights in floats.
        spec: Of its op; there must be a meta expert.
        form_of: How what is added to a weight of the meta expert is stored, by the expert's name.
        importance: Mean squares `[K]` of the inputs of a weight, by its name, where known.
    """
    graph = model.graph

    def lower(build: Builder, x: ir.Value, weights: Weights) -> ir.Value:
        held = dict(weights)
        for index in range(spec.num_experts):
            for part in MATRICES[spec.activation]:
                expert, meta = (
                    weights[f"{owner}.{part}.weight"] for owner in (f"experts.{index}", "meta")
                )
                form = form_of(str(expert.name))
                made = delta_tensors(tensor_of(expert), tensor_of(meta), form, importance)
                for tensor in made:
                    value = register(graph, tensor)
                    held[f"experts.{index}.{part}.{_ending(value)}"] = value
        return _routed_deltas(build, x, held, spec)

    modified = replace_moe(model, spec, lower)
    if modified:
        for name, value in list(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[name]
        fix_names(model)
    return model, modified


def _ending(value: ir.Value) -> str:
    """What follows the part in a delta's name: `delta`, `delta.a` or `delta.b`."""
    return "delta" + str(value.name).rpartition(".delta")[2]


class DeltaBase(NamedTuple):
    """What the deltas of a layer add to, for T tokens `[T, D]`.

    Of each token its `gates` and `chosen` experts `[T, K]`, the meta expert's first products
    `[T, F]` and hidden layer `[T, F]`, and what is added at the end, where there is a bias.
    """

    tokens: ir.Value
    gates: ir.Value
    chosen: ir.Value
    products: list[ir.Value]
    hidden: ir.Value
    bias: ir.Value | None


def delta_base(build: Builder, x: ir.Value, weights: Weights, spec: MoESpec) -> DeltaBase:
    """What is computed before any routed expert."""
    gates, chosen = route_tokens(build, x, weights, spec)
    tokens, _ = _as_tokens(build, x)
    *first, last = MATRICES[spec.activation]
    shared = [build.op("MatMul", tokens, weights[f"meta.{part}.weight"]) for part in first]
    hidden = _hidden(build, shared, weights, "meta.")  # [T, F]
    bias = weights.get(f"meta.{last}.bias")
    if spec.use_residual:
        mix = build.op("Softmax", affine(build, tokens, weights, "coefficient."), axis=-1)
        routed, own = build.ops("Split", mix, outputs=2, axis=-1, num_outputs=2)
        own = build.op("Add", own, build.constant(1.0, np.float32))
        gates, hidden = build.op("Mul", gates, routed), build.op("Mul", hidden, own)
        bias = bias and build.op("Mul", bias, own)
    return DeltaBase(tokens, gates, chosen, shared, hidden, bias)


def delta_output(
    build: Builder, base: DeltaBase, sums: Sequence[ir.Value], weights: Weights, spec: MoESpec
) -> ir.Value:
    """The layer's output `[T, D]`, from the hidden layer and the total with all experts added."""
    hidden, total = sums
    last = MATRICES[spec.activation][-1]
    y = build.op("Add", build.op("MatMul", hidden, weights[f"meta.{last}.weight"]), total)
    return y if base.bias is None else build.op("Add", y, base.bias)


def _routed_deltas(build: Builder, x: ir.Value, weights: Weights, spec: MoESpec) -> ir.Value:
    base = delta_base(build, x, weights, spec)
    total = build.op("ConstantOfShape", build.op("Shape", base.tokens))

    def part(run: Builder, places: ir.Value, share: ir.Value, owner: str) -> Sequence[ir.Value]:
        whole = base.tokens, share, *base.products
        given = [run.op("GatherND", value, places) for value in whole]
        return delta_part(run, given, weights, owner, spec.activation)

    sums = _add_experts(build, base.gates, base.chosen, spec, (base.hidden, total), part)
    y = delta_output(build, base, sums, weights, spec)
    return build.op("Reshape", y, build.op("Shape", x))


def delta_part(
    build: Builder, given: Sequence[ir.Value], weights: Weights, owner: str, activation: str
) -> tuple[ir.Value, ir.Value]:
    """What an expert adds to the hidden layer `[n, F]` and to the output `[n, D]` of its tokens.

    `given`: the tokens `[n, D]`, the share of each `[n, 1]`, the meta expert's first products.
    """
    tokens, share, *shared = given
    *first, last = MATRICES[activation]
    products = [
        build.op("Add", base, _delta(build, tokens, weights, owner + part))
        for base, part in zip(shared, first, strict=True)
    ]
    part = build.op("Mul", _hidden(build, products, weights, owner), share)
    added = _delta(build, part, weights, owner + last)
    if (bias := weights.get(f"{owner}{last}.bias")) is not None:
        added = build.op("Add", added, build.op("Mul", bias, share))
    return part, added


def _hidden(build: Builder, products: Sequence[ir.Value], weights: Weights, owner: str) -> ir.Value:
    """The hidden layer of a feed-forward, from its first products without their bias."""
    if len(products) == 2:
        gate, up = products
        return build.op("Mul", build.op("Mul", gate, build.op("Sigmoid", gate)), up)
    biased = build.op("Add", products[0], weights[f"{owner}fc1.bias"])
    return build.op("Gelu", biased, approximate="tanh")


def _delta(build: Builder, x: ir.Value, weights: Weights, stem: str) -> ir.Value:
    if (whole := weights.get(f"{stem}.delta")) is not None:
        return build.op("MatMul", x, whole)
    narrow = build.op("MatMul", x, weights[f"{stem}.delta.a"])
    return build.op("MatMul", narrow, weights[f"{stem}.delta.b"])


def _as_tokens(build: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x as `[T, D]`, and its shape."""
    shape = build.op("Shape", x)
    width = build.op("Gather", shape, build.constant([2]))
    flat = build.op("Concat", build.constant([-1]), width, axis=0)
    return build.op("Reshape", x, flat), shape


def share_of(build: Builder, gates: ir.Value, chosen: ir.Value, index: int) -> ir.Value:
    """What expert `index` counts for each token, `[T, 1]`; 0 where it was not chosen."""
    mine = build.op("Equal", chosen, build.constant(index))  # [T, K]
    share = build.op("Where", mine, gates, build.constant(0.0, np.float32))
    return build.op("ReduceSum", share, build.constant([-1]), keepdims=1)


def _add_experts(
    build: Builder,
    gates: ir.Value,
    chosen: ir.Value,
    spec: MoESpec,
    sums: Sequence[ir.Value],
    part: Callable[[Builder, ir.Value, ir.Value, str], Sequence[ir.Value]],
) -> Sequence[ir.Value]:
    """`sums` with the `part` of every expert added on the tokens whose share of it is not zero.

    `part` is given a builder, the places `[n, 1]` of those tokens, the share `[T, 1]` of each and
    the owner of the weights.
    """
    for index in range(spec.num_experts):
        share = share_of(build, gates, chosen, index)
        rows = build.op("NonZero", build.op("Squeeze", share, build.constant([-1])))  # [1, n]
        count = build.op("Squeeze", build.op("Shape", rows, start=1), build.constant([0]))
        needed = build.op("Greater", count, build.constant(0))

        run, skip = Builder(), Builder()
        places = run.op("Transpose", rows, perm=[1, 0])
        parts = part(run, places, share, f"experts.{index}.")
        added = [
            run.op("ScatterND", whole, places, new, reduction="add")
            for whole, new in zip(sums, parts, strict=True)
        ]
        kept = [skip.op("Identity", value) for value in sums]
        sums = build.ops(
            "If",
            needed,
            outputs=len(sums),
            then_branch=ir.Graph([], added, nodes=run.nodes, name=f"expert_{index}"),
            else_branch=ir.Graph([], kept, nodes=skip.nodes, name=f"skip_{index}"),
        )
    return sums


def _routed_experts(build: Builder, x: ir.Value, weights: Weights, spec: MoESpec) -> ir.Value:
    gates, chosen = route_tokens(build, x, weights, spec)
    tokens, shape = _as_tokens(build, x)
    total = build.op("ConstantOfShape", build.op("Shape", tokens))

    def part(run: Builder, places: ir.Value, share: ir.Value, owner: str) -> Sequence[ir.Value]:
        mine = run.op("GatherND", tokens, places)  # [n, D]
        own = feed_forward(run, mine, weights, owner, spec.activation)
        return [run.op("Mul", own, run.op("GatherND", share, places))]

    (total,) = _add_experts(build, gates, chosen, spec, [total], part)
    return add_meta(build, x, build.op("Reshape", total, shape), weights, spec)


class _Product(NamedTuple):
    """`x W`, plus the bias where there is one; W maybe behind `DequantizeLinear`."""

    x: ir.Value | None
    weight: ir.Value | None
    bias: ir.Value | None


def fuse_qkv(model: ir.Model) -> tuple[ir.Model, bool]:
    """Fuse before every `GroupQueryAttention`; returns `(model, modified)`.

    A mixed export may store the three in several formats: those are left as they are.
    """
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    fused = [_fuse(model.graph, node) for node in attention]
    if any(fused):
        RemoveUnusedNodesPass()(model)
    return model, any(fused)


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    products = [_product(value) for value in node.inputs[: len(PARTS)]]
    matrices = [StoredMatrix.behind(product.weight) for product in products]
    quantised = [matrix for matrix in matrices if matrix is not None]
    formats = {(matrix.bits, matrix.group) for matrix in quantised}
    if len(quantised) < len(PARTS) or len(formats) > 1:
        return False
    integers = _joined([matrix.integers for matrix in quantised])
    shape = list(integers.shape.numpy())
    floats = lazy_tensor(str(integers.name), no_values, ir.DataType.FLOAT, shape)
    weight = register(graph, floats)
    build = Builder()
    y = build.op("MatMul", products[0].x, weight)
    if products[0].bias is not None:
        bias = register(graph, _joined([tensor_of(product.bias) for product in products]))
        y = build.op("Add", y, bias)
    graph.insert_before(node, build.nodes)
    insert_dequantise(graph, weight, integers, _joined([matrix.scale for matrix in quantised]))
    for place, value in enumerate((y, None, None)):
        node.replace_input_with(place, value)
    return True


def _product(value: ir.Value | None) -> _Product:
    node, bias = there(there(value).producer()), None
    if node.op_type == "Add":
        value, bias = node.inputs
        node = there(there(value).producer())
    return _Product(node.inputs[0], node.inputs[1], bias)


def _joined(parts: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """Tensors of q, k and v as one, along their last axis: the channels."""
    shape = list(parts[0].shape.numpy())
    shape[-1] *= len(parts)
    name = str(parts[0].name).replace(".attention.q.", f".attention.{PARTS}.")

    def join() -> Array:
        return np.concatenate([part.numpy() for part in parts], -1)

    return lazy_tensor(name, join, parts[0].dtype, shape)
