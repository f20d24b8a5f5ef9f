"""Multi-head attention with partial rotary positions and a preallocated KV cache.

The mixture of experts: domain experts chosen by a router, and a meta expert that always runs.

The decoders of Med-MoE: embeddings, a stack of layers, a norm and a head.

Phi-2 has parallel blocks and a biased GELU feed-forward; StableLM-2 has sequential blocks,
LayerNorm with bias and SwiGLU. Qwen-1.8B has StableLM's blocks with RMSNorm; its dynamic NTK
and logn attention begin behind the trained length, which is where its positions end here.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from medmoe_edge.config import DecoderConfig, ModelConfig, MoEConfig


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


def route(logits: Tensor, top_k: int, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Choose experts from router logits `[T, E]`: weights and indices, both `[T, K]`.

    Where experts were left out, `rows` are the router's rows of the others: probabilities are over
    all rows, so that an expert that the whole model chooses counts what it counts there.

    k = 1 weighs with the un-renormalised probability; k = 2 renormalises over the two chosen.
    """
    probabilities, scores = logits.float().softmax(-1), logits.float()
    if rows is not None:
        probabilities, scores = probabilities[..., rows], scores[..., rows]
    first = probabilities.argmax(-1, keepdim=True)  # [T, 1]
    if top_k == 1:
        return probabilities.gather(-1, first), first
    second = scores.scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
    chosen = torch.cat((first, second), -1)  # [T, 2]
    weights = probabilities.gather(-1, chosen)
    return weights / weights.sum(-1, keepdim=True), chosen


class MoE(nn.Module):
    """Feed-forward layer of routed experts, shapes `[..., D]` to `[..., D]`.

    `y = sum_k g_k E_k(x) + meta(x)`; with the residual coefficient `c = softmax(coefficient(x))`,
    `y = c0 sum_k g_k E_k(x) + c1 meta(x) + meta(x)`. Source: Med-MoE, arXiv 2404.10237, and its
    official code. The router is computed in fp32. A merged expert is one feed-forward with the
    meta expert: `y = E(x) + meta(x)`, and the router only tells modalities apart.
    """

    def __init__(self, config: MoEConfig, size: int, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.top_k, self.rows = config.top_k, config.own_rows
        self.router = nn.Linear(size, config.router_rows, bias=config.router_bias)
        self.merged = make_expert() if config.merged else None
        routed = 0 if config.merged else config.num_experts
        self.experts = nn.ModuleList(make_expert() for _ in range(routed))
        self.meta = make_expert() if config.meta_expert and not config.merged else None
        self.coefficient = nn.Linear(size, 2) if config.use_residual else None

    def router_logits(self, x: Tensor) -> Tensor:
        """`[..., D]` to fp32 logits `[..., E]`, also under autocast."""
        bias = None if self.router.bias is None else self.router.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.router.weight.float(), bias)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and indices of the experts for tokens `[T, D]`, both `[T, K]`."""
        return route(self.router_logits(tokens), self.top_k, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """Run the chosen experts on their tokens and add the meta expert."""
        if self.merged is not None:
            return self.merged(x)  # type: ignore[no-any-return]
        tokens = x.flatten(0, -2)  # [T, D]
        y = self._routed(tokens)
        if self.meta is not None:
            meta = self.meta(tokens)
            if self.coefficient is not None:
                mix = self.coefficient(tokens).softmax(-1)  # [T, 2]
                y = y * mix[:, :1] + meta * mix[:, 1:]
            y = y + meta
        return y.view_as(x)

    def _routed(self, tokens: Tensor) -> Tensor:
        weights, chosen = self.route(tokens)
        y = torch.zeros_like(tokens)
        for index in sorted(set(chosen.flatten().tolist())):
            token, slot = torch.where(chosen == index)
            part = self.experts[index](tokens[token]) * weights[token, slot, None]
            y = y.index_add(0, token, part.to(y.dtype))
        return y


class Decoder(nn.Module):
    """Embeddings in, hidden states out; the head (without bias) is applied by the caller.

    `layer_type(config, index)` makes a layer whose forward takes `(x, tables, mask, cache)` and
    gives the layer's output and its feed-forward input, which is what a router sees.
    """

    layer_type: ClassVar[type[nn.Module]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.decoder
        self.config = decoder
        self.embed = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_type(config, index) for index in range(decoder.layers)
        )
        self.norm = make_norm(decoder)
        self.head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings `[B, S, D]` to normed hidden states and every layer's feed-forward input."""
        tables = rotary_tables(self.config, positions)
        inputs = []
        for layer in self.layers:
            x, u = layer(x, tables, mask, cache)
            inputs.append(u)
        return self.norm(x), inputs


def experts_or_dense(
    config: ModelConfig, layer: int, make: Callable[[DecoderConfig], nn.Module]
) -> nn.Module:
    """A layer's feed-forward: the mixture of experts where the configuration names the layer."""
    moe, decoder = config.moe, config.decoder
    if moe is None or layer not in moe.layers:
        return make(decoder)
    each = config.merged_decoder if moe.merged else decoder
    return MoE(moe, decoder.hidden_size, lambda: make(each))


def make_norm(decoder: DecoderConfig) -> nn.LayerNorm | nn.RMSNorm:
    """LayerNorm, or RMSNorm (https://arxiv.org/abs/1910.07467) where the decoder has that."""
    if "bias" in decoder.norm_parameters:
        return nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
    return nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)


class PhiFeedForward(nn.Module):
    """`fc2(gelu(fc1(x)))` with biases; GELU in its tanh form (`gelu_new`)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class PhiLayer(nn.Module):
    """One block: `x + attention(norm(x)) + ffn(norm(x))`, both on the same norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        decoder = config.decoder
        self.input_norm = make_norm(decoder)
        self.attention = Attention(decoder, layer, out_bias=True)
        self.dropout = nn.Dropout(0.0)
        self.ffn = experts_or_dense(config, layer, PhiFeedForward)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` to the block's output and its feed-forward input, which the router sees."""
        u = self.input_norm(x)
        mixed = self.dropout(self.attention(u, tables, mask, cache))
        return x + mixed + self.dropout(self.ffn(u)), u


class Phi(Decoder):
    """The stack of Phi-2 layers; Med-MoE's head has no bias, stock Phi-2's has one."""

    layer_type = PhiLayer


class StableLmFeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`, no biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.down(silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class StableLmLayer(nn.Module):
    """One block: `x += attention(norm(x)); x += ffn(norm(x))`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        decoder = config.decoder
        self.input_norm = make_norm(decoder)
        self.post_norm = make_norm(decoder)
        self.attention = Attention(decoder, layer, out_bias=False)
        self.dropout = nn.Dropout(0.0)
        self.ffn = experts_or_dense(config, layer, StableLmFeedForward)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` to the block's output and its feed-forward input, which the router sees."""
        x = x + self.dropout(self.attention(self.input_norm(x), tables, mask, cache))
        u = self.post_norm(x)
        return x + self.dropout(self.ffn(u)), u


class StableLm(Decoder):
    """The stack of StableLM-2 layers; Qwen-1.8B's are the same but for their RMSNorm."""

    layer_type = StableLmLayer
