"""A checkpoint in PyTorch, uncompiled: the reference that every other runtime is held against."""

import numpy as np
import torch

from medmoe_edge.checkpoint import Checkpoint
from medmoe_edge.models.attention import KVCache
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.runtimes.base import Cache, Floats, Step, check_room


class EagerCache(KVCache):
    """The model's own cache."""

    @property
    def capacity(self) -> int:
        """Positions it can hold."""
        return int(self.keys.shape[3])


class EagerRuntime:
    """fp32 on the CPU."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        with torch.device("meta"):
            self.model = MedMoE(self.config)
        tensors = {name: tensor.to(torch.float32) for name, tensor in checkpoint}
        self.model.load_state_dict(tensors, assign=True)
        self.model.eval()

    @torch.inference_mode()
    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`."""
        return _array(self.model.encode_image(torch.from_numpy(pixels))[0])

    @torch.inference_mode()
    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""
        return _array(self.model.embed(torch.tensor(ids)))

    def new_cache(self, capacity: int) -> EagerCache:
        """An empty cache for `capacity` positions."""
        return EagerCache(self.config.decoder, 1, capacity, self.model.decoder.embed.weight)

    @torch.inference_mode()
    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S."""
        assert isinstance(cache, EagerCache)
        check_room(cache, len(embeds))
        output = self.model(torch.from_numpy(embeds)[None], cache)
        logits = _array(self.model.head(output.hidden[0, -1:]))[0]
        if self.config.moe is None:
            return Step(logits, np.zeros((len(embeds), 0, 0), np.float32))
        return Step(logits, _array(self.model.router_logits(output)[0]))


def _array(tensor: torch.Tensor) -> Floats:
    return tensor.numpy()
