"""Conversations to batches of pixels and packed text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medmoe_edge.config import ModelConfig
from medmoe_edge.image import load_image, preprocess
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.training.augment import augment
from medmoe_edge.training.conversations import Conversation, vary_question
from medmoe_edge.training.packing import Packed, encode_turn, pack

UNKNOWN = -1  # modality index of an image whose modality no expert serves

Loader = DataLoader[Conversation]  # as torch names it, by its items; it yields `Batch`


@dataclass(frozen=True)
class Batch:
    """`pixels` `[B, 3, S, S]`, the packed text, and each image's modality index `[B]`."""

    pixels: Tensor
    text: Packed
    modality: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        text = Packed(*(tensor.to(device) for tensor in vars(self.text).values()))
        return Batch(self.pixels.to(device), text, self.modality.to(device))


class Batches:
    """Makes the batches of an epoch; decoded images are kept, so an epoch reads no file twice."""

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, modalities: Sequence[str], seed: int
    ) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.modalities = list(modalities)
        self.prefix = tokenizer.prefix_ids()
        self._pixels: dict[Path, Tensor] = {}

    def plain(self, conversations: Sequence[Conversation], size: int) -> Loader:
        """Every conversation in order, unchanged: for validation."""
        return DataLoader(
            _Listed(conversations), size, collate_fn=lambda chosen: self.collate(chosen, None)
        )

    def shuffled(
        self, conversations: Sequence[Conversation], size: int, max_turns: int, epoch: int
    ) -> Loader:
        """An epoch for training: shuffled, augmented, at most `max_turns` turns an image.

        The same seed and epoch give the same batches, so a resumed run repeats an unbroken one.
        """
        order = random.Random(f"{self.seed} {epoch}")
        chosen = [
            replace(conversation, turns=_some_turns(conversation, max_turns, order))
            for conversation in order.sample(conversations, len(conversations))
        ]
        noise = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        return DataLoader(
            _Listed(chosen), size, collate_fn=lambda items: self.collate(items, noise)
        )

    def collate(self, items: Sequence[Conversation], noise: torch.Generator | None) -> Batch:
        """Pixels, packed text and modality indices of some conversations."""
        pixels = torch.stack([self._load(item.image) for item in items]).float()
        if noise is not None:
            pixels = augment(pixels, noise)
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        end = self.config.decoder.eos_token_id
        turns = [
            [encode_turn(self.tokenizer, question, answer, end) for question, answer in item.turns]
            for item in items
        ]
        text = pack(self.prefix, self.config.vision.image_tokens, turns)
        modality = torch.tensor([self._modality(item.modality) for item in items])
        return Batch(pixels, text, modality)

    def _load(self, path: Path) -> Tensor:
        if path not in self._pixels:
            pixels = preprocess(load_image(path), self.config.vision)
            self._pixels[path] = torch.from_numpy(pixels[0]).half()
        return self._pixels[path]

    def _modality(self, name: str | None) -> int:
        return self.modalities.index(name) if name in self.modalities else UNKNOWN


class _Listed(Dataset[Conversation]):
    def __init__(self, items: Sequence[Conversation]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Conversation:
        return self.items[index]


def _some_turns(
    conversation: Conversation, limit: int, order: random.Random
) -> tuple[tuple[str, str], ...]:
    chosen = order.sample(conversation.turns, min(limit, len(conversation.turns)))
    return tuple((vary_question(question, order), answer) for question, answer in chosen)
