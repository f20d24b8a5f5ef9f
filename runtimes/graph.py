"""Graphs of standard ONNX on ONNX Runtime's CPU: a specification, or what an engine is built from.

It is no way to answer, since it copies the cache at every step, but to see what a graph computes
where the engine's GPU is not at hand.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.runtimes.base import Cache, EmbeddingTable, Step, check_room
from medmoe_edge.runtimes.ort.runtime import CACHE_TYPES
from medmoe_edge.runtimes.ort.sessions import open_session, session_options


class GraphCache:
    """The arrays `past_*` that the next step reads."""

    def __init__(self, past: dict[str, npt.NDArray[Any]], capacity: int) -> None:
        self.past, self.capacity, self.length = past, capacity, 0


class GraphRuntime:
    """The graphs `vision` and `decoder` with the embeddings of the bundle that they were made from.

    A decoder made for a fixed capacity has caches of that size, whatever was asked for.
    """

    name = "graph"

    def __init__(self, bundle: Bundle, vision: Path, decoder: Path) -> None:
        self.config, self.paths = bundle.config, (vision, decoder)
        self._embedding = EmbeddingTable(bundle.path("embedding.npy"))

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`."""
        (tokens,) = self._vision.run(["image_tokens"], {"pixels": pixels})
        return np.asarray(tokens[0], np.float32)

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""
        return self._embedding[ids]

    def new_cache(self, capacity: int) -> GraphCache:
        """An empty cache for `capacity` positions."""
        past = {}
        for value in self._decoder.get_inputs():
            if value.name.startswith("past_"):
                fixed = value.shape[2]
                capacity = fixed if isinstance(fixed, int) else capacity
                shape = (1, value.shape[1], capacity, value.shape[3])
                past[value.name] = np.zeros(shape, CACHE_TYPES[value.type])
        return GraphCache(past, capacity)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S."""
        assert isinstance(cache, GraphCache)
        check_room(cache, len(embeds))
        feeds = {"embeds": embeds[None], "start": np.array([cache.length]), **cache.past}
        names = [value.name for value in self._decoder.get_outputs()]
        outputs = dict(zip(names, self._decoder.run(names, feeds), strict=True))
        cache.past = {name: outputs[name.replace("past", "present")] for name in cache.past}
        cache.length += len(embeds)
        logits = np.asarray(outputs["logits"][0])
        empty = np.zeros((1, len(embeds), 0, 0), np.float32)
        return Step(logits, np.asarray(outputs.get("router_logits", empty)[0]))

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return open_session(self.paths[0], as_written())

    @cached_property
    def _decoder(self) -> ort.InferenceSession:
        return open_session(self.paths[1], as_written())


def as_written() -> ort.SessionOptions:
    """Without ONNX Runtime's own fusions of `DequantizeLinear`, which round activations."""
    options = session_options()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options
