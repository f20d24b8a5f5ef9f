"""The Swin transformer (https://arxiv.org/abs/2103.14030): a pyramid of image features.

Everything is batch first and channels last, `[B, h, w, C]`. Numerics are those of transformers'
`SwinModel`, the -100 that keeps a shifted window's parts apart included.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

from medmoe_edge.config_contrastive import SwinConfig

SEPARATE = -100.0  # added to the scores between what a shifted window must not mix


class Pyramid(NamedTuple):
    """`scales` `[B, h, w, C]` are what enters each stage, fine to coarse; `last` is the output.

    These are transformers' `hidden_states[0:-1]` and `last_hidden_state` `[B, h, w, C]`.
    """

    scales: tuple[Tensor, ...]
    last: Tensor


class WindowAttention(nn.Module):
    """Self-attention inside windows of `w * w` positions, with a learned bias per offset."""

    offsets: Tensor

    def __init__(self, size: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.out = nn.Linear(size, size)
        self.offset_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("offsets", _offsets(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[B * n, T, C]` to the same, T = w * w; `mask` `[n, T, T]` is added to the scores."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B * n, H, T, C / H]
            for linear in (self.q, self.k, self.v)
        )
        bias = self.offset_bias[self.offsets].permute(2, 0, 1)[None]  # [1, H, T, T]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwinBlock(nn.Module):
    """Pre-norm block; a shifted one rolls the grid by half a window before it attends."""

    mask: Tensor | None

    def __init__(self, config: SwinConfig, stage: int, shifted: bool) -> None:
        super().__init__()
        size, grid = config.channels[stage], config.grids[stage]
        self.window = config.window_size
        # one window sees the whole grid: there is nothing to shift
        self.shift = self.window // 2 if shifted and grid > self.window else 0
        self.padding = -grid % self.window
        mask = _shift_mask(grid + self.padding, self.window, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)
        self.norm1 = nn.LayerNorm(size, config.norm_eps)
        self.attention = WindowAttention(size, config.heads[stage], self.window)
        self.norm2 = nn.LayerNorm(size, config.norm_eps)
        self.fc1 = nn.Linear(size, config.mlp_ratio * size)
        self.fc2 = nn.Linear(config.mlp_ratio * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, h, w, C]` to the same."""
        x = x + self._attend(self.norm1(x))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor) -> Tensor:
        grid = x.shape[1]
        if self.padding:
            x = pad(x, (0, 0, 0, self.padding, 0, self.padding))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = self.attention(split_windows(x, self.window), self.mask)
        x = join_windows(windows, self.window, x.shape[1])
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :grid, :grid] if self.padding else x


class PatchMerging(nn.Module):
    """Halves the grid and doubles the channels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * size)
        self.reduction = nn.Linear(4 * size, 2 * size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, h, w, C]` to `[B, ceil(h / 2), ceil(w / 2), 2 C]`."""
        if x.shape[1] % 2:
            x = pad(x, (0, 0, 0, 1, 0, 1))
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, -1)))  # type: ignore[no-any-return]


class SwinTower(nn.Module):
    """Pixels `[B, 3, S, S]`, normalised as the configuration says, to a `Pyramid`."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.embed_size, config.patch_size, config.patch_size)
        self.patch_norm = nn.LayerNorm(config.embed_size)
        self.stages = nn.ModuleList(
            nn.ModuleList(SwinBlock(config, stage, block % 2 == 1) for block in range(depth))
            for stage, depth in enumerate(config.depths)
        )
        self.merges = nn.ModuleList(PatchMerging(size) for size in config.channels[:-1])
        self.norm = nn.LayerNorm(config.channels[-1], config.norm_eps)

    def forward(self, pixels: Tensor) -> Pyramid:
        """What every stage sees, and what the last one gives."""
        x = self.patch_norm(self.patch_embedding(pixels).permute(0, 2, 3, 1))  # [B, h, w, C]
        scales = [x]
        for index, blocks in enumerate(self.stages):
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x)
            if index < len(self.merges):
                x = self.merges[index](x)
                scales.append(x)
        return Pyramid(tuple(scales), self.norm(x))


def split_windows(x: Tensor, window: int) -> Tensor:
    """`[B, h, w, C]` to `[B * n, window * window, C]`, the windows of an image in reading order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def join_windows(windows: Tensor, window: int, grid: int) -> Tensor:
    """The inverse of `split_windows` for a square grid: `[B, grid, grid, C]`."""
    side, channels = grid // window, windows.shape[-1]
    x = windows.reshape(-1, side, side, window, window, channels)
    return x.transpose(2, 3).reshape(-1, grid, grid, channels)


def _offsets(window: int) -> Tensor:
    """For each pair of positions in a window, the row of their offset's bias: `[T, T]`."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down, right = rows[:, None] - rows, columns[:, None] - columns
    return (down + window - 1) * (2 * window - 1) + right + window - 1


def _shift_mask(grid: int, window: int, shift: int) -> Tensor:
    """`[n, T, T]`: rolling brings opposite edges into one window; they must not see each other."""
    at = torch.arange(grid)
    part = (at >= grid - window).int() + (at >= grid - shift).int()
    parts = split_windows((3 * part[:, None] + part)[None, :, :, None], window)[..., 0]  # [n, T]
    return torch.where(parts[:, :, None] == parts[:, None, :], 0.0, SEPARATE)
