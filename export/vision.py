"""The vision tower and projector as one graph, through PyTorch's own exporter.

The model is traced with fake tensors, so no weight is in memory while it is; the checkpoint's take
their places lazily, as in the decoder.
"""

import logging
import warnings

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medmoe_edge.checkpoint import Checkpoint
from medmoe_edge.config import ModelConfig
from medmoe_edge.export.builder import initializer
from medmoe_edge.export.ort_attention import ORT_OPSET
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.models.med_moe import TOWERS, projector


class ImageEncoder(nn.Module):
    """Pixels `[1, 3, S, S]` to image tokens `[1, N, D]`; the same as `MedMoE.encode_image`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vision = TOWERS[config.vision.kind](config.vision)
        self.projector = projector(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode the image."""
        return self.projector(self.vision(pixels))  # type: ignore[no-any-return]


def export_vision(checkpoint: Checkpoint) -> ir.Model:
    """Trace the image encoder; input `pixels`, output `image_tokens`."""
    model = _trace(checkpoint.config)
    graph = model.graph
    weights = [value for name, value in graph.initializers.items() if name in checkpoint.names]
    for value in weights:  # as inputs, so that optimising neither reads nor copies them
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    optimize_ir(model)
    del graph.inputs[1:]
    source = WeightSource(checkpoint)
    for value in weights:
        _store(graph, value, source)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with this machine's paths
    return model


def _trace(config: ModelConfig) -> ir.Model:
    side = config.vision.image_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, we do not
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not ours to fix
        program = torch.onnx.export(
            ImageEncoder(config).eval(),
            (torch.zeros(1, 3, side, side),),
            dynamo=True,
            opset_version=ORT_OPSET,
            input_names=["pixels"],
            output_names=["image_tokens"],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _store(graph: ir.Graph, value: ir.Value, source: WeightSource) -> None:
    """Give a weight its tensor; matrices, which the exporter transposes, as MatMul reads them."""
    users = [usage.node for usage in value.uses()]
    transposed = bool(users) and all(
        node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
        for node in users
    )
    name = str(value.name)
    if not transposed:
        value.const_value = source.untransposed(name)
        graph.register_initializer(value)
        return
    stored = initializer(source.tensor(name))
    for node in users:
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)
    value.name = None
    graph.register_initializer(stored)
