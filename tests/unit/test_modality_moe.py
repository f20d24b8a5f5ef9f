"""MedMoE: the commuted expert, the routing, and that a region lies over its pixels."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softmax

from medmoe_edge.models.contrastive import (
    ImageFeatures,
    ModalityMoE,
    ScaleExpert,
    enlarge,
    losses,
    region_map,
)
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.training.initialise import random_modality_model

TINY = MODALITY_PRESETS["modality-tiny"]
MODALITIES = len(TINY.modalities)


def model(shared_expert: bool = False) -> ModalityMoE:
    """Random weights, the router's large enough to send images to different experts."""
    made = random_modality_model(replace(TINY, shared_expert=shared_expert), seed=0).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    return made


def images(count: int = 12) -> Tensor:
    size = TINY.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def as_the_paper_says(expert: ScaleExpert, scales: Sequence[Tensor]) -> Tensor:
    """Uncommuted: enlarge first, then weigh every position of every scale. Channels first."""
    size = scales[0].shape[1:3]
    features = []
    for x, projection in zip(scales, expert.projections, strict=True):
        assert isinstance(projection, nn.Linear)
        kernel = projection.weight[:, :, None, None]  # a 1x1 convolution
        convolved = torch.conv2d(x.permute(0, 3, 1, 2), kernel, projection.bias).relu()
        features.append(interpolate(convolved, tuple(size), mode="bilinear"))
    scores = []
    for feature in features:
        hidden = expert.attention_in(feature.permute(0, 2, 3, 1)).relu()
        scores.append(expert.attention_out(hidden)[..., 0])  # [B, h, w]
    weights = softmax(torch.stack(scores), 0)
    total = torch.zeros_like(features[0])
    for weight, feature in zip(weights, features, strict=True):
        total += weight[:, None] * feature
    return total.permute(0, 2, 3, 1)


