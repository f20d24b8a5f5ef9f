"""Features of texts and images, how well they fit, and what is said of an image; without torch.

It computes what `models/contrastive.py` defines. Source: GLoRIA (ICCV 2021), whose word-to-region
attention is that of AttnGAN (https://arxiv.org/abs/1711.10485, equations 7 to 10). An engine
computes the features of a text once; images are held against the same texts some at a time, for
their regions are too large to keep.

The router's logits `[N, E]` also tell how sure it is of the modality, and how much of any it saw.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import InputError, Notice, Told
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.runtimes.base import log_softmax
from medmoe_edge.runtimes.contrastive import ImageFeatures, ModalityRuntime, TextFeatures


@dataclasses.dataclass(frozen=True)
class _Result(Told):
    """`timings` are seconds: `image` to read and prepare, `vision` tower and expert, `text` and
    `compare`, as far as each was needed, and `total`. `model` says by `name` and `sha256` what
    answered, by `runtime` what ran it, and under `verification` and `verified` what is known of
    its fidelity, as of an `Answer`. `warnings` are what should be known of the image before the
    result is used.
    """

    timings: dict[str, float]
    model: dict[str, Any]
    notice: str = dataclasses.field(default=NOTICE, kw_only=True)
    warnings: tuple[Notice, ...] = dataclasses.field(default=(), kw_only=True)


@dataclasses.dataclass(frozen=True)
class Reading(_Result):
    """The router's view: `probabilities` by modality, the most probable first, 0 to 1.

    `entropy` of those in nats, from 0 where it is sure to log(E). `unfamiliar`: it is less sure, or
    saw less of any modality, than with images of known ones; nothing said may be believed.
    """

    modality: str
    probabilities: dict[str, float]
    entropy: float
    unfamiliar: bool


@dataclasses.dataclass(frozen=True)
class Classification(_Result):
    """`scores` by label, the best first: calibrated probabilities, given that one label is right.

    They sum to 1, so that the score of a label without rivals says nothing; `similarities`, -1 to
    1 in the same order, compare each label with the image alone.
    """

    scores: dict[str, float]
    similarities: dict[str, float]
    reading: Reading


@dataclasses.dataclass(frozen=True)
class Location(_Result):
    """Where a phrase lies: `heat` `[H, W]` over the picture as shown, -1 to 1.

    `peak` is the pixel (x, y) where it is hottest; `similarity`, -1 to 1, is of the phrase and the
    whole image. A phrase that is not in the image has a hottest place too.
    """

    phrase: str
    heat: Floats
    peak: tuple[int, int]
    similarity: float
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object; of the heat its size alone."""
        values = super().to_json()
        height, width = values.pop("heat").shape
        return values | {"size": [width, height]}


Logits = npt.NDArray[np.floating[Any]]
PerImage = npt.NDArray[np.float64]  # [N]


def entropy(logits: Logits) -> PerImage:
    """Of the probabilities, in nats: from 0 where one modality is certain to log(E)."""
    logs = log_softmax(logits)
    found: PerImage = -(np.exp(logs) * logs).sum(-1)
    return np.maximum(found, 0.0)


def evidence(logits: Logits) -> PerImage:
    """Log of the sum of their exponentials: small where an image looks like no modality at all.

    Probabilities hide it, since they sum to 1 whatever was seen. It is the negative free energy of
    Liu et al. 2020, https://arxiv.org/abs/2010.03759.
    """
    return _log_sum_exp(logits.astype(np.float64))


def _log_sum_exp(logits: npt.NDArray[np.float64]) -> PerImage:
    largest = logits.max(-1, keepdims=True)
    found: PerImage = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
    return found


ATTENTION_TEMPERATURE = 4.0  # sharpens which regions a word attends to
WORD_TEMPERATURE = 5.0  # between the mean (0) and the maximum over words
TINY = 1e-12  # the least length that is divided by, as in torch.nn.functional.normalize


