"""MedMoE: image features from an expert of the image's modality (arXiv 2506.08356).

pixels -> Swin pyramid -> router -> one expert -> regions   |
                                                            |-> modality_similarity.py
text   -> BERT -> words                                     |
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.models.bert import BertTower, TextFeatures
from medmoe_edge.models.swin import Pyramid, SwinTower

ROUTER_SIZE = 128


class ImageFeatures(NamedTuple):
    """`regions` `[B, h, w, D]` on the finest grid, `pooled` `[B, D]`, router logits `[B, E]`."""

    regions: Tensor
    pooled: Tensor
    router_logits: Tensor


class ScaleExpert(nn.Module):
    """One modality's view of the pyramid: every scale projected, enlarged and weighed.

    The scales are enlarged bilinearly on the grid, so that a region lies over its own pixels (the
    paper says "linear interpolation" to as many positions). The attention's first layer is
    applied before that: a linear map commutes with interpolation, whose weights sum to one, and
    the small grids have a third of the positions in all.
    """

    def __init__(self, channels: Sequence[int], size: int) -> None:
        super().__init__()
        # a 1x1 convolution is a linear map of the channels
        self.projections = nn.ModuleList(nn.Linear(channel, size) for channel in channels)
        self.attention_in = nn.Linear(size, size // 2)
        self.attention_out = nn.Linear(size // 2, 1)

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        """Scales `[B, h, w, C]`, fine to coarse, to regions `[B, h, w, D]` of the finest grid."""
        grid = scales[0].shape[1]
        features, scores = [], []
        for x, projection in zip(scales, self.projections, strict=True):
            projected = relu(projection(x))
            hidden = enlarge(self.attention_in(projected), grid)
            scores.append(self.attention_out(relu(hidden)))  # [B, h, w, 1]
            features.append(enlarge(projected, grid))
        weights = torch.cat(scores, -1).softmax(-1)  # [B, h, w, scales]
        regions = features[0] * weights[..., :1]
        for index, x in enumerate(features[1:], start=1):
            regions = regions + x * weights[..., index : index + 1]
        return regions


class ModalityMoE(nn.Module):
    """The whole model. The router looks at the image alone: no label is needed to ask."""

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.vision.channels
        self.vision = SwinTower(config.vision)
        self.router = nn.Sequential(
            nn.Linear(channels[-1], ROUTER_SIZE),
            nn.ReLU(),
            nn.Linear(ROUTER_SIZE, len(config.modalities)),
        )
        self.experts = nn.ModuleList(
            ScaleExpert(channels, config.size) for _ in range(config.experts)
        )
        self.text = BertTower(config.text)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Normalised pixels `[B, 3, S, S]`; only the experts that some image chose run."""
        pyramid = self.vision(pixels)
        logits = self.router(pyramid.last.mean((1, 2)))  # [B, E]
        regions = self.regions(pyramid, self.choose(logits))
        return ImageFeatures(regions, regions.mean((1, 2)), logits)

    def encode_text(self, ids: Tensor, words: Tensor, seen: Tensor) -> TextFeatures:
        """Word features; see `BertTower.forward`."""
        return self.text(ids, words, seen)  # type: ignore[no-any-return]

    def choose(self, router_logits: Tensor) -> Tensor:
        """Each image's expert `[B]`: top-1. Its probability weighs nothing (no gate)."""
        chosen = router_logits.argmax(-1)
        return torch.zeros_like(chosen) if self.config.shared_expert else chosen

    def regions(self, pyramid: Pyramid, chosen: Tensor) -> Tensor:
        """Regions `[B, h, w, D]`, each image's from its expert `chosen` `[B]`."""
        parts, rows = [], []
        for index in sorted(set(chosen.tolist())):
            row = torch.where(chosen == index)[0]
            parts.append(self.experts[index]([scale[row] for scale in pyramid.scales]))
            rows.append(row)
        order = torch.cat(rows).argsort()
        return torch.cat(parts)[order]


def enlarge(x: Tensor, grid: int) -> Tensor:
    """`[B, h, w, C]` to `[B, grid, grid, C]`, bilinear between the centres of the cells."""
    if x.shape[1] == grid:
        return x
    size = (grid, grid)
    enlarged = interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return enlarged.permute(0, 2, 3, 1)
