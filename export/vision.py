"""The vision tower and projector as one graph, through PyTorch's own exporter.

The model is traced with fake tensors, so no weight is in memory while it is; the checkpoint's take
their places lazily, as in the decoder.

Pass: the linear layers of a vision transformer in 8 bits, weights and activations in groups.

The groups are small because activations of such towers have outliers: a large one coarsens what
shares its scale. Med-MoE's CLIP ViT-L/14-336 with random weights; then with 6 channels of each norm
and 12 of each fc1 made 30 to 100 times larger (the columns that read them smaller by as much) and
two channels of 4 tokens 100 times. Relative error and mean cosine of the image tokens against
fp32, and seconds an image on two cores (fp32: 2.5):

    8 bits, activations             plain            with outliers    time
    a scale per token (W8A8)        0.027  0.9996    0.44  0.907      0.9
    groups of 128                   0.025  0.9997    0.21  0.979      1.3
    groups of 64                                     0.15  0.988
    groups of 32                    0.020  0.9998    0.11  0.994      1.8

A bundle's gate is a cosine of 0.99, which only groups of 32 keep there; llama.cpp's Q8_0 has the
same. Little of the error is the projector's: without it, groups of 128 have 0.021 and 0.21.

With `tokens` the layers of the tower are W8A8 with a scale per token all the same, after large
channels have been divided: the factors of SmoothQuant, for which no data are needed, since a norm's
parameters and the matrix behind it tell how far each channel reaches. They are powers of two, so
that folding rounds nothing: into the norm, into the values of attention, and before `fc2`, which
stands behind a GELU, as a product of its own. Attention is one `MultiHeadAttention`, without a
matrix of scores; the projector, whose stream no norm has tamed, stays in groups. Measured so again,
on one core with AVX-512 VNNI, time as a part of the first line's:

                                    plain            with outliers    time
    groups of 32                    0.020  0.9998    0.13  0.992      1
    a scale per token                                0.49  0.884      0.51
    the same, channels divided      0.031  0.9995    0.03  0.9995     0.44

Outliers that weights do not tell of (two channels of the whole stream 50 times, in 6 layers) cost
0.017 in both. No CLIP weights were at hand: the gate of an export decides.
"""

import copy
import functools
import logging
import warnings
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import config as fx_config

from medmoe_edge._types import Floats, there
from medmoe_edge.bundle.recorded import SignatureMaker
from medmoe_edge.calibration.methods import INT8, migration_scale
from medmoe_edge.calibration.quantisers import Format, round_to_nearest
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.config import VisionConfig
from medmoe_edge.export.builder import CONTRIB, Builder, initializer, replace_node, tensor_of
from medmoe_edge.export.passes.ort_cpu import ORT_OPSET, lower_matmul
from medmoe_edge.export.quantise import Quantiser, quantise_weights
from medmoe_edge.export.stored import INPUT_SCALE
from medmoe_edge.export.weights import Factors, FoldPoint, WeightSource, fold
from medmoe_edge.models.med_moe import TOWERS, pooled_features, projector


class Weights(Protocol):
    """Named parameters as lazy tensors."""

    def tensor(self, name: str) -> ir.TensorProtocol:
        """One parameter; matrices transposed, `[in, out]`."""

    def untransposed(self, name: str) -> ir.TensorProtocol:
        """One parameter as it is."""


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: list[dict[int, Any]] | None = None,
) -> ir.Model:
    """The module's graph for inputs such as these, as the exporter gives it.

    `dynamic_shapes` names the axes of each input that vary.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, we do not
    fx_config.do_not_emit_stack_traces = True  # of each node, costly; `optimise` would clear them
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not ours to fix
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=ORT_OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            optimize=False,
            verbose=False,
        )
    return there(program).model


def optimise(model: ir.Model, names: Container[str]) -> list[ir.Value]:
    """Simplify the graph and clear what tells of this machine; returns its weights.

    Those are the initializers of these `names`, now without a tensor and no part of the graph until
    `fill` puts them back: so optimising neither reads nor copies them.
    """
    graph = model.graph
    weights = [value for name, value in graph.initializers.items() if name in names]
    for value in weights:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    optimize_ir(model)
    for value in weights:
        graph.inputs.remove(value)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with this machine's paths
    return weights


def fill(graph: ir.Graph, value: ir.Value, weights: Weights) -> None:
    """Give a weight its tensor; matrices, which the exporter transposes, as MatMul reads them."""
    users = [usage.node for usage in value.uses()]
    transposed = bool(users) and all(
        node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
        for node in users
    )
    name = str(value.name)
    if not transposed:
        value.const_value = weights.untransposed(name)
        graph.register_initializer(value)
        return
    stored = initializer(weights.tensor(name))
    for node in users:
        node.outputs[0].replace_all_uses_with(stored)
        there(node.graph).remove(node, safe=True)
    value.name = None
    graph.register_initializer(stored)


class ImageEncoder(nn.Module):
    """Pixels `[1, 3, S, S]` to image tokens `[1, N, D]`; the same as `MedMoE.encode_image`."""

    def __init__(self, config: VisionConfig, size: int) -> None:
        super().__init__()
        self.pool = config.pool
        self.vision = TOWERS[config.kind](config)
        self.projector = projector(config, size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode the image."""
        features = pooled_features(self.vision(pixels), self.pool)
        return self.projector(features)  # type: ignore[no-any-return]


