"""A checkpoint of MedMoE in PyTorch: the reference that bundles are held against."""

from collections.abc import Sequence

import torch

from medmoe_edge._types import Floats
from medmoe_edge.models.contrastive import ModalityMoE
from medmoe_edge.runtimes.contrastive import ImageFeatures, TextFeatures, TextReader


class ModalityTorchRuntime:
    """On the CPU in fp32."""

    name = "torch"

    def __init__(self, model: ModalityMoE, reader: TextReader) -> None:
        self.model, self.config, self._reader = model, model.config, reader

    @torch.inference_mode()
    def encode_images(self, pixels: Floats) -> ImageFeatures:
        """Normalised pixels `[B, 3, S, S]` to features; of each image only its own expert runs."""
        found = self.model.encode_image(torch.from_numpy(pixels))
        return ImageFeatures(*(part.numpy() for part in found))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Features of each text; raises `InputError` for a text without a word."""
        found = self.model.encode_text(*map(torch.from_numpy, self._reader.encode(texts)))
        return TextFeatures(found.words.numpy(), found.pooled.numpy(), found.mask.numpy())
