"""What a runtime of MedMoE does: images and texts to features that can be compared."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.config_contrastive import ModalityConfig

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class ImageFeatures(NamedTuple):
    """`regions` `[B, h, w, D]` on the finest grid, `pooled` `[B, D]`, `router_logits` `[B, E]`."""

    regions: Floats
    pooled: Floats
    router_logits: Floats


class TextFeatures(NamedTuple):
    """`words` `[T, W, D]` with `mask` `[T, W]`, True where there is a word; `pooled` `[T, D]`."""

    words: Floats
    pooled: Floats
    mask: Mask

    def some(self, rows: slice) -> "TextFeatures":
        """Those of some of the texts."""
        return TextFeatures(self.words[rows], self.pooled[rows], self.mask[rows])


class TextReader(Protocol):
    """Texts to what the text tower reads; see `medmoe_edge.contrastive.text`."""

    def encode(self, texts: Sequence[str]) -> tuple[Ints, Ints, Mask]:
        """Piece ids `[T, P]`, the word of each piece `[T, P]`, and which are no padding `[T, P]`.

        Raises `InputError` for a text without a word.
        """


class ModalityRuntime(Protocol):
    """A loaded MedMoE. Not thread-safe: one image at a time."""

    name: str
    config: ModalityConfig

    def encode_images(self, pixels: Floats) -> ImageFeatures:
        """Normalised pixels `[B, 3, S, S]` to features; of each image only its own expert runs."""

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Features of each text; raises `InputError` for a text without a word."""