def export_vision(checkpoint: Checkpoint, factors: Mapping[str, Factors] | None = None) -> ir.Model:
    """Trace the image encoder; input `pixels`, output `image_tokens`.

    `factors` are folded into the weights, by name.
    """
    config = checkpoint.config
    traced = _traced(config.vision, config.decoder.hidden_size)
    model, source = traced.clone(), WeightSource(checkpoint, factors)
    # Its counter names the nodes that are added later; a clone's begins anew.
    model.graph._name_authority = copy.deepcopy(traced.graph._name_authority)
    _, *weights = model.graph.inputs
    for value in weights:
        model.graph.inputs.remove(value)
        fill(model.graph, value, source)
    return model


@functools.lru_cache(maxsize=4)
def _traced(config: VisionConfig, size: int) -> ir.Model:
    """The image encoder with its weights as inputs, behind `pixels`; traced once for a process."""
    side = config.image_size
    with FakeTensorMode():
        encoder = ImageEncoder(config, size)
        pixels = {"pixels": torch.zeros(1, 3, side, side)}
        model = trace(encoder, pixels, ["image_tokens"])
    model.graph.inputs.extend(optimise(model, encoder.state_dict()))
    return model


GROUP = 32
INT8_GROUPS = Format(8, GROUP)
LEAST_WIDTH = 128  # inputs of a matrix: narrower ones weigh next to nothing
LAYERS = "vision.layers."
STRENGTH = 0.5  # of SmoothQuant: how much of a channel's reach goes over to the weights
DEVIATIONS = 4.0  # from the mean, that a channel is taken to reach
GELU_FLOOR = 0.17  # below zero no GELU goes further


def quantise_linears(
    model: ir.Model, signature: SignatureMaker | None = None, *, tokens: bool = False
) -> tuple[ir.Model, bool]:
    """Make `MatMulNBits` of every `MatMul` with a wide matrix `[K, N]` that divides into groups.

    With `tokens`, those in the layers of a tower become W8A8 with a scale per token instead.
    Weights are read, and marked in `signature`, when they are written. Returns
    `(model, modified)`; a weight whose scale fp16 cannot hold raises `CheckpointError` then.
    """
    values = model.graph.initializers.items()
    widths = {
        name: tensor_of(value).shape.numpy()[0] for name, value in values if _is_linear(value)
    }

    def policy(name: str) -> tuple[Format, Quantiser] | None:
        if name not in widths:
            return None
        if tokens and name.startswith(LAYERS):
            return INT8, partial(round_to_nearest, format=INT8)
        if widths[name] % GROUP:
            return None
        return INT8_GROUPS, partial(round_to_nearest, format=INT8_GROUPS)

    quantise_weights(model, policy, signature)
    return lower_matmul(model)


def _is_linear(value: ir.Value) -> bool:
    shape, uses = tensor_of(value).shape.numpy(), value.uses()
    multiplied = all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)
    return multiplied and len(shape) == 2 and shape[0] >= LEAST_WIDTH


def tower_by_tokens(
    checkpoint: Checkpoint, signature: SignatureMaker | None = None
) -> tuple[ir.Model, bool]:
    """The image encoder with its tower in W8A8, channels divided; `(model, in_8_bits)`.

    Matrices may be too narrow to be in 8 bits.
    """
    factors = smoothing(checkpoint)
    model = export_vision(checkpoint, factors)
    divide_inputs(model, factors)
    _, in_8_bits = quantise_linears(model, signature, tokens=True)
    fuse_attention(model, checkpoint.config.vision.heads)
    return model, in_8_bits


