"""Prediction held against measurement: the same prompt, the same minutes, on this machine.

The microbenchmarks and the model take turns, so that other work on the machine hits both. The
prediction never sees the model run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.device.costs import Precision
from medmoe_edge.device.estimate import NEW_TOKENS, TEXT_TOKENS, Speed, prompt_tokens, step_seconds
from medmoe_edge.device.measure import Bench, kernels_of, shortest
from medmoe_edge.runtimes.ort.runtime import OrtRuntime

ROUNDS = 5
PREFILL_SLOT, TOKEN_SLOT = 0.1, 0.05  # seconds of a round


@dataclass(frozen=True)
class Comparison:
    """Seconds of prefill and of one token, as predicted and as measured undisturbed."""

    prompt_tokens: int
    predicted: Mapping[str, float]
    measured: Mapping[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted over measured."""
        return {name: self.predicted[name] / seconds for name, seconds in self.measured.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "ratios": self.ratios}


def compare(bundle: Bundle, *, seconds: float = 1.3) -> tuple[Comparison, Speed]:
    """Run the bundle's decoder and the microbenchmarks in turns; `seconds` of these in a round."""
    config = bundle.config
    precision: Precision = bundle.manifest["quantisation"]["precision"]
    prompt = prompt_tokens(config)
    runtime = OrtRuntime(bundle)
    cache = runtime.new_cache(prompt + NEW_TOKENS)
    side = config.vision.image_size
    generator = np.random.default_rng(0)
    image = runtime.encode_image(generator.standard_normal((1, 3, side, side), np.float32))
    ids = generator.integers(0, config.decoder.vocab_size, TEXT_TOKENS).tolist()
    embeds = np.concatenate((runtime.embed(ids), image))

    def prefill() -> None:
        cache.length = 0
        runtime.step(embeds, cache)

    def token() -> None:
        cache.length = prompt + NEW_TOKENS // 2
        runtime.step(runtime.embed(ids[:1]), cache)

    measured: dict[str, float] = {}
    with Bench(config, kernels_of(precision)) as bench:
        for _ in range(ROUNDS):
            bench.run(seconds)
            for name, run, slot in (
                ("prefill", prefill, PREFILL_SLOT),
                ("token", token, TOKEN_SLOT),
            ):
                measured[name] = min(measured.get(name, float("inf")), shortest(run, slot))
    speed = bench.speed()
    predicted = {
        "prefill": step_seconds(config, precision, speed, prompt, 0),
        "token": step_seconds(config, precision, speed, 1, prompt + NEW_TOKENS // 2),
    }
    return Comparison(prompt, predicted, measured), speed
