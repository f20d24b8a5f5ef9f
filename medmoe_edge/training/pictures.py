"""What the batches of both models are made from: a list of items, and their pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medmoe_edge.config import VisionConfig
from medmoe_edge.config_contrastive import SwinConfig
from medmoe_edge.image.loading import load_image, preprocess

Item = TypeVar("Item")


class Pictures:
    """Images as a tower's input; decoded ones are kept, so an epoch reads no file twice."""

    def __init__(self, vision: VisionConfig | SwinConfig) -> None:
        self.vision = vision
        self._pixels: dict[Path, Tensor] = {}

    def stack(self, paths: Iterable[Path]) -> Tensor:
        """Normalised pixels `[B, 3, S, S]`."""
        return torch.stack([self._load(path) for path in paths]).float()

    def _load(self, path: Path) -> Tensor:
        if path not in self._pixels:
            pixels = preprocess(load_image(path), self.vision)
            self._pixels[path] = torch.from_numpy(pixels[0]).half()
        return self._pixels[path]


class Listed(Dataset[Item]):
    """A list, as torch's loader wants it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]
