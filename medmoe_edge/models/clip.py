"""The vision transformers that Med-MoE and MoE-LLaVA look through.

CLIP (https://arxiv.org/abs/2103.00020) and SigLIP (https://arxiv.org/abs/2303.15343).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from medmoe_edge.config import VisionConfig


class ClipAttention(nn.Module):
    """Bidirectional self-attention, all projections with bias."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.feature_size, config.feature_size)
        self.k = nn.Linear(config.feature_size, config.feature_size)
        self.v = nn.Linear(config.feature_size, config.feature_size)
        self.out = nn.Linear(config.feature_size, config.feature_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1 + N, C]` to `[B, 1 + N, C]`."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        return self.out(  # type: ignore[no-any-return]
            scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


class ClipLayer(nn.Module):
    """Pre-norm transformer block with quick GELU, `x * sigmoid(1.702 x)`."""

    norm_eps = 1e-5

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.feature_size, self.norm_eps)
        self.attention = ClipAttention(config)
        self.norm2 = nn.LayerNorm(config.feature_size, self.norm_eps)
        self.fc1 = nn.Linear(config.feature_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.feature_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1 + N, C]` to `[B, 1 + N, C]`."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]

    def activation(self, hidden: Tensor) -> Tensor:
        """Of the feed-forward."""
        return hidden * torch.sigmoid(1.702 * hidden)


class SiglipLayer(ClipLayer):
    """The same block with GELU in its tanh form and another epsilon."""

    norm_eps = 1e-6

    def activation(self, hidden: Tensor) -> Tensor:
        """Of the feed-forward."""
        return gelu(hidden, approximate="tanh")


class ClipTower(nn.Module):
    """Image `[B, 3, S, S]` to patch features `[B, N, C]` of hidden state `select_layer`.

    All layers are kept, also those behind `select_layer`: a checkpoint is read and written whole.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.feature_size
        # hidden state 0 is the embedding: state -2 of L layers is what L - 1 layers made
        self.depth = range(config.layers + 1)[config.select_layer]
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.patch_embedding = nn.Conv2d(
            3, size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(1 + config.image_tokens, size)
        self.pre_norm = nn.LayerNorm(size, 1e-5)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.layers))
        self.post_norm = nn.LayerNorm(size, 1e-5)

    def forward(self, pixels: Tensor) -> Tensor:
        """The class token is dropped, as `mm_vision_select_feature: patch` asks."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, N, C]
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.pre_norm(torch.cat((first, patches), dim=1) + self.position_embedding.weight)
        for layer in self.layers[: self.depth]:
            x = layer(x)
        return x[:, 1:]  # type: ignore[no-any-return]


class SiglipTower(nn.Module):
    """Image `[B, 3, S, S]` to patch features of hidden state `select_layer`, `[B, N, C]`.

    There is no class token and no norm before the layers; the pooling head behind them is not read.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, patch = config.feature_size, config.patch_size
        self.depth = range(config.layers + 1)[config.select_layer]
        self.first = int(config.select_feature == "patch")
        self.patch_embedding = nn.Conv2d(3, size, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.grid**2, size)
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.layers))
        self.post_norm = nn.LayerNorm(size, SiglipLayer.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """The first patch is dropped where `mm_vision_select_feature` is "patch"."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, N, C]
        x = x + self.position_embedding.weight
        for layer in self.layers[: self.depth]:
            x = layer(x)
        return x[:, self.first :]  # type: ignore[no-any-return]
