"""How well texts fit images, without torch: what `models.modality_similarity` computes.

Source: GLoRIA (ICCV 2021), whose word-to-region attention is that of AttnGAN
(https://arxiv.org/abs/1711.10485, equations 7 to 10).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.runtimes.contrastive import Floats, ImageFeatures, TextFeatures

ATTENTION_TEMPERATURE = 4.0  # sharpens which regions a word attends to
WORD_TEMPERATURE = 5.0  # between the mean (0) and the maximum over words
TINY = 1e-12  # the least length that is divided by, as in torch.nn.functional.normalize


def similarity(images: ImageFeatures, texts: TextFeatures) -> Floats:
    """`[I, T]`, each -1 to 1: the mean of the global and the local similarity."""
    whole = unit(images.pooled) @ unit(texts.pooled).T
    local = np.stack([local_similarity(regions, texts) for regions in images.regions])
    found: Floats = (whole + local) * np.float32(0.5)
    return found


def local_similarity(regions: Floats, texts: TextFeatures) -> Floats:
    """`[T]` of one image's regions `[h, w, D]`.

    Each region is shared out over the words of a text (softmax), each word gathers the regions
    that fall to it (softmax over regions, temperature 4), and the cosines of words and what they
    gathered give a smooth maximum: `log(mean_w exp(5 cos_w)) / 5`. Every text needs a word.
    """
    flat = regions.reshape(-1, regions.shape[-1])  # [R, D]
    words = texts.words[texts.mask]  # [M, D], all words of all texts
    lengths = texts.mask.sum(-1)
    starts = np.cumsum(lengths) - lengths
    shares = words @ flat.T  # [M, R]
    shares -= np.repeat(np.maximum.reduceat(shares, starts), lengths, axis=0)
    np.exp(shares, out=shares)
    shares /= np.repeat(np.add.reduceat(shares, starts), lengths, axis=0)
    np.exp(ATTENTION_TEMPERATURE * shares, out=shares)  # no more than exp(4): safe without shift
    gathered = shares @ flat / shares.sum(-1, keepdims=True)  # [M, D]
    cosines = (unit(gathered) * unit(words)).sum(-1)  # [M]
    means = np.add.reduceat(np.exp(WORD_TEMPERATURE * cosines), starts) / lengths
    found: Floats = (np.log(means) / WORD_TEMPERATURE).astype(np.float32)
    return found


def region_map(regions: Floats, words: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Where a text's words are: `[h, w]`, -1 to 1, of regions `[h, w, D]` and words `[W, D]`.

    The mean over words of the cosine of word and region.
    """
    found: Floats = (unit(regions) @ unit(words[mask]).T).mean(-1)
    return found


def unit(vectors: npt.NDArray[Any]) -> Floats:
    """The vectors along the last axis at length 1; a vector of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: Floats = vectors / np.maximum(lengths, TINY)
    return found
