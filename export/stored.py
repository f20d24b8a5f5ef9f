"""A bundle's decoder as it was specified: its stored integers, before ONNX Runtime's packing.

Every target is made from these, so that they differ in their graphs and not in their numbers; and
a device can make its own without the checkpoint or PyTorch.

A bundle's vision graph in floats: what targets with fast half arithmetic begin with.

A GPU multiplies the hundreds of rows of an image faster in half than it unpacks 8 bits, and
TensorRT knows no `MatMulNBits`.
"""

from functools import partial, reduce
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medmoe_edge._types import there
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.recorded import DELTA
from medmoe_edge.config import ModelConfig, VisionConfig
from medmoe_edge.errors import BundleError, of_machine
from medmoe_edge.export.builder import (
    CONTRIB,
    Builder,
    initializer,
    register,
    replace_initializer,
    replace_node,
    tensor_of,
)
from medmoe_edge.export.decoder import DecoderBuilder, Parameters, meta_name
from medmoe_edge.export.quantise import (
    INTEGERS,
    Array,
    insert_dequantise,
    lazy_tensor,
    no_values,
    owners_of,
    split_fused,
    unpack_rows,
)

SCALE = ".scale"
PACKED, GROUP_SCALE = ".packed", ".groups.scale"
INPUT_SCALE = ".inputs.scale"  # what a matrix's inputs `[K]` are multiplied with beforehand


class QuantisedParameters(Parameters, Protocol):
    """Parameters of which some are integers; their `tensor` has no values, only a shape."""

    def quantised(self, name: str) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
        """Integers `[K, N]` and scales, `[N]` or in groups `[K / group, N]`; None of floats."""


def specification(bundle: Bundle, layers: range | None = None) -> ir.Model:
    """The decoder as `DecoderBuilder` makes it, its matrices behind `DequantizeLinear`.

    Of all `layers`, or of some in a row; a matrix of which a delta is stored is an `Add`, and
    integers of 2 bits, which few engines read, are in 4.
    Weights are read when they are used. Raises `BundleError` where the graph cannot be read.
    """
    stored = StoredWeights(bundle.path("decoder.onnx"))
    model = DecoderBuilder(bundle.config, stored, layers).model()
    for name in stored.deltas:
        if name in model.graph.initializers:
            _add_delta(model.graph, name, stored)
    model = _dequantise(model, stored)
    _widen(model.graph)
    return model


def specify(config: ModelConfig, stored: QuantisedParameters) -> ir.Model:
    """The decoder of a configuration with these weights."""
    return _dequantise(DecoderBuilder(config, stored).model(), stored)


def _dequantise(model: ir.Model, stored: QuantisedParameters) -> ir.Model:
    for name, value in list(model.graph.initializers.items()):
        if (found := stored.quantised(name)) is not None:
            insert_dequantise(model.graph, value, *found)
    return model


def _add_delta(graph: ir.Graph, name: str, stored: "StoredWeights") -> None:
    """Make an expert's matrix the meta expert's plus what is stored of it."""
    build, whole = Builder(), graph.initializers.pop(name)
    parts = [register(graph, stored.tensor(part)) for part in sorted(stored.deltas[name])]
    delta = parts[0] if len(parts) == 1 else build.op("MatMul", *parts)
    total = build.op("Add", graph.initializers[meta_name(name)], delta)
    total.name, total.type, total.shape = name, whole.type, whole.shape
    graph.insert_before(graph[0], build.nodes)
    whole.replace_all_uses_with(total)


def _widen(graph: ir.Graph) -> None:
    """Store integers of 2 bits in 4, lazily."""
    narrow = [value for value in graph.initializers.values() if value.dtype == ir.DataType.INT2]
    for value in narrow:
        source, name = tensor_of(value), str(value.name)
        shape = list(source.shape.numpy())
        wide = lazy_tensor(name, partial(_as_int4, source), ir.DataType.INT4, shape)
        value.replace_all_uses_with(replace_initializer(graph, value, wide))


def _as_int4(source: ir.TensorProtocol) -> Array:
    return source.numpy().astype(np.int8).astype(ml_dtypes.int4)