def similarity(images: ImageFeatures, texts: TextFeatures, *, as_published: bool = False) -> Floats:
    """`[I, T]`, each -1 to 1: the mean of the global and the local similarity.

    `as_published` as of `local_similarity`, which then may be larger.
    """
    whole = unit(images.pooled) @ unit(texts.pooled).T
    local = np.stack(
        [local_similarity(regions, texts, as_published=as_published) for regions in images.regions]
    )
    found: Floats = (whole + local) * np.float32(0.5)
    return found


def local_similarity(regions: Floats, texts: TextFeatures, *, as_published: bool = False) -> Floats:
    """`[T]` of one image's regions `[h, w, D]`.

    Each region is shared out over the words of a text (softmax), each word gathers the regions
    that fall to it (softmax over regions, temperature 4), and the cosines of words and what they
    gathered give a smooth maximum: `log(mean_w exp(5 cos_w)) / 5`. Every text needs a word.
    As the authors' code and GLoRIA have it, it is `log(sum_w exp(5 cos_w))`.
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
    sums = np.add.reduceat(np.exp(WORD_TEMPERATURE * cosines), starts)
    if as_published:
        return np.asarray(np.log(sums), np.float32)
    means = sums / lengths
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


TEXTS_AT_ONCE = 64  # texts: the text tower takes the memory of its longest
KEPT = 4096  # texts: some 20 kB each of a large model
MAX_TEXTS = 10_000


class TextCache:
    """Encodes texts; those used last are kept."""

    def __init__(self, runtime: ModalityRuntime) -> None:
        self._runtime = runtime
        self._kept: OrderedDict[str, tuple[Floats, Floats]] = OrderedDict()  # words, pooled

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Features of one or more texts.

        Raises `InputError` for too many, or for one without a word that the model knows.
        """
        wanted = list(dict.fromkeys(texts))
        if len(wanted) > MAX_TEXTS:
            raise InputError(f"{len(wanted):,} texts are given.", f"Give at most {MAX_TEXTS:,}.")
        missing = sorted((text for text in wanted if text not in self._kept), key=len)
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            self._keep(missing[start : start + TEXTS_AT_ONCE])
        found = [self._kept[text] for text in texts]
        for text in wanted:
            self._kept.move_to_end(text)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return _padded([words for words, _ in found], [pooled for _, pooled in found])

    def _keep(self, texts: list[str]) -> None:
        features = self._runtime.encode_texts(texts)
        for row, text in enumerate(texts):
            self._kept[text] = features.words[row][features.mask[row]], features.pooled[row]


def _padded(words: list[Floats], pooled: list[Floats]) -> TextFeatures:
    longest = max(len(text) for text in words)
    mask = np.arange(longest) < np.array([[len(text)] for text in words])
    together = np.zeros((*mask.shape, words[0].shape[-1]), np.float32)
    together[mask] = np.concatenate(words)
    return TextFeatures(together, np.stack(pooled), mask)


IMAGES_AT_ONCE = 8


Done = Callable[[int, int], None]  # how many of how many


class Compared(NamedTuple):
    """`similarities` `[N, T]` of images and texts, and `router_logits` `[N, E]`."""

    similarities: Floats
    router_logits: Floats


def compare(
    runtime: ModalityRuntime,
    images: Sequence[Path],
    texts: Sequence[str],
    done: Done = lambda *_: None,
) -> Compared:
    """Every image with every text; `done` hears how many of the images have been looked at."""
    read = TextCache(runtime).encode(texts)
    similarities, logits = [], []
    for start in range(0, len(images), IMAGES_AT_ONCE):
        chosen = images[start : start + IMAGES_AT_ONCE]
        pixels = [preprocess(load_image(path), runtime.config.vision) for path in chosen]
        seen = runtime.encode_images(np.concatenate(pixels))
        similarities.append(similarity(seen, read, as_published=runtime.config.as_published))
        logits.append(seen.router_logits)
        done(start + len(chosen), len(images))
    return Compared(np.concatenate(similarities), np.concatenate(logits))
