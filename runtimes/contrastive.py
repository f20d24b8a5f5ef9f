"""What a runtime of MedMoE does, and that of ONNX Runtime: images and texts to features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import ModalityBundle
from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.runtimes.ort.runtime import EarlySessions, open_session, session_options

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

    def check_whole(self, texts: Sequence[str]) -> None:
        """Raise `InputError` for a text of which only the beginning would be read."""


class ModalityRuntime(Protocol):
    """A loaded MedMoE. Not thread-safe: one image at a time."""

    name: str
    config: ModalityConfig

    def encode_images(self, pixels: Floats) -> ImageFeatures:
        """Normalised pixels `[B, 3, S, S]` to features; of each image only its own expert runs."""

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Features of each text; raises `InputError` for a text without a word."""

    def check_whole(self, texts: Sequence[str]) -> None:
        """Raise `InputError` for a text of which only the beginning would be read."""


IMAGE, TEXT = "image.onnx", "text.onnx"
ROUTER_BIAS = "router.2.bias"
FORCE = 1e4  # a bias beside which no logit counts


class ModalityOrtRuntime:
    """Runs a bundle's graphs on the CPU; they are opened in the background from the start."""

    name = "onnxruntime"

    def __init__(self, bundle: ModalityBundle, reader: TextReader) -> None:
        self.config, self._reader = bundle.config, reader
        self.check_whole = reader.check_whole
        self._sessions = EarlySessions({bundle.path(name): _options() for name in (IMAGE, TEXT)})

    def encode_images(self, pixels: Floats) -> ImageFeatures:
        """Normalised pixels `[B, 3, S, S]` to features.

        One image after the other, each with its own expert: the graph is for one.
        """
        return _run(self._sessions[IMAGE], pixels)

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Features of each text; raises `InputError` for a text without a word."""
        ids, words, seen = self._reader.encode(texts)
        outputs = ["word_features", "pooled", "mask"]
        given = {"ids": ids, "words": words, "seen": seen}
        return TextFeatures(*map(np.asarray, self._sessions[TEXT].run(outputs, given)))


def run_expert(bundle: ModalityBundle, expert: int, pixels: Floats) -> ImageFeatures:
    """Features of images by an expert of one's choice: of the router, only a bias is left."""
    bias = np.zeros(len(bundle.config.modalities), np.float32)
    bias[expert] = FORCE
    return run_replaced(bundle, {ROUTER_BIAS: bias})(pixels)


def run_replaced(
    bundle: ModalityBundle, replaced: Mapping[str, npt.NDArray[Any]]
) -> Callable[[Floats], ImageFeatures]:
    """Makes features of images with some of the bundle's weights exchanged for others.

    They are of the same shapes and types as those of the bundle that have their names.
    """
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in replaced.items()}
    options = _options()
    for name, value in values.items():
        options.add_initializer(name, value)
    session = open_session(bundle.path(IMAGE), options)

    def run(pixels: Floats) -> ImageFeatures:
        assert values.keys() == replaced.keys()  # kept alive: the session borrows them
        return _run(session, pixels)

    return run


def _run(session: ort.InferenceSession, pixels: Floats) -> ImageFeatures:
    names = list(ImageFeatures._fields)
    found = [session.run(names, {"pixels": one[None]}) for one in pixels]
    return ImageFeatures(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _options() -> ort.SessionOptions:
    """Measured at Swin-T's size on two cores.

    Memory is kept: mapping features of 10 MB each anew makes an image take 219 ms, not 87. And
    threads sleep at once: spinning, they and those of NumPy, which compares, keep each other from
    running (`classify` takes 182 ms, not 133).
    """
    options = session_options()
    options.enable_cpu_mem_arena = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
