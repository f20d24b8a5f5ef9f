"""The Phi-2 decoder: parallel blocks, biased GELU feed-forward."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from medmoe_edge.config import DecoderConfig, ModelConfig
from medmoe_edge.models.attention import Attention, KVCache
from medmoe_edge.models.decoder import Decoder, experts_or_dense


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
        decoder = config.decoder
        self.input_norm = nn.LayerNorm(decoder.hidden_size, decoder.norm_eps)
        self.attention = Attention(decoder, layer, out_bias=True)
        self.dropout = nn.Dropout(0.0)
        self.ffn = experts_or_dense(config, layer, lambda: FeedForward(decoder))

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, D]` to the block's output and its feed-forward input, which the router sees."""
        u = self.input_norm(x)
        mixed = self.dropout(self.attention(u, tables, mask, cache))
        return x + mixed + self.dropout(self.ffn(u)), u


class Phi(Decoder):
    """The stack of Phi-2 layers; Med-MoE's head has no bias, stock Phi-2's has one."""

    layer_type = Layer
