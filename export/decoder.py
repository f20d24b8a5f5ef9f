"""The decoder as an ONNX graph, built from the configuration rather than traced.

Inputs: `embeds` `[1, S, D]`, `start` `[1]` (the position of its first token), and `past_key.N`,
`past_value.N` `[1, H, C, head_size]` per layer. Outputs: `logits` `[1, V]` of the last position,
`router_logits` `[1, S, M, E]` of the M layers with experts (where some were left out, those of all
that the router knows), and `present_*`, which a runtime binds to the buffers of `past_*`: the cache
is written in place.

This is the specification of every target: standard ONNX and two ops that are functions of it,
`medmoe::Attention` and `medmoe::MoE`. Each target's passes replace what it runs otherwise.

The two ops of our own that the decoder is specified with: `medmoe::MoE` and `medmoe::Attention`.

`medmoe::MoE`, the mixture of experts as one ONNX op whose specification is its function body.

    y = medmoe::MoE<activation, top_k, num_experts>(x, router_weight, [router_bias],
            [coefficient_weight, coefficient_bias], expert 0 ..., expert 1 ..., [meta expert ...])

x and y are floats `[B, S, D]`. Matrices are `[in, out]`, as MatMul reads them: the router `[D, E]`,
the coefficient `[D, 2]`, and of every expert, in this order,

    swiglu     gate [D, F], up [D, F], down [F, D]
    gelu_tanh  fc1 [D, F], its bias [F], fc2 [F, D], its bias [D]

Where experts were left out (`MoEConfig.router_names`), the router keeps its R rows, the softmax is
over all of them, and what follows is among the experts that are there. A merged layer has no op:
it is one feed-forward.

With p = softmax(x router_weight + router_bias), the k largest chosen (lower index on ties) and
g = p for k = 1, p / (sum of the chosen p) for k = 2:

    y = sum over chosen e of g_e E_e(x)  +  meta(x)

and with a coefficient, c = softmax(x coefficient_weight + coefficient_bias):

    y = c_0 sum over chosen e of g_e E_e(x)  +  c_1 meta(x)  +  meta(x)

The body runs every expert on every token and weighs the unchosen with zero: slow and plain, it runs
in any ONNX engine, and every lowering must agree with it. Experts are separate inputs rather than
one stacked tensor, so that each expert's bytes lie together in the file and page as one.
Source: Med-MoE, arXiv 2404.10237, and its official code.

`medmoe::Attention`, causal attention over a KV cache as one ONNX op, specified by its body.

    y, present_key, present_value = medmoe::Attention<num_heads, head_size, rotary_size>(
        q, k, v, past_key, past_value, start, cos, sin)

q, k, v and y are floats `[1, S, D]`, the caches `[1, H, C, head_size]`, start is int64 `[1]`: the
position of the step's first token, which is how many positions the cache already holds. cos and sin
are `[positions, rotary_size / 2]`. The first `rotary_size` channels of each head of q and k rotate
with their position (halves, not interleaved, as GPT-NeoX does); the S new rows of k and v take the
cache's positions start .. start + S - 1; every token attends over the positions up to its own,
with scale 1 / sqrt(head_size).

present_* is past_* with the new rows in it, so that an engine may write it in place.
The body uses ONNX's RotaryEmbedding (opset 23), TensorScatter and Attention (opset 24).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import onnx_ir as ir

from medmoe_edge._types import there
from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.export.builder import (
    IR_VERSION,
    MEDMOE,
    OPSET,
    Builder,
    drop_function,
    floats,
    initializer,
    replace_node,
)

EXPERT_WEIGHTS = {
    "swiglu": ("gate.weight", "up.weight", "down.weight"),
    "gelu_tanh": ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"),
}
MATRICES = {  # of a feed-forward, the one that writes its output last
    activation: tuple(part.removesuffix(".weight") for part in parts if part.endswith(".weight"))
    for activation, parts in EXPERT_WEIGHTS.items()
}
ACTIVATIONS = {"stablelm": "swiglu", "qwen": "swiglu", "phi": "gelu_tanh"}
Weights = Mapping[str, ir.Value]


@dataclass(frozen=True)
class MoESpec:
    """The part of a configuration that shapes the op and fixes the order of its inputs."""

    activation: str
    top_k: int
    num_experts: int
    router_bias: bool
    use_residual: bool
    meta_expert: bool
    rows: tuple[int, ...] | None = None  # of the router, where experts were left out

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The op of a model that has experts."""
        moe = there(config.moe)
        return cls(
            ACTIVATIONS[config.decoder.kind],
            moe.top_k,
            moe.num_experts,
            moe.router_bias,
            moe.use_residual,
            moe.meta_expert,
            moe.own_rows,
        )

    @property
    def weight_names(self) -> list[str]:
        """The weight inputs in the node's order, named relative to the layer's `ffn.`."""
        names = ["router.weight"]
        names += ["router.bias"] * self.router_bias
        names += ["coefficient.weight", "coefficient.bias"] * self.use_residual
        owners = [f"experts.{index}." for index in range(self.num_experts)]
        owners += ["meta."] * self.meta_expert
        return names + [
            owner + part for owner in owners for part in EXPERT_WEIGHTS[self.activation]
        ]

    @property
    def attributes(self) -> dict[str, int | str]:
        """The node's attributes."""
        return {"activation": self.activation, "top_k": self.top_k, "num_experts": self.num_experts}


