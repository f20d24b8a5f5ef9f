"""What the ONNX parser of each TensorRT takes, and graphs written in no more than that.

The operators are kept as data. None of the parser's own documents lists those of every version, so
they are put together from the three that do, each read in November 2026:

    9.2     docs/operators.md of onnx/onnx-tensorrt at 9.2, all that it says yes to
    since   docs/Changelog.md of the same, 9.3 to 10.15: operators "added"
    10.15   docs/operators.md at 10.15: what it lists besides is counted from there

A version so has no operator here that it lacks, and may have some that are not known here. 11.x has
those of 10.15. Opsets: 20 in TensorRT 10.3 (NVIDIA's support matrix), 21 from 10.9 on (its change
log names operators of it), 24 from 10.13 on.

What a parser lacks is written otherwise, each form with the same meaning:

    Attention, RotaryEmbedding   MatMul, Softmax; rotation by Mul, Sub, Add
    TensorScatter                ScatterND, which copies the cache: it is not written in place
    Gelu                         Tanh or Erf
    blocks of 4 bits (opset 21)  integers of 8 bits, multiplied with the scales of their blocks

TensorRT's parser takes an attention mask of four axes only, and TensorScatter on axis -2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, NameFixPass, RemoveUnusedNodesPass

from medmoe_edge._types import there
from medmoe_edge.bundle.bundle import Target
from medmoe_edge.config import DecoderConfig
from medmoe_edge.export.builder import (
    IR_VERSION,
    MEDMOE,
    Builder,
    replace_initializer,
    replace_node,
    tensor_of,
)
from medmoe_edge.export.decoder import (
    INPUTS,
    attention_attributes,
    heads,
    merged,
    positions,
    rotated,
    visible,
)
from medmoe_edge.export.jetson import AOT_PLUGINS, Version, parse_version
from medmoe_edge.export.quantise import Array, lazy_tensor

OPERATORS: dict[Version, str] = {
    (9, 2): """
        Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
        Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh
        CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike
        Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool
        GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU HardSwish HardSigmoid
        Hardmax Identity If ImageScaler InstanceNormalization IsInf IsNaN LayerNormalization
        LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max
        MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot
        Or Pad ParametricSoftplus Pow PRelu QuantizeLinear RandomNormal RandomNormalLike
        RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
        ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
        Reshape Resize ReverseSequence RNN RoiAlign Round ScaledTanh Scan Scatter ScatterElements
        ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
        SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
        Unsqueeze Upsample Where Xor""",
    (10, 1): "DeformConv",
    (10, 4): "BlackmanWindow HammingWindow HannWindow",
    (10, 5): "STFT",
    (10, 14): "Attention",
    (10, 15): "Gelu Mish RMSNormalization RotaryEmbedding TensorScatter",
}
OPSETS: dict[Version, int] = {(10, 3): 20, (10, 9): 21, (10, 13): 24}
NEWEST: Version = (11, 4)
HIDDEN = -6e4  # a score that softmax makes nothing, within fp16


@dataclass(frozen=True)
class Parser:
    """The ONNX parser of one TensorRT: the operators of ONNX that it takes, to which opset.

    `plugins`: whether a plugin of ours can be compiled ahead of time into its engines.
    """

    version: Version
    operators: frozenset[str]
    opset: int
    plugins: bool

    @classmethod
    def of(cls, version: Version) -> Self:
        """The parser of a version from 10.3 on."""
        listed = (names for since, names in OPERATORS.items() if since <= version)
        opset = max(number for since, number in OPSETS.items() if since <= version)
        operators = frozenset(" ".join(listed).split())
        return cls(version, operators, opset, version >= AOT_PLUGINS)

    @classmethod
    def of_target(cls, target: Target) -> Self:
        """The parser that will read a target's graphs; that for RTX knows what the newest knows."""
        if target.name == "tensorrt-rtx":
            return cls.of(NEWEST)
        return cls.of(parse_version(target.library_version)[:2])

    @property
    def in_place(self) -> bool:
        """Whether an engine may write its cache where it read it."""
        return "TensorScatter" in self.operators


def write_for(model: ir.Model, parser: Parser, decoder: DecoderConfig | None = None) -> None:
    """Put a graph into the words of a parser; our functions go inline, `decoder` is theirs.

    Domains of ours, that is plugins, are left as they are.
    """
    key = (MEDMOE, "Attention", "")
    if decoder is not None and key in model.functions:
        model.functions[key] = attention_function(decoder, parser)
    graph = model.graph
    opset = min(parser.opset, graph.opset_imports[""])
    graph.opset_imports[""] = opset
    for function in model.functions.values():
        function.opset_imports[""] = opset
    model.ir_version = IR_VERSION if opset > 20 else 9  # the newest that goes with ONNX 1.15
    InlinePass()(model)
    if "Gelu" not in parser.operators:
        _each(graph, "Gelu", _gelu)
    if parser.opset < 21:
        _each(graph, "DequantizeLinear", partial(_without_blocks, graph))
    if not any(node.domain == MEDMOE for node in graph):
        graph.opset_imports.pop(MEDMOE, None)
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)


