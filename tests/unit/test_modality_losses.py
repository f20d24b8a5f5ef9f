"""Similarities and losses of MedMoE against loops over every image, text, word and region."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medmoe_edge.models.contrastive import (
    UNLABELLED,
    ImageFeatures,
    Losses,
    TextFeatures,
    contrastive_loss,
    global_similarity,
    local_similarity,
    losses,
    similarity,
)
from medmoe_edge.models.contrastive import router_loss as router


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / float(a.norm()) / float(b.norm())


def exp_shares(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def local_by_hand(regions: list[Tensor], words: list[Tensor]) -> float:
    """AttnGAN's equations 7 to 10, one number at a time; the mean over words."""
    shares = [exp_shares([float(region @ word) for word in words]) for region in regions]
    total = 0.0
    for j, word in enumerate(words):
        attention = exp_shares([4 * share[j] for share in shares])
        gathered = torch.zeros_like(word)
        for weight, region in zip(attention, regions, strict=True):
            gathered += weight * region
        total += math.exp(5 * cosine(gathered, word))
    return math.log(total / len(words)) / 5


def cross_entropy_by_hand(logits: list[float], targets: list[float]) -> float:
    shares = exp_shares(logits)
    return -sum(target * math.log(p) for target, p in zip(targets, shares, strict=True))


def contrastive_by_hand(similarities: Tensor, same: Tensor) -> float:
    loss = 0.0
    for table, fits in ((similarities, same), (similarities.T, same.T)):
        for row, fit in zip(table.tolist(), fits.tolist(), strict=True):
            targets = [float(f) / sum(fit) for f in fit]
            loss += cross_entropy_by_hand([10 * value for value in row], targets) / len(table)
    return loss


def features(
    seed: int, lengths: list[int], side: int = 3, size: int = 4
) -> tuple[ImageFeatures, TextFeatures]:
    """As many images as texts, in float64; the words behind a text's end are not zero."""
    g = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), max(lengths) + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    images = ImageFeatures(normal(count, side, side, size), normal(count, size), normal(count, 6))
    return images, TextFeatures(normal(count, longest, size), mask, normal(count, size))


@given(st.integers(0, 1000), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_similarities_are_those_of_a_loop(seed: int, lengths: list[int]) -> None:
    images, texts = features(seed, lengths)
    local = local_similarity(images.regions, texts.words, texts.mask)
    both = similarity(images, texts)
    assert both.shape == (len(lengths), len(lengths))
    for i in range(len(lengths)):
        for t in range(len(lengths)):
            words = list(texts.words[t][texts.mask[t]])
            by_hand = local_by_hand(list(images.regions[i].flatten(0, 1)), words)
            assert float(local[i, t]) == pytest.approx(by_hand, abs=1e-9)
            whole = cosine(images.pooled[i], texts.pooled[t])
            assert float(both[i, t]) == pytest.approx((whole + by_hand) / 2, abs=1e-9)
            assert -1 <= float(both[i, t]) <= 1


@given(st.integers(0, 1000), st.integers(1, 5), st.booleans())
def test_the_contrastive_loss_is_that_of_a_loop(seed: int, count: int, equal_texts: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    similarities = torch.rand(count, count, generator=g, dtype=torch.float64) * 2 - 1
    texts = torch.randint(0, 2 if equal_texts else 10**9, (count,), generator=g)
    same = texts[:, None] == texts
    by_hand = contrastive_by_hand(similarities, same)
    assert float(contrastive_loss(similarities, same)) == pytest.approx(by_hand, rel=1e-5, abs=1e-6)


def test_the_total_weighs_its_parts() -> None:
    images, texts = features(1, [2, 1, 4])
    same = torch.eye(3, dtype=torch.bool)
    modality = torch.tensor([5, UNLABELLED, 0])
    found = losses(images, texts, same, modality)
    local = local_similarity(images.regions, texts.words, texts.mask)
    whole = global_similarity(images.pooled, texts.pooled)
    logits = images.router_logits.tolist()
    routed = [
        cross_entropy_by_hand(logits[row], [float(i == label) for i in range(6)])
        for row, label in ((0, 5), (2, 0))
    ]
    parts = (
        contrastive_by_hand(whole, same),
        contrastive_by_hand(local, same),
        sum(routed) / 2,
    )
    for part, by_hand in zip(found, parts, strict=True):
        assert float(part) == pytest.approx(by_hand, rel=1e-5)
    assert float(Losses(*map(torch.tensor, (1.0, 10.0, 100.0))).total) == 205.5
    assert float(found.total) == pytest.approx(
        0.5 * parts[0] + 0.5 * parts[1] + 2 * parts[2], rel=1e-5
    )


def test_a_batch_without_known_modalities_has_no_router_loss() -> None:
    logits = torch.randn(3, 6, requires_grad=True)
    loss = router(logits, torch.full((3,), UNLABELLED))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_aligned_pairs_cost_less_than_shuffled_ones() -> None:
    images, texts = features(0, [2, 3, 1])
    # each image shows its own text's words in a row of regions
    regions = torch.zeros_like(images.regions)
    for row in range(3):
        regions[row, 0] = texts.words[row, 0]
    aligned = images._replace(regions=regions, pooled=texts.pooled)
    same, unknown = torch.eye(3, dtype=torch.bool), torch.full((3,), UNLABELLED)
    right = losses(aligned, texts, same, unknown)
    wrong = losses(aligned, texts, same.roll(1, 0), unknown)
    assert right.whole < wrong.whole
    assert right.local < wrong.local


def test_the_order_of_words_and_regions_does_not_matter() -> None:
    images, texts = features(4, [3, 3])
    plain = local_similarity(images.regions, texts.words, texts.mask)
    turned = local_similarity(
        images.regions.transpose(1, 2).flip(1), texts.words.flip(1), texts.mask.flip(1)
    )
    torch.testing.assert_close(turned, plain)


def test_a_long_text_is_not_favoured() -> None:
    """Saying a word twice says no more."""
    images, texts = features(5, [1])
    twice = texts.words[:, [0, 0]]
    once = local_similarity(images.regions, texts.words, texts.mask)
    # shares fall to a half everywhere: attention is even in both cases
    doubled = local_similarity(images.regions, twice, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(doubled, once)