def moe_function(spec: MoESpec) -> ir.Function:
    """The op's body in standard ops."""
    build = Builder()
    x = ir.Value(name="x")
    weights = {name: ir.Value(name=name) for name in spec.weight_names}
    gates, chosen, probabilities = route(build, x, weights, spec)
    zeros = build.op("ConstantOfShape", build.op("Shape", probabilities))
    spread = build.op("ScatterElements", zeros, chosen, gates, axis=-1)  # [B, S, E]
    shares = build.ops(
        "Split", spread, outputs=spec.num_experts, axis=-1, num_outputs=spec.num_experts
    )
    parts = [
        build.op(
            "Mul", feed_forward(build, x, weights, f"experts.{index}.", spec.activation), share
        )
        for index, share in enumerate(shares)
    ]
    y = add_meta(build, x, build.op("Sum", *parts), weights, spec)
    graph = ir.Graph(
        [x, *weights.values()], [y], nodes=build.nodes, opset_imports={"": OPSET}, name="MoE"
    )
    kinds = {int: ir.AttributeType.INT, str: ir.AttributeType.STRING}
    declared = [ir.Attr(name, kinds[type(value)], None) for name, value in spec.attributes.items()]
    return ir.Function(MEDMOE, "MoE", graph=graph, attributes=declared)


def meta_name(name: str) -> str:
    """The meta expert's weight that stands beside an expert's."""
    owner, _, rest = name.partition(".experts.")
    return f"{owner}.meta.{rest.partition('.')[2]}"


def replace_moe(
    model: ir.Model, spec: MoESpec, lower: Callable[[Builder, ir.Value, Weights], ir.Value]
) -> bool:
    """Put what `lower` makes of x and the weights in the place of every node; drop the function."""
    nodes = [node for node in model.graph if node.domain == MEDMOE and node.op_type == "MoE"]
    for node in nodes:
        x, *given = node.inputs
        named = zip(spec.weight_names, given, strict=True)
        weights = {name: value for name, value in named if value is not None}
        build = Builder()
        replace_node(node, build, lower(build, there(x), weights))
    if nodes:
        drop_function(model, "MoE")
    return bool(nodes)