def attention_function(decoder: DecoderConfig, parser: Parser) -> ir.Function:
    """The body of `medmoe::Attention` in the operators of a parser."""
    build = Builder()
    values = {name: ir.Value(name=name) for name in INPUTS}
    steps = positions(build, values["q"], values["start"])  # [S]
    rotate = rotated if "RotaryEmbedding" in parser.operators else _rotated_by_hand
    query, key = (rotate(build, values, name, steps, decoder) for name in "qk")
    pasts = values["past_key"], values["past_value"]  # [1, H, C, head_size]
    new = key, heads(build, values["v"], decoder)  # [1, H, S, head_size]
    if parser.in_place:
        start = values["start"]
        caches = [
            build.op("TensorScatter", *pair, start, axis=-2)
            for pair in zip(pasts, new, strict=True)
        ]
    else:
        caches = [_copied(build, *pair, steps, decoder) for pair in zip(pasts, new, strict=True)]
    mask = build.op("Unsqueeze", visible(build, caches[0], steps), build.constant([0, 1]))
    if "Attention" in parser.operators:  # [1, H, S, head_size], scaled by 1 / sqrt(head_size)
        attended = build.op("Attention", query, *caches, mask)
    else:
        attended = _attention_by_hand(build, query, caches[0], caches[1], mask, decoder)
    y = merged(build, attended)
    graph = ir.Graph(
        list(values.values()),
        [y, *caches],
        nodes=build.nodes,
        opset_imports={"": parser.opset},
        name="Attention",
    )
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in attention_attributes(decoder)]
    return ir.Function(MEDMOE, "Attention", graph=graph, attributes=declared)


def _rotated_by_hand(
    build: Builder, values: dict[str, ir.Value], name: str, steps: ir.Value, decoder: DecoderConfig
) -> ir.Value:
    """The same: `a cos - b sin` and `b cos + a sin` of the halves a and b; the rest stays."""
    half, rest = decoder.rotary_size // 2, decoder.head_size - decoder.rotary_size
    cos, sin = (build.op("Gather", values[table], steps, axis=0) for table in ("cos", "sin"))
    sizes = build.constant([half, half, rest][: 3 if rest else 2])
    x = heads(build, values[name], decoder)
    a, b, *others = build.ops("Split", x, sizes, outputs=3 if rest else 2, axis=-1)
    first = build.op("Sub", build.op("Mul", a, cos), build.op("Mul", b, sin))
    second = build.op("Add", build.op("Mul", b, cos), build.op("Mul", a, sin))
    return build.op("Concat", first, second, *others, axis=-1)


def _copied(
    build: Builder,
    past: ir.Value,
    new: ir.Value,
    steps: ir.Value,
    decoder: DecoderConfig,
) -> ir.Value:
    """A cache with new rows, by ScatterND, whose indices `[1, H, S, 3]` name a row each."""
    length = build.op("Shape", new, start=2, end=3)
    shape = build.op("Concat", build.constant([1, decoder.heads]), length, axis=0)
    head = build.constant(np.arange(decoder.heads)[None, :, None])
    columns = (build.constant([[[0]]]), head, build.op("Unsqueeze", steps, build.constant([0, 1])))
    last = build.constant([-1])
    indices = [build.op("Unsqueeze", build.op("Expand", column, shape), last) for column in columns]
    return build.op("ScatterND", past, build.op("Concat", *indices, axis=-1), new)


def _attention_by_hand(
    build: Builder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    decoder: DecoderConfig,
) -> ir.Value:
    """Attention; queries are scaled before the product, which fp16 might not hold otherwise."""
    scale = build.constant(1 / math.sqrt(decoder.head_size), np.float32)
    keys = build.op("Transpose", key, perm=[0, 1, 3, 2])
    scores = build.op("MatMul", build.op("Mul", query, scale), keys)
    scores = build.op("Where", mask, scores, build.constant(HIDDEN, np.float32))
    return build.op("MatMul", build.op("Softmax", scores, axis=-1), value)


def _each(graph: ir.Graph, op: str, rewrite: Callable[[Builder, ir.Node], ir.Value | None]) -> None:
    """Replace the nodes of an operator by what `rewrite` builds; None leaves one as it is."""
    for node in [node for node in graph if node.op_type == op and node.domain == ""]:
        build = Builder()
        if (result := rewrite(build, node)) is not None:
            replace_node(node, build, result)


def _gelu(build: Builder, node: ir.Node) -> ir.Value:
    """`x / 2 (1 + erf(x / sqrt 2))`, or its form with tanh."""
    (x,) = map(there, node.inputs)
    given = node.attributes.get("approximate")
    one, half = (build.constant(number, np.float32) for number in (1.0, 0.5))
    if given is None or given.as_string() == "none":
        inner = build.op("Mul", x, build.constant(math.sqrt(0.5), np.float32))
        bent = build.op("Erf", inner)
    else:
        cube = build.op("Mul", build.op("Mul", x, x), build.constant(0.044715, np.float32))
        inner = build.op("Mul", x, build.op("Add", cube, one))
        root = build.constant(math.sqrt(2 / math.pi), np.float32)
        bent = build.op("Tanh", build.op("Mul", inner, root))
    return build.op("Mul", build.op("Mul", x, half), build.op("Add", bent, one))


def _without_blocks(graph: ir.Graph, build: Builder, node: ir.Node) -> ir.Value | None:
    """Integers `[K, N]` of 8 bits times scales `[K / group, N]`; None of a scale per channel."""
    stored, scale = map(there, node.inputs[:2])
    block = node.attributes.get("block_size")
    if block is None or not block.as_int():
        return None
    group, source = block.as_int(), tensor_of(stored)
    width, channels = source.shape.numpy()
    integers = partial(_as_int8, source)
    made = lazy_tensor(str(stored.name), integers, ir.DataType.INT8, [width, channels])
    wide = replace_initializer(graph, stored, made)
    exact = build.op("DequantizeLinear", wide, build.constant(1.0, np.float32))
    groups = build.op("Reshape", exact, build.constant([width // group, group, channels]))
    scaled = build.op("Mul", groups, build.op("Unsqueeze", scale, build.constant([1])))
    return build.op("Reshape", scaled, build.constant([width, channels]))


def _as_int8(source: ir.TensorProtocol) -> Array:
    return source.numpy().astype(np.int8)
