"""The BERT encoder (https://arxiv.org/abs/1810.04805), read as MedMoE does: word by word."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from medmoe_edge.config_contrastive import SUMMED_LAYERS, BertConfig

NO_WORD = -1  # the word index of padding and of the marks around a text


class TextFeatures(NamedTuple):
    """`words` `[B, W, D]` with `mask` `[B, W]`, True where there is a word; `pooled` `[B, D]`."""

    words: Tensor
    mask: Tensor
    pooled: Tensor


class BertLayer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.out = nn.Linear(size, size)
        self.norm1 = nn.LayerNorm(size, config.norm_eps)
        self.fc1 = nn.Linear(size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, size)
        self.norm2 = nn.LayerNorm(size, config.norm_eps)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, D]` to the same; `mask` `[B, 1, 1, S]` is True for what may be seen."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dropout(self.out(mixed)))
        return self.norm2(  # type: ignore[no-any-return]
            x + self.dropout(self.fc2(gelu(self.fc1(x))))
        )


class BertTower(nn.Module):
    """Token ids `[B, S]` to hidden states and to word features."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads  # not visible in the shapes of the weights
        self.word_embedding = nn.Embedding(config.vocab_size, size)
        self.position_embedding = nn.Embedding(config.max_positions, size)
        self.type_embedding = nn.Embedding(2, size)  # a single text is all of type 0
        self.norm = nn.LayerNorm(size, config.norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))

    def forward(self, ids: Tensor, words: Tensor, seen: Tensor) -> TextFeatures:
        """The last layers' sum, word pieces summed into words; `pooled` is their mean.

        `words` `[B, S]` is each piece's word index, counted from 0, `NO_WORD` for padding and
        marks; `seen` `[B, S]` is False for padding only. As many words are returned as there are
        pieces. A text without words gives zeros.
        """
        pieces = torch.stack(self.hidden_states(ids, seen)[-SUMMED_LAYERS:]).sum(0)  # [B, S, D]
        belongs = words[:, None, :] == torch.arange(words.shape[1], device=words.device)[:, None]
        summed = belongs.to(pieces.dtype) @ pieces  # [B, W, S] @ [B, S, D]
        mask = belongs.any(-1)
        count = mask.sum(-1, keepdim=True).clamp_min(1)
        return TextFeatures(summed, mask, summed.sum(1) / count)

    def hidden_states(self, ids: Tensor, seen: Tensor) -> list[Tensor]:
        """The embeddings' and every layer's output, `[B, S, D]` each."""
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embedding(ids) + self.type_embedding.weight[0] + self.position_embedding(at)
        states = [self.norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1], seen[:, None, None, :]))
        return states
