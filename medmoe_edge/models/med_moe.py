"""Med-MoE: vision tower -> projector -> decoder with experts (arXiv 2404.10237)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medmoe_edge.config import ModelConfig
from medmoe_edge.models.clip import ClipTower, SiglipTower
from medmoe_edge.models.decoder import Decoder, KVCache, MoE, Phi, StableLm, causal_mask
from medmoe_edge.models.efficientnet_lite import EfficientNetLite

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
