"""Multi-head attention with partial rotary positions and a preallocated KV cache."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from medmoe_edge.config import DecoderConfig


class KVCache:
    """Keys and values of every layer, `[B, H, capacity, head_size]`, filled from the front."""

    def __init__(self, config: DecoderConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (config.layers, batch, config.heads, capacity, config.head_size)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write `[B, H, S, head_size]` after what is there; return all of it for this layer.

        `length` moves only when the whole model has run, so every layer writes at one place.
        """
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rotary_tables(config: DecoderConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, 1, S, rotary_size / 2]` in fp32 for integer `positions` `[B, S]`.

    Rotary position embedding, https://arxiv.org/abs/2104.09864, on the first channels of a head.
    """
    exponents = torch.arange(0, config.rotary_size, 2, device=positions.device).float()
    frequencies = config.rope_theta ** (-exponents / config.rotary_size)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first channels of `[B, H, S, head_size]`, half-split (GPT-NeoX) pairing."""
    cos, sin = (table.to(x.dtype) for table in tables)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Attention(nn.Module):
    """Causal self-attention; q, k and v have biases, `out` has one for Phi only."""

    def __init__(self, config: DecoderConfig, layer: int, out_bias: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.layer = config.heads, layer
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.out = nn.Linear(size, size, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: KVCache | None,
    ) -> Tensor:
        """`[B, S, D]` to `[B, S, D]`; `mask` `[B or 1, 1, S, past + S]` is True where visible."""
        q, k, v = (self._split(linear(x)) for linear in (self.q, self.k, self.v))
        q, k = rotate(q, tables), rotate(k, tables)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, S, head_size]
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


def causal_mask(queries: int, past: int, device: torch.device) -> Tensor:
    """`[1, 1, queries, past + queries]`: every query sees the past and itself."""
    ones = torch.ones(queries, past + queries, dtype=torch.bool, device=device)
    return ones.tril(past)[None, None]
