"""The vision tower and projector as one graph, through PyTorch's own exporter."""

import logging
import warnings

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from medmoe_edge.checkpoint import Checkpoint
from medmoe_edge.export.builder import OPSET
from medmoe_edge.export.weights import WeightSource
from medmoe_edge.models.med_moe import TOWERS, projector


class ImageEncoder(nn.Module):
    """Pixels `[1, 3, S, S]` to image tokens `[1, N, D]`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        config = checkpoint.config
        self.vision = TOWERS[config.vision.kind](config.vision)
        self.projector = projector(config)
        source = WeightSource(checkpoint)
        self.load_state_dict(
            {name: torch.from_numpy(source.array(name)) for name in self.state_dict()}
        )
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """The same as `MedMoE.encode_image`."""
        return self.projector(self.vision(pixels))  # type: ignore[no-any-return]


def export_vision(checkpoint: Checkpoint) -> ir.Model:
    """Trace the image encoder; input `pixels`, output `image_tokens`."""
    encoder = ImageEncoder(checkpoint)
    side = checkpoint.config.vision.image_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, we do not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not ours to fix
        program = torch.onnx.export(
            encoder,
            (torch.zeros(1, 3, side, side),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["image_tokens"],
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # stack traces, with this machine's paths
    return program.model


def vision_policy(model: ir.Model) -> frozenset[str]:
    """Names of the weights that are multiplied: of convolutions and of matrix products."""
    multiplied = {
        node.inputs[1] for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")
    }
    return frozenset(
        name for name, value in model.graph.initializers.items() if value in multiplied
    )
