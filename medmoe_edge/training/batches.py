"""Conversations to batches of pixels and packed text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from medmoe_edge.config import ModelConfig
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.training.augment import augment
from medmoe_edge.training.conversations import Conversation, vary_question
from medmoe_edge.training.loop import Loader
from medmoe_edge.training.packing import Packed, encode_turn, pack
from medmoe_edge.training.pictures import Listed, Pictures

UNKNOWN = -1  # modality index of an image whose modality no expert serves


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
    """Makes the batches of an epoch."""

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, modalities: Sequence[str], seed: int
    ) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.modalities = list(modalities)
        self.prefix = tokenizer.prefix_ids()
        self.pictures = Pictures(config.vision)

    def plain(self, conversations: Sequence[Conversation], size: int) -> Loader:
        """Every conversation in order, unchanged: for validation."""
        return DataLoader(
            Listed(conversations), size, collate_fn=lambda chosen: self.collate(chosen, None)
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
        return DataLoader(Listed(chosen), size, collate_fn=lambda items: self.collate(items, noise))

    def collate(self, items: Sequence[Conversation], noise: torch.Generator | None) -> Batch:
        """Pixels, packed text and modality indices of some conversations."""
        pixels = self.pictures.stack(item.image for item in items)
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

    def _modality(self, name: str | None) -> int:
        return self.modalities.index(name) if name in self.modalities else UNKNOWN


def _some_turns(
    conversation: Conversation, limit: int, order: random.Random
) -> tuple[tuple[str, str], ...]:
    chosen = order.sample(conversation.turns, min(limit, len(conversation.turns)))
    return tuple((vary_question(question, order), answer) for question, answer in chosen)