def route(
    build: Builder, x: ir.Value, weights: Weights, spec: MoESpec
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Gates and chosen experts, both `[B, S, K]`, and the experts' probabilities `[B, S, E]`.

    They are over all rows of the router, those included whose experts were left out.
    """
    top_k = spec.top_k
    probabilities = build.op("Softmax", router_logits(build, x, weights), axis=-1)
    if spec.rows is not None:
        probabilities = build.op("Gather", probabilities, build.constant(list(spec.rows)), axis=-1)
    gates, chosen = build.ops(
        "TopK", probabilities, build.constant([top_k]), outputs=2, axis=-1, largest=1, sorted=1
    )
    if top_k > 1:
        total = build.op("ReduceSum", gates, build.constant([-1]), keepdims=1)
        gates = build.op("Div", gates, total)
    return gates, chosen, probabilities


def route_tokens(
    build: Builder, x: ir.Value, weights: Weights, spec: MoESpec
) -> tuple[ir.Value, ir.Value]:
    """Gates and chosen experts of each token, both `[T, K]`."""
    gates, chosen, _ = route(build, x, weights, spec)
    per_token = build.constant([-1, spec.top_k])
    return build.op("Reshape", gates, per_token), build.op("Reshape", chosen, per_token)


def router_logits(build: Builder, x: ir.Value, weights: Weights) -> ir.Value:
    """`[B, S, E]`, or of all R rows of the router where experts were left out."""
    return affine(build, x, weights, "router.")


def feed_forward(
    build: Builder, x: ir.Value, weights: Weights, owner: str, activation: str
) -> ir.Value:
    """One expert, or a dense layer's feed-forward; `[..., D]` to `[..., D]`."""
    if activation == "swiglu":
        gate = affine(build, x, weights, f"{owner}gate.")
        up = affine(build, x, weights, f"{owner}up.")
        hidden = build.op("Mul", build.op("Mul", gate, build.op("Sigmoid", gate)), up)
        return affine(build, hidden, weights, f"{owner}down.")
    hidden = build.op("Gelu", affine(build, x, weights, f"{owner}fc1."), approximate="tanh")
    return affine(build, hidden, weights, f"{owner}fc2.")


def add_meta(
    build: Builder, x: ir.Value, routed: ir.Value, weights: Weights, spec: MoESpec
) -> ir.Value:
    """The routed sum with the meta expert, and the residual mix where there is a coefficient."""
    if not spec.meta_expert:
        return routed
    meta = feed_forward(build, x, weights, "meta.", spec.activation)
    if spec.use_residual:
        mix = build.op("Softmax", affine(build, x, weights, "coefficient."), axis=-1)
        first, second = build.ops("Split", mix, outputs=2, axis=-1, num_outputs=2)
        routed = build.op("Add", build.op("Mul", routed, first), build.op("Mul", meta, second))
    return build.op("Add", routed, meta)


def affine(build: Builder, x: ir.Value, weights: Weights, owner: str) -> ir.Value:
    """`x W`, plus the bias where there is one."""
    y = build.op("MatMul", x, weights[f"{owner}weight"])
    bias = weights.get(f"{owner}bias")
    return y if bias is None else build.op("Add", y, bias)


INPUTS = ("q", "k", "v", "past_key", "past_value", "start", "cos", "sin")
OUTPUTS = ("y", "present_key", "present_value")


def attention_attributes(decoder: DecoderConfig) -> dict[str, int]:
    """The node's attributes."""
    return {
        "num_heads": decoder.heads,
        "head_size": decoder.head_size,
        "rotary_size": decoder.rotary_size,
    }


def attention_function(decoder: DecoderConfig) -> ir.Function:
    """The op's body in standard ops."""
    build = Builder()
    values = {name: ir.Value(name=name) for name in INPUTS}
    steps = positions(build, values["q"], values["start"])  # [S]
    query, key = (rotated(build, values, name, steps, decoder) for name in "qk")
    caches = [
        build.op("TensorScatter", values[f"past_{name}"], new, values["start"], axis=2)
        for name, new in (("key", key), ("value", heads(build, values["v"], decoder)))
    ]
    mixed = build.op("Attention", query, *caches, visible(build, caches[0], steps))
    y = merged(build, mixed)
    graph = ir.Graph(
        list(values.values()),
        [y, *caches],
        nodes=build.nodes,
        opset_imports={"": OPSET},
        name="Attention",
    )
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in attention_attributes(decoder)]
    return ir.Function(MEDMOE, "Attention", graph=graph, attributes=declared)


def positions(build: Builder, q: ir.Value, start: ir.Value) -> ir.Value:
    """Of the tokens of a step, `[S]`."""
    length = build.op("Squeeze", build.op("Shape", q, start=1, end=2))
    return build.op("Add", start, build.op("Range", *_from_zero(build, length)))


