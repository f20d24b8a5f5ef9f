"""The Phi-2 decoder: parallel blocks, biased GELU feed-forward."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.models.attention import Attention, KVCache, rotary_tables
from medmoe_edge.models.moe import MoE


class FeedForward(nn.Module):
    """`fc2(gelu(fc1(x)))` with biases; GELU in its tanh form (`gelu_new`)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One block: `x + attention(norm(x)) + ffn(norm(x))`, both on the same norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        decoder, moe = config.decoder, config.moe
        self.input_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.attention = Attention(decoder, layer, out_bias=True)
        self.dropout = nn.Dropout(0.0)
        self.ffn: nn.Module
        if moe is not None and layer in moe.layers:
            self.ffn = MoE(moe, decoder.hidden_size, lambda: FeedForward(decoder))
        else:
            self.ffn = FeedForward(decoder)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` to the block's output and its feed-forward input, which the router sees."""
        u = self.input_norm(x)
        mixed = self.dropout(self.attention(u, tables, mask, cache))
        return x + mixed + self.dropout(self.ffn(u)), u


class Phi(nn.Module):
    """Embeddings in, hidden states out; the head (no bias in Med-MoE) is applied by the caller."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.decoder
        self.config = decoder
        self.embed = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(decoder.layers))
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
