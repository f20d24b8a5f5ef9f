"""How well texts fit images: as a whole, word by word, and where.

Source: GLoRIA (ICCV 2021), whose word-to-region attention is that of AttnGAN
(https://arxiv.org/abs/1711.10485, equations 7 to 10).
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, normalize

from medmoe_edge.models.bert import TextFeatures
from medmoe_edge.models.contrastive import ImageFeatures

ATTENTION_TEMPERATURE = 4.0  # sharpens which regions a word attends to
WORD_TEMPERATURE = 5.0  # between the mean (0) and the maximum over words
CONTRAST_TEMPERATURE = 10.0  # from similarities to logits


def similarity(images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """`[I, T]`, each -1 to 1: the mean of the global and the local similarity."""
    whole = global_similarity(images.pooled, texts.pooled)
    return (whole + local_similarity(images.regions, texts.words, texts.mask)) / 2


def global_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines `[I, T]` of pooled features `[I, D]` and `[T, D]`."""
    return normalize(images, dim=-1) @ normalize(texts, dim=-1).T


def local_similarity(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """`[I, T]` from regions `[I, h, w, D]` and words `[T, W, D]` with their mask `[T, W]`.

    Each region is shared out over the words of a text (softmax), each word gathers the regions
    that fall to it (softmax over regions, temperature 4), and the cosines of words and what they
    gathered give a smooth maximum: `log(mean_w exp(5 cos_w)) / 5`. The mean, where GLoRIA sums:
    a sum favours long texts. Every text needs a word.
    """
    regions = regions.flatten(1, 2)  # [I, R, D]
    lengths = mask.sum(-1).tolist()
    flat = words[mask]  # [M, D], all words of all texts
    scores = regions @ flat.T  # [I, R, M]
    shares = torch.cat([part.softmax(-1) for part in torch.split(scores, lengths, -1)], -1)
    attention = (ATTENTION_TEMPERATURE * shares).softmax(1)
    gathered = attention.transpose(1, 2) @ regions  # [I, M, D]
    cosines = cosine_similarity(gathered, flat, dim=-1)  # [I, M]
    powers = torch.split((WORD_TEMPERATURE * cosines).exp(), lengths, -1)
    return torch.stack([part.mean(-1) for part in powers], -1).log() / WORD_TEMPERATURE


def region_map(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Where a text's words are: `[B, h, w]`, -1 to 1, from `[B, h, w, D]` and `[B, W, D]`.

    The mean over words of the cosine of word and region. Not the attention of
    `local_similarity`: where a text is a single word, that is the same everywhere.
    """
    cosines = torch.einsum("bhwd,bnd->bhwn", normalize(regions, dim=-1), normalize(words, dim=-1))
    weights = mask / mask.sum(-1, keepdim=True)  # [B, W]
    return torch.einsum("bhwn,bn->bhw", cosines, weights.to(cosines.dtype))


def to_pixels(grid: Tensor, size: int) -> Tensor:
    """A map `[B, h, w]` over the square image that was looked at: `[B, size, size]`, bilinear."""
    enlarged = interpolate(grid[:, None], (size, size), mode="bilinear", align_corners=False)
    return enlarged[:, 0]
