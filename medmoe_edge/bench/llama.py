"""llama.cpp as a contestant, with its defaults, through llama-cpp-python."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_edge.bench.backends import Shape
from medmoe_edge.bench.machine import threads
from medmoe_edge.config import ModelConfig
from medmoe_edge.engine.clock import Clock

# By name, so that types can be checked where it is not built.
Llama: Any = importlib.import_module("llama_cpp").Llama


class LlamaContestant:
    """A GGUF in memory; the image's tokens are tokens of text to it, and it has no tower."""

    def __init__(self, path: Path, config: ModelConfig, shape: Shape) -> None:
        self.shape = shape
        tokens = shape.prompt + shape.new
        self.model: Any = Llama(
            str(path),
            n_ctx=tokens,
            n_threads=threads(),
            n_threads_batch=threads(),
            verbose=False,
        )
        generator = np.random.default_rng(0)
        self.ids: list[int] = generator.integers(0, config.decoder.vocab_size, tokens).tolist()

    def touch(self) -> None:
        """Use every part of it once, with little work."""
        self._prefill(1)

    def question(self) -> dict[str, float]:
        """Seconds of one question's parts, without `vision`; see `Contestant`."""
        shape, clock = self.shape, Clock()
        self._prefill(shape.prompt)
        clock.lap("prefill")
        for token in self.ids[: shape.new - 1]:
            self.model.eval([token])
        clock.lap("decode")
        self.model.n_tokens = shape.prefix + shape.image
        self.model.eval(self.ids[-shape.question :])
        clock.lap("second")
        return clock.laps

    def _prefill(self, tokens: int) -> None:
        self.model.reset()
        self.model.eval(self.ids[:tokens])
