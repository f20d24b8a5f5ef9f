"""The vision tower and projector as one graph, through PyTorch's own exporter.

The model is traced with fake tensors, so no weight is in memory while it is; the checkpoint's take
their places lazily, as in the decoder.
"""

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medmoe_edge.checkpoint.reader import Checkpoint
from medmoe_edge.config import ModelConfig
from medmoe_edge.export.tracing import fill, optimise, trace
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
    source = WeightSource(checkpoint)
    for value in optimise(model, checkpoint.names):
        fill(model.graph, value, source)
    return model


def _trace(config: ModelConfig) -> ir.Model:
    side = config.vision.image_size
    with FakeTensorMode():
        pixels = {"pixels": torch.zeros(1, 3, side, side)}
        return trace(ImageEncoder(config), pixels, ["image_tokens"])