def placed(tensor: ir.ExternalTensor, location: Path | str, start: int = 0) -> ir.ExternalTensor:
    """The tensor in the file `location`, which begins with byte `start` of the tensor's own file.

    The result has no base folder: in a base folder onnx-ir refuses files with several hard links
    and links out of it. Environments that uv made, deduplicated copies and the Hugging Face Hub's
    cache have such files. The manifest's hashes say whether a file is the right one.
    """
    return ir.ExternalTensor(
        location,
        (tensor.offset or 0) - start,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=there(tensor.name),
    )


def load_graph(path: Path) -> ir.Model:
    """A bundle's graph, its weights left on disk; raises `BundleError`."""
    damaged = BundleError(f"{path} cannot be read.", "Copy or export it again.")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx-ir raise what they like
        raise (of_machine(str(path), error) or damaged) from error
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            if Path(tensor.location).name != str(tensor.location):  # in another folder
                raise damaged
            value.const_value = placed(tensor, path.absolute().parent / tensor.location)
    return model


class StoredWeights:
    """The parameters in a decoder's graph for ONNX Runtime, under the checkpoint's names.

    `stored` has them under the graph's, which joins q, k and v. `deltas` are the names, one or
    those of two factors, of what an expert's matrix adds to the meta expert's; the matrix itself
    can be had in floats.
    """

    def __init__(self, graph: Path) -> None:
        model, self.graph = load_graph(graph), graph
        self.stored = {name: tensor_of(value) for name, value in model.graph.initializers.items()}
        self.tensors = split_fused(self.stored)
        self.deltas: dict[str, list[str]] = {}
        for name in self.tensors:
            stem, delta, _ = name.partition(DELTA)
            if delta and not name.endswith(SCALE):
                self.deltas.setdefault(f"{stem}.weight", []).append(name.removesuffix(PACKED))
        self.bits = {
            owner: node.attributes["bits"].as_int()
            for node in ir.traversal.RecursiveGraphIterator(model.graph)
            if node.op_type == "MatMulNBits" and node.inputs[1] is not None
            for owner in owners_of(str(node.inputs[1].name))
        }

    def names_under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""
        names = dict.fromkeys(
            name.removesuffix(PACKED)
            for name in (*self.tensors, *self.deltas)
            if not (name.endswith(SCALE) or DELTA in name)
        )
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def tensor(self, name: str) -> ir.TensorProtocol:
        """A parameter; of a quantised one only its shape `[in, out]`, see `quantised`."""
        if name in self.deltas:
            shape = list(self.tensor(meta_name(name)).shape.numpy())
            return lazy_tensor(name, partial(self._rebuilt, name), ir.DataType.FLOAT, shape)
        if (found := self.quantised(name)) is None:
            return self._known(name)
        return ir.LazyTensor(
            no_values, ir.DataType.FLOAT, shape=ir.Shape(found[0].shape.numpy()), name=name
        )

    def quantised(self, name: str) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
        """Integers `[K, N]` and scales, `[N]` or in groups `[K / group, N]`; None of floats."""
        if (scale := self.tensors.get(f"{name}{SCALE}")) is not None:
            return self.tensors[name], scale
        if (packed := self.tensors.get(f"{name}{PACKED}")) is not None:
            scale = self._known(f"{name}{GROUP_SCALE}")
            return _unpacked(name, packed, scale, self.bits[f"{name}{PACKED}"])
        return None

    def _rebuilt(self, name: str) -> Array:
        """An expert's matrix `[K, N]`, from the meta expert's and its delta."""
        delta = reduce(np.matmul, map(self._floats, sorted(self.deltas[name])))
        return self._floats(meta_name(name)) + delta

    def _floats(self, name: str) -> Array:
        found = self.quantised(name)
        return _product(*found) if found is not None else self._known(name).numpy()

    def _known(self, name: str) -> ir.TensorProtocol:
        if name in self.tensors:
            return self.tensors[name]
        raise BundleError(
            f"{self.graph} holds no {name}: another version of medmoe-edge wrote it.",
            "Export the checkpoint again with this version.",
        )


