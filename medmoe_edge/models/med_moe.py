"""Med-MoE: vision tower -> projector -> decoder with experts (arXiv 2404.10237).

The towers that it and MoE-LLaVA look through: CLIP (https://arxiv.org/abs/2103.00020) and SigLIP
(https://arxiv.org/abs/2303.15343).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from medmoe_edge.config import ModelConfig, VisionConfig
from medmoe_edge.models.decoder import Decoder, KVCache, MoE, Phi, StableLm, causal_mask
from medmoe_edge.models.efficientnet_lite import EfficientNetLite


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


Tower = ClipTower | SiglipTower | EfficientNetLite


TOWERS: dict[str, type[Tower]] = {
    "clip": ClipTower,
    "siglip": SiglipTower,
    "efficientnet-lite": EfficientNetLite,
}

DECODERS: dict[str, type[Decoder]] = {"phi": Phi, "stablelm": StableLm, "qwen": StableLm}


class Output(NamedTuple):
    """What a decoder pass yields.

    `hidden` `[B, S, D]` is normed, ready for `MedMoE.head`; `ffn_inputs` are each layer's
    feed-forward inputs `[B, S, D]`, the states a router is trained on.
    """

    hidden: Tensor
    ffn_inputs: list[Tensor]


def projector(config: ModelConfig) -> nn.Sequential:
    """`mlp2x_gelu`: image features `[..., C]` to the decoder's size `[..., D]`."""
    size = config.decoder.hidden_size
    return nn.Sequential(
        nn.Linear(config.vision.feature_size, size), nn.GELU(), nn.Linear(size, size)
    )


class MedMoE(nn.Module):
    """The whole model. Image tokens take the place of `<image>` among the text embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.decoder.hidden_size
        self.vision: Tower = TOWERS[config.vision.kind](config.vision)
        self.projector = nn.Sequential(
            nn.Linear(config.vision.feature_size, size), nn.GELU(), nn.Linear(size, size)
        )
        self.decoder: Decoder = DECODERS[config.decoder.kind](config)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` to image tokens `[B, N, D]`."""
        return self.projector(self.vision(pixels))  # type: ignore[no-any-return]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[..., S]` to embeddings `[..., S, D]`."""
        return self.decoder.embed(ids)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D]` to logits `[..., V]`."""
        return self.decoder.head(hidden)  # type: ignore[no-any-return]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` positions."""
        return KVCache(self.config.decoder, batch, capacity, self.decoder.embed.weight)

    def forward(
        self,
        embeds: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Output:
        """Embeddings `[B, S, D]` through the decoder, appended to `cache` where one is given.

        `positions` `[B, S]` and `mask` `[B, 1, S, past + S]` default to plain causal order.
        """
        batch, length = embeds.shape[:2]
        past = cache.length if cache else 0
        if positions is None:
            steps = torch.arange(past, past + length, device=embeds.device)
            positions = steps.expand(batch, -1)
        if mask is None:
            mask = causal_mask(length, past, embeds.device)
        hidden, inputs = self.decoder(embeds, positions, mask, cache)
        if cache is not None:
            cache.length += length
        return Output(hidden, inputs)

    def router_logits(self, output: Output) -> Tensor:
        """Router logits `[B, S, M, E]` of the M layers that hold experts."""
        logits = [
            self.moe_layer(layer).router_logits(output.ffn_inputs[layer])
            for layer in self.config.moe_layers
        ]
        return torch.stack(logits, dim=2)

    def moe_layer(self, layer: int) -> MoE:
        """The experts of decoder layer `layer`."""
        ffn = self.decoder.layers[layer].ffn
        assert isinstance(ffn, MoE)
        return ffn

    def use_gumbel(self, seed: int | None) -> None:
        """Noise on the second expert's choice, to reproduce the official evaluation; None: off."""
        noise = None if seed is None else torch.Generator().manual_seed(seed)
        for layer in self.config.moe_layers:
            self.moe_layer(layer).noise = noise