def _from_zero(build: Builder, end: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    return build.constant(0), end, build.constant(1)


def heads(build: Builder, x: ir.Value, decoder: DecoderConfig) -> ir.Value:
    """`[1, S, D]` to `[1, H, S, head_size]`."""
    shape = build.constant([0, 0, decoder.heads, decoder.head_size])
    return build.op("Transpose", build.op("Reshape", x, shape), perm=[0, 2, 1, 3])


def merged(build: Builder, x: ir.Value) -> ir.Value:
    """`[1, H, S, head_size]` to `[1, S, D]`."""
    rows = build.op("Transpose", x, perm=[0, 2, 1, 3])
    return build.op("Reshape", rows, build.constant([0, 0, -1]))


def rotated(
    build: Builder,
    values: dict[str, ir.Value],
    name: str,
    steps: ir.Value,
    decoder: DecoderConfig,
) -> ir.Value:
    """Heads of q or k, `[1, H, S, head_size]`, turned by their positions."""
    return build.op(
        "RotaryEmbedding",
        heads(build, values[name], decoder),
        values["cos"],
        values["sin"],
        build.op("Unsqueeze", steps, build.constant([0])),
        rotary_embedding_dim=decoder.rotary_size,
    )


def visible(build: Builder, cache: ir.Value, steps: ir.Value) -> ir.Value:
    """`[S, C]`: which cached positions each token may attend over."""
    capacity = build.op("Squeeze", build.op("Shape", cache, start=2, end=3))
    cached = build.op("Range", *_from_zero(build, capacity))
    return build.op("LessOrEqual", cached, build.op("Unsqueeze", steps, build.constant([1])))


class Parameters(Protocol):
    """Where a decoder's parameters come from: a checkpoint, or a bundle's own graph."""

    def names_under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""

    def tensor(self, name: str) -> ir.TensorProtocol:
        """One parameter, matrices as MatMul reads them, `[in, out]`."""


class DecoderBuilder:
    """Builds one decoder; a method per part, in the order of execution.

    Of some `layers` in a row only: a part that is not the last has the output `hidden` `[1, S, D]`
    in the place of logits, which the next takes as its `embeds`; each has the cache and the router
    logits of its own layers.
    """

    def __init__(
        self, config: ModelConfig, source: Parameters, layers: range | None = None
    ) -> None:
        self.config, self.decoder = config, config.decoder
        self.layers = layers or range(config.decoder.layers)
        self.source = source
        self.build = Builder()
        self.initializers: dict[str, ir.Value] = {}
        self.inputs = [
            floats("embeds", 1, "S", self.decoder.hidden_size),
            ir.val("start", ir.DataType.INT64, [1]),
        ]
        self.outputs: list[ir.Value] = []
        self.routing: list[ir.Value] = []

    def model(self) -> ir.Model:
        """The whole graph, with its ops' functions."""
        cos, sin = (self._initializer(ir.tensor(t, name=n)) for n, t in rotary_cache(self.decoder))
        x = self.inputs[0]
        for layer in self.layers:
            x = self._layer(x, layer, cos, sin)
        if self.layers.stop == self.decoder.layers:
            last = self.build.op(
                "Gather", self._norm(x, "decoder.norm."), self.build.constant(-1), axis=1
            )
            logits = affine(self.build, last, self._weights("decoder.head.", ["weight"]), "")
            named = {"logits": logits}
        else:
            named = {"hidden": x}
        if self.routing:
            named["router_logits"] = self._stack_routing()
        for name, value in named.items():
            value.name = name
        functions = [attention_function(self.decoder)]
        if self.routing and self.config.moe is not None and not self.config.moe.merged:
            functions.append(moe_function(MoESpec.of(self.config)))
        graph = ir.Graph(
            self.inputs,
            [*named.values(), *self.outputs],
            nodes=self.build.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, MEDMOE: 1},
            name="decoder",
        )
        self._declare_outputs(named)
        return ir.Model(graph, ir_version=IR_VERSION, functions=functions)

    def _layer(self, x: ir.Value, layer: int, cos: ir.Value, sin: ir.Value) -> ir.Value:
        own = f"decoder.layers.{layer}."
        u = self._norm(x, f"{own}input_norm.")
        mixed = self._attention(u, layer, cos, sin)
        if self.decoder.parallel:  # both branches read the same norm
            return self.build.op("Sum", x, mixed, self._feed_forward(u, layer))
        x = self.build.op("Add", x, mixed)
        u = self._norm(x, f"{own}post_norm.")
        return self.build.op("Add", x, self._feed_forward(u, layer))

    def _attention(self, u: ir.Value, layer: int, cos: ir.Value, sin: ir.Value) -> ir.Value:
        own = f"decoder.layers.{layer}.attention."
        parts = ["weight", "bias"]
        q, k, v = (
            affine(self.build, u, self._weights(f"{own}{name}.", parts), "") for name in "qkv"
        )
        decoder = self.decoder
        shape = (1, decoder.heads, "C", decoder.head_size)
        past = [floats(f"past_{kind}.{layer}", *shape) for kind in ("key", "value")]
        mixed, *present = self.build.ops(
            "Attention",
            *(q, k, v, *past, self.inputs[1], cos, sin),
            outputs=3,
            domain=MEDMOE,
            **attention_attributes(decoder),
        )
        for kind, value in zip(("key", "value"), present, strict=True):
            value.name = f"present_{kind}.{layer}"
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
        self.inputs += past
        self.outputs += present
        out = ["weight", "bias"] if decoder.kind == "phi" else ["weight"]
        return affine(self.build, mixed, self._weights(f"{own}out.", out), "")

    def _feed_forward(self, u: ir.Value, layer: int) -> ir.Value:
        own = f"decoder.layers.{layer}.ffn."
        if layer not in self.config.moe_layers:
            names = self.source.names_under(own)
            activation = ACTIVATIONS[self.decoder.kind]
            return feed_forward(self.build, u, self._weights(own, names), "", activation)
        spec = MoESpec.of(self.config)
        if there(self.config.moe).merged:
            names = self.source.names_under(own)
            weights = self._weights(own, names)
            self.routing.append(router_logits(self.build, u, weights))
            return feed_forward(self.build, u, weights, "merged.", spec.activation)
        weights = self._weights(own, spec.weight_names)
        self.routing.append(router_logits(self.build, u, weights))
        return self.build.op("MoE", u, *weights.values(), domain=MEDMOE, **spec.attributes)

    def _stack_routing(self) -> ir.Value:
        axis = self.build.constant([2])
        return self.build.op(
            "Concat", *(self.build.op("Unsqueeze", logits, axis) for logits in self.routing), axis=2
        )

    def _norm(self, x: ir.Value, own: str) -> ir.Value:
        weights = self._weights(own, list(self.decoder.norm_parameters))
        epsilon = self.decoder.norm_eps
        if "bias" in weights:
            return self.build.op("LayerNormalization", x, *weights.values(), epsilon=epsilon)
        # RMSNorm in the steps that ONNX Runtime fuses; RMSNormalization itself needs opset 23
        build = self.build
        square = build.op("Pow", x, build.constant(2.0, np.float32))
        mean = build.op("ReduceMean", square, build.constant([-1]), keepdims=1)
        root = build.op("Sqrt", build.op("Add", mean, build.constant(epsilon, np.float32)))
        return build.op("Mul", build.op("Div", x, root), weights["weight"])

    def _weights(self, own: str, names: list[str]) -> Weights:
        return {name: self._initializer(self.source.tensor(f"{own}{name}")) for name in names}

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = there(tensor.name)
        if name not in self.initializers:
            self.initializers[name] = initializer(tensor)
        return self.initializers[name]

    def _declare_outputs(self, named: dict[str, ir.Value]) -> None:
        shapes: dict[str, list[int | str]] = {
            "logits": [1, self.decoder.vocab_size],
            "hidden": [1, "S", self.decoder.hidden_size],
        }
        if self.config.moe:
            shapes["router_logits"] = [1, "S", len(self.routing), self.config.moe.router_rows]
        for name, value in named.items():
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shapes[name])


def rotary_cache(decoder: DecoderConfig) -> list[tuple[str, np.ndarray]]:
    """Cosines and sines `[max_positions, rotary_size / 2]`, computed in double precision."""
    exponents = np.arange(0, decoder.rotary_size, 2) / decoder.rotary_size
    angles = np.outer(np.arange(decoder.max_positions), decoder.rope_theta**-exponents)
    return [
        ("rotary_cos", np.cos(angles).astype(np.float32)),
        ("rotary_sin", np.sin(angles).astype(np.float32)),
    ]
