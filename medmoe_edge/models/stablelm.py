"""The StableLM-2 decoder: sequential blocks, LayerNorm with bias, SwiGLU."""

from torch import Tensor, nn
from torch.nn.functional import silu

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.models.attention import Attention, KVCache
from medmoe_edge.models.decoder import Decoder, experts_or_dense


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
        decoder = config.decoder
        self.input_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.post_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.attention = Attention(decoder, layer, out_bias=False)
        self.dropout = nn.Dropout(0.0)
        self.ffn = experts_or_dense(config, layer, lambda: FeedForward(decoder))

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` to the block's output and its feed-forward input, which the router sees."""
        x = x + self.dropout(self.attention(self.input_norm(x), tables, mask, cache))
        u = self.post_norm(x)
        return x + self.dropout(self.ffn(u)), u


class StableLm(Decoder):
    """The stack of StableLM-2 layers."""

    layer_type = Layer
