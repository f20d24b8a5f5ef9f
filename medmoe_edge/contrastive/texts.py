"""The features of texts, each computed once by an engine."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from medmoe_edge.errors import InputError
from medmoe_edge.runtimes.contrastive import Floats, ModalityRuntime, TextFeatures

AT_ONCE = 64  # texts: the text tower takes the memory of its longest
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
        for start in range(0, len(missing), AT_ONCE):
            self._keep(missing[start : start + AT_ONCE])
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