def _unpacked(
    name: str, packed: ir.TensorProtocol, scale: ir.TensorProtocol, bits: int
) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    """Lazily what `ort_matmul` packed: bytes `[N, groups, n]` and scales `[N, groups]`."""
    channels, groups, size = packed.shape.numpy()
    kind, dtype = INTEGERS[bits]
    width = groups * size * 8 // bits

    def integers() -> ir.TensorProtocol:
        rows = unpack_rows(packed.numpy().reshape(channels, -1), bits)
        return ir.tensor(np.ascontiguousarray(rows.T).astype(dtype, copy=False))

    def scales() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(scale.numpy().T))

    return (
        ir.LazyTensor(integers, kind, shape=ir.Shape([width, channels]), name=name),
        ir.LazyTensor(
            scales, scale.dtype, shape=ir.Shape([groups, channels]), name=f"{name}{SCALE}"
        ),
    )


def float_vision(bundle: Bundle) -> ir.Model:
    """The vision tower and projector as standard ONNX; weights are read when they are written.

    Every product of integers is the `MatMul` with what they stand for. Raises `BundleError` where
    the graph cannot be read.
    """
    path = bundle.path("vision.onnx")
    model, stored = load_graph(path), StoredWeights(path)
    for node in list(model.graph):
        if node.op_type == "MatMulNBits":
            _as_matmul(node, node.inputs[0], _dequantised(stored, node.inputs[1]))
        elif node.op_type == "DynamicQuantizeMatMul":
            (usage,) = node.outputs[0].uses()  # which multiplies with the scale of each token
            _as_matmul(usage.node, _undivided(node), _dequantised(stored, node.inputs[1]))
        elif node.op_type == "MultiHeadAttention":
            _as_products(node, bundle.config.vision)
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports.pop(CONTRIB, None)
    return model


def _as_matmul(node: ir.Node, x: ir.Value | None, weight: ir.Value) -> None:
    graph, build = there(node.graph), Builder()
    graph.initializers.pop(str(weight.name), None)  # integers that had its name
    graph.register_initializer(weight)
    replace_node(node, build, build.op("MatMul", x, weight))


def _undivided(node: ir.Node) -> ir.Value | None:
    """What a product with a scale per token reads before it is divided by them."""
    return there(there(node.inputs[0]).producer()).inputs[0]


def _as_products(node: ir.Node, config: VisionConfig) -> None:
    """Attention over queries, keys and values `[1, S, D]`, in standard ops."""
    build, size = Builder(), config.feature_size // config.heads
    apart = build.constant([0, 0, config.heads, size])
    ways = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])  # keys transposed
    q, k, v = (
        build.op("Transpose", build.op("Reshape", value, apart), perm=way)
        for value, way in zip(node.inputs, ways, strict=True)
    )
    scale = build.constant(size**-0.5, np.float32)
    scores = build.op("MatMul", build.op("Mul", q, scale), k)
    mixed = build.op("MatMul", build.op("Softmax", scores, axis=-1), v)
    rows = build.op("Transpose", mixed, perm=[0, 2, 1, 3])
    together = build.constant([0, 0, config.feature_size])
    replace_node(node, build, build.op("Reshape", rows, together))


def _dequantised(stored: StoredWeights, matrix: ir.Value | None) -> ir.Value:
    name = str(there(matrix).name).removesuffix(PACKED)
    found = there(stored.quantised(name))
    shape = list(found[0].shape.numpy())
    return initializer(lazy_tensor(name, partial(_product, *found), ir.DataType.FLOAT, shape))


def _product(integers: ir.TensorProtocol, scale: ir.TensorProtocol) -> Array:
    """Integers `[K, N]` times their scales `[N]`, or those of their groups `[K / group, N]`."""
    if len(scale.shape) == 1:
        plain: Array = integers.numpy() * scale.numpy()
        return plain
    groups, channels = scale.shape.numpy()
    grouped = integers.numpy().reshape(groups, -1, channels).astype(np.float32)
    weight: Array = (grouped * scale.numpy()[:, None].astype(np.float32)).reshape(-1, channels)
    return weight
