"""What each variant costs: parameters and bytes as counted, latency as measured side by side."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from medmoe_edge.data.datasets import Example
from medmoe_edge.engine.engine import Engine
from medmoe_edge.image.loading import load_image, preprocess
from medmoe_edge.models.med_moe import MedMoE
from medmoe_edge.runtimes.base import Floats

ROUNDS = 24
TOKENS = 8  # decoded in every round, wherever the answer would end


@dataclass(frozen=True)
class Size:
    """Parameters: all, those of the language part, and of these what runs for one token.

    `bytes` is what the weights take as run here, in fp32.
    """

    total: int
    language: int
    activated: int
    bytes: int


@dataclass(frozen=True)
class Latency:
    """Median seconds in PyTorch on the CPU, fp32.

    `first_token`: vision tower and prefill of image and question; `token`: each further one.
    """

    first_token: float
    token: float


def size_of(model: MedMoE) -> Size:
    """Counted from the module, so that layers of any width count as what they are."""
    sizes = {name: parameter.numel() for name, parameter in model.decoder.named_parameters()}
    language = activated = sum(sizes.values())
    if moe := model.config.moe:
        experts = sum(size for name, size in sizes.items() if ".ffn.experts." in name)
        activated -= experts - experts * moe.top_k // moe.num_experts
    tensors = [*model.parameters(), *model.buffers()]
    return Size(
        total=sum(parameter.numel() for parameter in model.parameters()),
        language=language,
        activated=activated,
        bytes=sum(tensor.nbytes for tensor in tensors),
    )


def measure(engines: Mapping[str, Engine], examples: Sequence[Example]) -> dict[str, Latency]:
    """Every engine answers the same questions; they take turns, in changing order."""
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    chosen = [examples[number * len(examples) // ROUNDS] for number in range(ROUNDS)]
    for number, example in enumerate([chosen[0], *chosen]):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            engine = engines[name]
            pixels = preprocess(load_image(example.image), engine.config.vision)
            lap = _answer(engine, pixels, example.question)
            if number:  # the first only warms up
                laps[name].append(lap)
    return {
        name: Latency(median(first for first, _ in own), median(token for _, token in own))
        for name, own in laps.items()
    }


def _answer(engine: Engine, pixels: Floats, question: str) -> tuple[float, float]:
    """Seconds to the first token and per further token."""
    runtime, tokenizer = engine.runtime, engine.tokenizer
    prefix, ids = tokenizer.prefix_ids(), tokenizer.question_ids(question)
    started = time.perf_counter()
    image = runtime.encode_image(pixels)
    embeds = np.concatenate((runtime.embed(prefix), image, runtime.embed(ids)))
    cache = runtime.new_cache(len(embeds) + TOKENS)
    logits = runtime.step(embeds, cache).logits
    first = time.perf_counter()
    for _ in range(TOKENS):
        logits = runtime.step(runtime.embed([int(logits.argmax())]), cache).logits
    return first - started, (time.perf_counter() - first) / TOKENS
