"""The decoders of Med-MoE: embeddings, a stack of layers, a norm and a head.

Phi-2 has parallel blocks and a biased GELU feed-forward; StableLM-2 has sequential blocks,
LayerNorm with bias and SwiGLU.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.models.attention import Attention, KVCache, rotary_tables
from medmoe_edge.models.moe import MoE


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
        self.norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
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


def experts_or_dense(config: ModelConfig, layer: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A layer's feed-forward: the mixture of experts where the configuration names the layer."""
    if config.moe is not None and layer in config.moe.layers:
        return MoE(config.moe, config.decoder.hidden_size, make)
    return make()


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
        self.input_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.attention = Attention(decoder, layer, out_bias=True)
        self.dropout = nn.Dropout(0.0)
        self.ffn = experts_or_dense(config, layer, lambda: PhiFeedForward(decoder))

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
        self.input_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.post_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.attention = Attention(decoder, layer, out_bias=False)
        self.dropout = nn.Dropout(0.0)
        self.ffn = experts_or_dense(config, layer, lambda: StableLmFeedForward(decoder))

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` to the block's output and its feed-forward input, which the router sees."""
        x = x + self.dropout(self.attention(self.input_norm(x), tables, mask, cache))
        u = self.post_norm(x)
        return x + self.dropout(self.ffn(u)), u


class StableLm(Decoder):
    """The stack of StableLM-2 layers."""

    layer_type = StableLmLayer