def smoothing(checkpoint: Checkpoint) -> dict[str, Factors]:
    """What divides the channels of a transformer tower, by how far its parameters let them reach.

    Of `fc2` only the matrix has a factor: its inputs are divided by `divide_inputs`.
    """
    config, source = checkpoint.config.vision, WeightSource(checkpoint)
    scales: dict[FoldPoint, Floats] = {}

    def divide(maker: str | None, readers: Sequence[str], reach: Floats) -> None:
        made = (f"{maker}.weight", f"{maker}.bias") if maker else ()
        matrices = tuple(f"{reader}.weight" for reader in readers)
        scales[FoldPoint((), made, matrices)] = _divisors(source, reach, matrices)

    for layer in range(range(config.layers + 1)[config.select_layer]):  # those that run
        own = f"{LAYERS}{layer}."
        attention = f"{own}attention."
        mean, spread = source.array(f"{own}norm1.bias"), source.array(f"{own}norm1.weight")
        divide(f"{own}norm1", [attention + name for name in "qkv"], _reach(mean, spread))
        mean, spread = _through(source, f"{attention}v", mean, spread)
        divide(f"{attention}v", [f"{attention}out"], _reach(mean, spread))
        mean, spread = source.array(f"{own}norm2.bias"), source.array(f"{own}norm2.weight")
        divide(f"{own}norm2", [f"{own}fc1"], _reach(mean, spread))
        mean, spread = _through(source, f"{own}fc1", mean, spread)
        divide(None, [f"{own}fc2"], np.maximum(mean + DEVIATIONS * spread, GELU_FLOOR))
    return fold(scales)


def _reach(mean: Floats, spread: Floats) -> Floats:
    """How far from zero channels of such means and deviations are taken to go."""
    return np.asarray(np.abs(mean) + DEVIATIONS * np.abs(spread), np.float32)


def _through(
    source: WeightSource, linear: str, mean: Floats, spread: Floats
) -> tuple[Floats, Floats]:
    """Means and deviations behind a linear layer, its inputs taken as independent."""
    matrix, bias = source.array(f"{linear}.weight"), source.array(f"{linear}.bias")
    behind = np.sqrt(np.square(matrix) @ np.square(spread))
    return matrix @ mean + bias, np.asarray(behind, np.float32)


def _divisors(source: WeightSource, reach: Floats, readers: Sequence[str]) -> Floats:
    """A power of two for each channel that the `readers` read: no bit is lost to it."""
    largest = np.max([np.abs(source.array(name)).max(0) for name in readers], axis=0)
    scale = migration_scale(reach, largest, STRENGTH)
    return np.exp2(np.round(np.log2(scale))).astype(np.float32)


def divide_inputs(model: ir.Model, factors: Mapping[str, Factors]) -> None:
    """Divide what every `fc2` reads by what its matrix was multiplied with."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        columns = (
            factors[name].columns if name.endswith(".fc2.weight") and name in factors else None
        )
        if columns is None:
            continue
        for usage in value.uses():
            build, node = Builder(), usage.node
            stored = initializer(ir.tensor(1 / columns, name=f"{name}{INPUT_SCALE}"))
            graph.register_initializer(stored)
            divided = build.op("Mul", node.inputs[0], stored)
            graph.insert_before(node, build.nodes)
            node.replace_input_with(0, divided)


def fuse_attention(model: ir.Model, heads: int) -> tuple[ir.Model, bool]:
    """Make one `MultiHeadAttention` of a tower's attention; returns `(model, modified)`.

    What the exporter wrote otherwise than expected stays as it is.
    """
    fused = [_fuse(node, heads) for node in list(model.graph) if node.op_type == "Softmax"]
    if any(fused):
        RemoveUnusedNodesPass()(model)
        model.graph.opset_imports[CONTRIB] = 1
    return model, any(fused)


HEADS = ("Transpose", "Reshape")  # from [1, S, D] to heads, last first
SCALED = ("Mul",)
TRANSPOSED = ("Reshape", "Transpose", "Reshape")  # the exporter's way to the keys' transpose


def _fuse(softmax: ir.Node, heads: int) -> bool:
    scores = _behind(softmax.inputs[0], "MatMul")
    mixed = _reader(softmax, "MatMul")
    merged = _reader(_reader(mixed, "Transpose"), "Reshape")
    if scores is None or mixed is None or merged is None:
        return False
    q = _made_from(scores.inputs[0], (*SCALED, *HEADS))
    k = _made_from(scores.inputs[1], (*SCALED, *TRANSPOSED, *HEADS))
    v = _made_from(mixed.inputs[1], HEADS)
    if q is None or k is None or v is None:
        return False
    build = Builder()
    y = build.op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=heads)
    replace_node(merged, build, y)
    return True


def _behind(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _made_from(value: ir.Value | None, op_types: Sequence[str]) -> ir.Value | None:
    """The first input of a chain of operators, the last given first; None for another chain."""
    for op_type in op_types:
        node = _behind(value, op_type)
        if node is None:
            return None
        value = node.inputs[0]
    return value


def _reader(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The one node that reads another's output, if it is of this type."""
    uses = node.outputs[0].uses() if node is not None else ()
    readers = [usage.node for usage in uses if usage.node.op_type == op_type]
    return readers[0] if len(uses) == len(readers) == 1 else None