@torch.no_grad()
@pytest.mark.parametrize("grids", [(8,), (8, 4), (28, 14, 7), (14, 7, 4, 2)])
def test_the_commuted_expert_is_the_papers(grids: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    channels = [6 * 2**stage for stage in range(len(grids))]
    expert = ScaleExpert(channels, 16)
    for parameter in expert.parameters():
        nn.init.normal_(parameter, std=0.5)
    scales = [torch.randn(2, g, g, c) for g, c in zip(grids, channels, strict=True)]
    regions = expert(scales)
    assert regions.shape == (2, grids[0], grids[0], 16)
    torch.testing.assert_close(regions, as_the_paper_says(expert, scales), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_the_chosen_experts_run_and_each_sees_its_own_images() -> None:
    net, pixels = model(), images()
    seen: dict[int, int] = {}

    def watch(index: int) -> Callable[[nn.Module, tuple[Sequence[Tensor]]], None]:
        return lambda _, args: seen.update({index: len(args[0][0])})

    for index, expert in enumerate(net.experts):
        expert.register_forward_pre_hook(watch(index))
    chosen = net.choose(net.encode_image(pixels).router_logits)
    counts = {index: n for index, n in enumerate(chosen.bincount().tolist()) if n}
    assert seen == counts
    assert 1 < len(counts) < MODALITIES, "the test needs images of several experts, not of all"

    seen.clear()
    net.encode_image(pixels[:1])
    assert seen == {int(chosen[0]): 1}


@torch.no_grad()
def test_a_batch_gives_what_each_image_gives_alone() -> None:
    net, pixels = model(), images()
    together = net.encode_image(pixels)
    for row in range(len(pixels)):
        alone = net.encode_image(pixels[row : row + 1])
        for part, of_batch in zip(alone, together, strict=True):
            torch.testing.assert_close(part[0], of_batch[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_permuted_images_give_permuted_features() -> None:
    net, pixels = model(), images()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    for permuted, plain in zip(
        net.encode_image(pixels[order]), net.encode_image(pixels), strict=True
    ):
        torch.testing.assert_close(permuted, plain[order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_gate_weighs_the_expert() -> None:
    """A surer router changes no feature."""
    net, pixels = model(), images()
    before = net.encode_image(pixels)
    last = net.router[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(3)
    last.bias.mul_(3)
    after = net.encode_image(pixels)
    torch.testing.assert_close(after.router_logits, 3 * before.router_logits)
    assert torch.equal(after.regions, before.regions)


@torch.no_grad()
def test_the_shared_expert_serves_all_and_the_router_still_answers() -> None:
    net, pixels = model(shared_expert=True), images()
    assert len(net.experts) == 1
    features = net.encode_image(pixels)
    pyramid = net.vision(pixels)
    assert torch.equal(features.regions, net.experts[0](pyramid.scales))
    assert features.router_logits.shape == (len(pixels), MODALITIES)


@torch.no_grad()
def test_the_pooled_feature_is_the_mean_of_the_regions() -> None:
    features = model().encode_image(images(3))
    side = TINY.vision.grids[0]
    assert features.regions.shape == (3, side, side, TINY.size)
    torch.testing.assert_close(features.pooled, features.regions.flatten(1, 2).mean(1))


def train_step(net: ModalityMoE) -> ImageFeatures:
    features = net.encode_image(images(6))
    ids = torch.randint(0, 64, (6, 5), generator=torch.Generator().manual_seed(0))
    words = torch.tensor([-1, 0, 1, 2, -1]).expand(6, -1)
    texts = net.encode_text(ids, words, torch.ones(6, 5, dtype=torch.bool))
    same = torch.eye(6, dtype=torch.bool)
    losses(features, texts, same, torch.arange(6) % MODALITIES).total.backward()  # type: ignore[no-untyped-call]
    return features


def test_gradient_reaches_every_part_but_the_experts_that_did_not_run() -> None:
    net = model()
    ran = set(net.choose(train_step(net).router_logits).tolist())
    still = {
        name
        for name, parameter in net.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    # a softmax does not see what is added to all of its scores, nor attention a bias of the keys
    blind = {name for name in still if name.endswith(("attention_out.bias", "k.bias"))}
    idle = {name for name in still if name.startswith("experts.")} - blind
    assert {int(name.split(".")[1]) for name in idle} == set(range(MODALITIES)) - ran
    assert still - blind - idle == set()


def test_the_experts_get_no_gradient_from_the_router() -> None:
    net = model()
    features = net.encode_image(images(4))
    features.router_logits.sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in net.experts.parameters())
    assert net.vision.patch_embedding.weight.grad is not None


@pytest.mark.parametrize(("scale", "at"), [(0, (2, 5)), (1, (1, 2)), (2, (0, 1))])
def test_a_scales_cell_lies_over_its_own_regions(scale: int, at: tuple[int, int]) -> None:
    """One bright cell of one scale: the regions over it are the brightest, those afar are dark."""
    grids = (8, 4, 2)
    x = torch.zeros(1, grids[scale], grids[scale], 1)
    x[0, at[0], at[1]] = 1
    factor = 8 // grids[scale]
    enlarged = enlarge(x, 8)[0, :, :, 0]
    rows, columns = (slice(i * factor, (i + 1) * factor) for i in at)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[rows, columns] = True
    assert inside[enlarged == enlarged.max()].all()
    assert enlarged[inside].min() > enlarged[~inside].max()
    centre = torch.stack([(enlarged.sum(1 - axis) * torch.arange(8)).sum() for axis in (0, 1)])
    borders = any(i in (0, grids[scale] - 1) for i in at) and factor > 1
    if not borders:  # at a border the light is cut off
        expected = torch.tensor([(i + 0.5) * factor - 0.5 for i in at])
        torch.testing.assert_close(centre / enlarged.sum(), expected)


@torch.no_grad()
@pytest.mark.parametrize("at", [(4, 20), (24, 4), (12, 12), (0, 28)])
def test_a_bright_patch_changes_the_map_where_it_is(at: tuple[int, int]) -> None:
    """Through the whole model: the regions that change most, in pixels, are under the patch."""
    # weights as training begins with: attention mixes little yet, what is here stays here
    net = random_modality_model(TINY, seed=0)
    dark = images(1)
    bright = dark.clone()
    bright[:, :, at[0] : at[0] + 4, at[1] : at[1] + 4] = 3
    expert = torch.zeros(1, dtype=torch.long)
    regions = [net.regions(net.vision(pixels), expert) for pixels in (bright, dark)]
    difference = regions[0] - regions[1]
    grid = difference.norm(dim=-1)[:, None]
    pixels = torch.nn.functional.interpolate(grid, (32, 32), mode="bilinear")
    row, column = divmod(int(pixels.argmax()), 32)
    assert at[0] <= row < at[0] + 4
    assert at[1] <= column < at[1] + 4


def test_a_map_is_the_mean_cosine_of_words_and_regions() -> None:
    generator = torch.Generator().manual_seed(0)
    regions = torch.randn(2, 3, 3, 4, generator=generator).double()
    words = torch.randn(2, 5, 4, generator=generator).double()
    mask = torch.tensor([[True, True, False, False, False], [True, False, True, True, False]])
    words[0, 1] = 7 * regions[0, 2, 0]  # length does not matter
    words[0, 0] = regions[0, 2, 0]
    found = region_map(regions, words, mask)
    for image in range(2):
        for row in range(3):
            for column in range(3):
                region = regions[image, row, column]
                cosines = [
                    float(region @ word / region.norm() / word.norm())
                    for word in words[image][mask[image]]
                ]
                assert float(found[image, row, column]) == pytest.approx(
                    sum(cosines) / len(cosines)
                )
    assert divmod(int(found[0].argmax()), 3) == (2, 0)
    assert float(found[0, 2, 0]) == pytest.approx(1)


def test_the_sizes_are_the_papers() -> None:
    """37M parameters without the text tower, 1.23 GMAC of scale attention."""
    with torch.device("meta"):
        net = ModalityMoE(MODALITY_PRESETS["medmoe-swin-t"])
    count = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("text."))
    assert round(count / 1e6) == 36  # the paper rounds up, or counts a part we do not know of
    positions = sum(grid**2 for grid in net.config.vision.grids)
    assert round(positions * 768 * 384 / 1e9, 2) == 1.23


def test_nano_fits_its_bundle() -> None:
    with torch.device("meta"):
        net = ModalityMoE(MODALITY_PRESETS["modality-nano"])
    assert sum(parameter.numel() for parameter in net.parameters()) < 20e6
