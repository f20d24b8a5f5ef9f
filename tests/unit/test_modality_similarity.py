"""Similarities in numpy are those of the torch reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmoe_edge.contrastive.features import local_similarity, region_map, similarity, unit
from medmoe_edge.models import contrastive as reference
from medmoe_edge.models.contrastive import ImageFeatures as TorchImages
from medmoe_edge.models.contrastive import TextFeatures as TorchTexts
from medmoe_edge.runtimes.contrastive import ImageFeatures, TextFeatures


def features(
    images: int, grid: int, size: int, lengths: list[int], scale: float, seed: int
) -> tuple[ImageFeatures, TextFeatures]:
    """Random features; the words of a text stand anywhere among its places."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return scale * generator.standard_normal(shape, np.float32)

    places = max(lengths) + int(generator.integers(0, 3))
    mask = np.zeros((len(lengths), places), np.bool_)
    for row, length in zip(mask, lengths, strict=True):
        row[generator.permutation(places)[:length]] = True
    regions = normal(images, grid, grid, size)
    words = normal(len(lengths), places, size) * mask[..., None]
    texts = TextFeatures(words, normal(len(lengths), size), mask)
    return ImageFeatures(regions, regions.mean((1, 2)), normal(images, 6)), texts


@settings(max_examples=60)
@given(
    images=st.integers(1, 3),
    grid=st.integers(1, 6),
    size=st.integers(1, 24),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
    seed=st.integers(0, 2**16),
)
def test_they_equal_the_torch_reference(
    images: int, grid: int, size: int, lengths: list[int], scale: float, seed: int
) -> None:
    pictures, texts = features(images, grid, size, lengths, scale, seed)
    torch_images = TorchImages(*map(torch.from_numpy, pictures))
    torch_texts = TorchTexts(*map(torch.from_numpy, (texts.words, texts.mask, texts.pooled)))
    expected = reference.similarity(torch_images, torch_texts).numpy()
    found = similarity(pictures, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    each = np.repeat(pictures.regions[:1], len(lengths), 0)
    maps = reference.region_map(torch.from_numpy(each), torch_texts.words, torch_texts.mask)
    for row, expected_map in enumerate(maps.numpy()):
        found_map = region_map(pictures.regions[0], texts.words[row], texts.mask[row])
        np.testing.assert_allclose(found_map, expected_map, atol=1e-5)


def test_large_features_do_not_overflow() -> None:
    pictures, texts = features(1, 4, 8, [1, 3], scale=300.0, seed=0)
    assert np.isfinite(local_similarity(pictures.regions[0], texts)).all()


def test_a_text_is_compared_alike_alone_and_among_others() -> None:
    pictures, texts = features(1, 5, 8, [2, 1, 4], scale=1.0, seed=1)
    together = similarity(pictures, texts)[0]
    for row, value in enumerate(together):
        alone = texts.some(slice(row, row + 1))
        assert similarity(pictures, alone)[0, 0] == pytest.approx(float(value), abs=1e-6)


def test_a_vector_of_zeros_has_no_direction() -> None:
    assert np.array_equal(unit(np.zeros((2, 3), np.float32)), np.zeros((2, 3)))
