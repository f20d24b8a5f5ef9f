"""One image, all its questions, one sequence.

A packed sequence is `prefix, image tokens, turn 1, turn 2, ...`. Every turn sees the prefix, the
image and itself, never another turn, and its positions continue from the image: the model computes
exactly what it would on separate sequences, but the image is processed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medmoe_edge.prompt import Tokenizer

IMAGE_ID = -200  # where an image token stands, as in the official code
IGNORED = -100  # a label that does not count
SHARED, PADDING = 0, -1  # segments: what every turn sees, and what nobody sees


@dataclass(frozen=True)
class Packed:
    """Text of a batch: `ids`, `positions`, `segments` and next-token `labels`, all `[B, S]`."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    labels: Tensor

    def mask(self) -> Tensor:
        """Visibility `[B, 1, S, S]`: causal, within the own turn or into the shared prefix."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(query.shape[1], key.shape[2], dtype=torch.bool, device=query.device)
        visible = ((key == query) | (key == SHARED)) & causal.tril()
        return visible[:, None]


Turn = tuple[list[int], list[int]]  # question ids, answer ids with the end token


def encode_turn(tokenizer: Tokenizer, question: str, answer: str, end: int) -> Turn:
    """Token ids of one turn."""
    return tokenizer.question_ids(question), [*tokenizer.answer_ids(answer), end]


def pack(prefix: list[int], image_tokens: int, batch: Sequence[Sequence[Turn]]) -> Packed:
    """Pack each image's turns behind the shared prefix and pad to the longest."""
    rows = [_pack_one(prefix, image_tokens, turns) for turns in batch]
    width = max(len(row) for row in rows)
    fill = (0, 0, PADDING, IGNORED)
    columns = torch.tensor([row + [fill] * (width - len(row)) for row in rows])  # [B, S, 4]
    ids, positions, segments, labels = columns.unbind(-1)
    return Packed(ids, positions, segments, labels)


def _pack_one(
    prefix: list[int], image_tokens: int, turns: Sequence[Turn]
) -> list[tuple[int, int, int, int]]:
    shared = [*prefix, *[IMAGE_ID] * image_tokens]
    row = [(token, place, SHARED, IGNORED) for place, token in enumerate(shared)]
    for segment, (question, answer) in enumerate(turns, start=1):
        tokens = question + answer[:-1]
        labels = [IGNORED] * (len(question) - 1) + answer  # each place predicts the next token
        row += [
            (token, len(shared) + place, segment, label)
            for place, (token, label) in enumerate(zip(tokens, labels, strict=True))
        ]
    return row
