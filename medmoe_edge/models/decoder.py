"""What Phi-2 and StableLM-2 share: embeddings, a stack of layers, a norm and a head."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from medmoe_edge.config import ModelConfig
from medmoe_edge.models.attention import KVCache, rotary_tables
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
