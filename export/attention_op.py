"""`medmoe::Attention`, causal attention over a KV cache as one ONNX op, specified by its body.

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

import onnx_ir as ir

from medmoe_edge.config import DecoderConfig
from medmoe_edge.export.builder import MEDMOE, OPSET, Builder

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
    steps = _positions(build, values["q"], values["start"])  # [S]
    query, key = (_rotated(build, values, name, steps, decoder) for name in "qk")
    caches = [
        build.op("TensorScatter", values[f"past_{name}"], new, values["start"], axis=2)
        for name, new in (("key", key), ("value", _heads(build, values["v"], decoder)))
    ]
    mixed = build.op("Attention", query, *caches, _visible(build, caches[0], steps))
    y = build.op(
        "Reshape", build.op("Transpose", mixed, perm=[0, 2, 1, 3]), build.constant([0, 0, -1])
    )
    graph = ir.Graph(
        list(values.values()),
        [y, *caches],
        nodes=build.nodes,
        opset_imports={"": OPSET},
        name="Attention",
    )
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in attention_attributes(decoder)]
    return ir.Function(MEDMOE, "Attention", graph=graph, attributes=declared)


def _positions(build: Builder, q: ir.Value, start: ir.Value) -> ir.Value:
    length = build.op("Squeeze", build.op("Shape", q, start=1, end=2))
    return build.op("Add", start, build.op("Range", *_from_zero(build, length)))


def _from_zero(build: Builder, end: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    return build.constant(0), end, build.constant(1)


def _heads(build: Builder, x: ir.Value, decoder: DecoderConfig) -> ir.Value:
    """`[1, S, D]` to `[1, H, S, head_size]`."""
    shape = build.constant([0, 0, decoder.heads, decoder.head_size])
    return build.op("Transpose", build.op("Reshape", x, shape), perm=[0, 2, 1, 3])


def _rotated(
    build: Builder,
    values: dict[str, ir.Value],
    name: str,
    steps: ir.Value,
    decoder: DecoderConfig,
) -> ir.Value:
    return build.op(
        "RotaryEmbedding",
        _heads(build, values[name], decoder),
        values["cos"],
        values["sin"],
        build.op("Unsqueeze", steps, build.constant([0])),
        rotary_embedding_dim=decoder.rotary_size,
    )


def _visible(build: Builder, cache: ir.Value, steps: ir.Value) -> ir.Value:
    """`[S, C]`: which cached positions each token may attend over."""
    capacity = build.op("Squeeze", build.op("Shape", cache, start=2, end=3))
    cached = build.op("Range", *_from_zero(build, capacity))
    return build.op("LessOrEqual", cached, build.op("Unsqueeze", steps, build.constant([1])))
