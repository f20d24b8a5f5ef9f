"""The decoder as an ONNX graph, built from the configuration rather than traced.

Inputs: `embeds` `[1, S, D]`, `start` `[1]` (the position of its first token), and `past_key.N`,
`past_value.N` `[1, H, C, head_size]` per layer. Outputs: `logits` `[1, V]` of the last position,
`router_logits` `[1, S, M, E]` of the M layers with experts, and `present_*`, which a runtime binds
to the buffers of `past_*`: the cache is written in place.

This is the specification of every target: standard ONNX and two ops that are functions of it,
`medmoe::Attention` and `medmoe::MoE`. Each target's passes replace what it runs otherwise.
"""

from typing import Protocol

import numpy as np
import onnx_ir as ir

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.export.builder import (
    IR_VERSION,
    MEDMOE,
    OPSET,
    Builder,
    floats,
    initializer,
)
from medmoe_edge.export.ops import (
    ACTIVATIONS,
    MoESpec,
    Weights,
    affine,
    attention_attributes,
    attention_function,
    feed_forward,
    moe_function,
    router_logits,
)


class Parameters(Protocol):
    """Where a decoder's parameters come from: a checkpoint, or a bundle's own graph."""

    def names_under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""

    def tensor(self, name: str) -> ir.TensorProtocol:
        """One parameter, matrices as MatMul reads them, `[in, out]`."""


class DecoderBuilder:
    """Builds one decoder; a method per part, in the order of execution."""

    def __init__(self, config: ModelConfig, source: Parameters) -> None:
        self.config, self.decoder = config, config.decoder
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
        for layer in range(self.decoder.layers):
            x = self._layer(x, layer, cos, sin)
        last = self.build.op(
            "Gather", self._norm(x, "decoder.norm."), self.build.constant(-1), axis=1
        )
        logits = affine(self.build, last, self._weights("decoder.head.", ["weight"]), "")
        named = {"logits": logits}
        if self.routing:
            named["router_logits"] = self._stack_routing()
        for name, value in named.items():
            value.name = name
        functions = [attention_function(self.decoder)]
        if self.config.moe is not None:
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
        name = tensor.name
        assert name is not None
        if name not in self.initializers:
            self.initializers[name] = initializer(tensor)
        return self.initializers[name]

    def _declare_outputs(self, named: dict[str, ir.Value]) -> None:
        shapes: dict[str, list[int | str]] = {"logits": [1, self.decoder.vocab_size]}
        if self.config.moe:
            shapes["router_logits"] = [1, "S", len(self.routing), self.config.moe.num_experts]
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
