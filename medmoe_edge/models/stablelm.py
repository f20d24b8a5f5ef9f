"""The StableLM-2 decoder: sequential blocks, LayerNorm with bias, SwiGLU."""

from torch import Tensor, nn
from torch.nn.functional import silu

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.models.attention import Attention, KVCache, rotary_tables
from medmoe_edge.models.moe import MoE


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`, no biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.down(silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One block: `x += attention(norm(x)); x += ffn(norm(x))`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        decoder, moe = config.decoder, config.moe
        self.input_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.post_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.attention = Attention(decoder, layer, out_bias=False)
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
        x = x + self.dropout(self.attention(self.input_norm(x), tables, mask, cache))
        u = self.post_norm(x)
        return x + self.dropout(self.ffn(u)), u


class StableLm(nn.Module):
    """Embeddings in, hidden states out; the head is applied by the caller where it is needed."""

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
