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
"""

import copy
import functools
import logging
import warnings
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medmoe_edge.bundle.recorded import SignatureMaker
from medmoe_edge.calibration.quantisers import Format, round_to_nearest
from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.config import VisionConfig
from medmoe_edge.export.builder import initializer, tensor_of
from medmoe_edge.export.passes.ort_cpu import ORT_OPSET, lower_matmul
from medmoe_edge.export.quantise import Quantiser, quantise_weights
from medmoe_edge.export.weights import WeightSource
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
    assert program is not None
    return program.model


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
        assert node.graph is not None
        node.graph.remove(node, safe=True)
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


def export_vision(checkpoint: Checkpoint) -> ir.Model:
    """Trace the image encoder; input `pixels`, output `image_tokens`."""
    config = checkpoint.config
    traced = _traced(config.vision, config.decoder.hidden_size)
    model, source = traced.clone(), WeightSource(checkpoint)
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


def quantise_linears(
    model: ir.Model, signature: SignatureMaker | None = None
) -> tuple[ir.Model, bool]:
    """Make `MatMulNBits` of every `MatMul` with a wide matrix `[K, N]` that divides into groups.

    Weights are read, and marked in `signature`, when they are written. Returns
    `(model, modified)`; a weight whose scale fp16 cannot hold raises `CheckpointError` then.
    """
    linears = {name for name, value in model.graph.initializers.items() if _is_linear(value)}

    def policy(name: str) -> tuple[Format, Quantiser] | None:
        if name not in linears:
            return None
        return INT8_GROUPS, partial(round_to_nearest, format=INT8_GROUPS)

    quantise_weights(model, policy, signature)
    return lower_matmul(model)


def _is_linear(value: ir.Value) -> bool:
    shape, uses = tensor_of(value).shape.numpy(), value.uses()
    multiplied = all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)
    return multiplied and len(shape) == 2 and shape[0] >= LEAST_WIDTH and shape[0] % GROUP == 0
