"""What is measured: a model in memory that answers questions of one shape, whatever runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from medmoe_edge.bench.machine import threads
from medmoe_edge.bench.timing import seconds
from medmoe_edge.config import ModelConfig
from medmoe_edge.engine.clock import Clock
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.errors import ModelError
from medmoe_edge.image.loading import Image, preprocess
from medmoe_edge.runtimes.base import Runtime

QUESTION = "Is there evidence of a pleural effusion?"
Kind = Literal["bundle", "torch", "bitsandbytes", "llama"]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """Tokens of one visual question: text before the image, image, question, answer."""

    prefix: int
    image: int
    question: int
    new: int

    @property
    def prompt(self) -> int:
        """All that is prefilled."""
        return self.prefix + self.image + self.question


class Contestant(Protocol):
    """A loaded model."""

    def touch(self) -> None:
        """Use every part of it once, with little work."""

    def question(self) -> dict[str, float]:
        """Seconds of one question's parts.

        `vision`, where it has a tower; `prefill` of the whole prompt; `decode` of all further
        tokens; then `second`, the prefill of another question about the same image.
        """
        ...


class RuntimeContestant:
    """Any of our runtimes, driven as `Engine` does, but with tokens that do not depend on it."""

    def __init__(self, runtime: Runtime, shape: Shape) -> None:
        self.runtime, self.shape = runtime, shape
        vision, decoder = runtime.config.vision, runtime.config.decoder
        self.pixels = preprocess(picture(vision.image_size), vision)
        generator = np.random.default_rng(0)
        self.ids: list[int] = generator.integers(
            0, decoder.vocab_size, decoder.max_positions
        ).tolist()

    def touch(self) -> None:
        """Use every part of it once, with little work."""
        self.runtime.encode_image(self.pixels)
        self.runtime.step(self.runtime.embed(self.ids[:1]), self.runtime.new_cache(1))

    def question(self) -> dict[str, float]:
        """Seconds of one question's parts; see `Contestant`."""
        run, shape, clock = self.runtime, self.shape, Clock()
        image = run.encode_image(self.pixels)
        clock.lap("vision")
        before, after = self.ids[: shape.prefix], self.ids[-shape.question :]
        cache = run.new_cache(shape.prompt + shape.new)
        step = run.step(np.concatenate((run.embed(before), image, run.embed(after))), cache)
        clock.lap("prefill")
        for _ in range(shape.new - 1):  # the prefill gave the first
            step = run.step(run.embed([int(step.logits.argmax())]), cache)
        clock.lap("decode")
        cache.length = shape.prefix + shape.image
        run.step(run.embed(after), cache)
        clock.lap("second")
        return clock.laps


class EngineContestant(RuntimeContestant):
    """A bundle as people use it."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        super().__init__(engine.runtime, shape)
        self.engine = engine
        self.image = picture(engine.config.vision.image_size)

    def prefill(self, tokens: int) -> float:
        """Seconds of a prefill of so many tokens of text."""
        run, ids = self.runtime, self.ids[:tokens]
        return seconds(lambda: run.step(run.embed(ids), run.new_cache(tokens)))

    def ask(self, questions: int) -> float:
        """Seconds of so many questions about one image."""
        asked, new = [QUESTION] * questions, self.shape.new
        return seconds(lambda: self.engine.ask_all(self.image, asked, max_new_tokens=new))


def picture(side: int) -> Image:
    """A smooth grey one, `side` pixels wide and high."""
    ramp = np.linspace(0, np.pi, side)
    grey: Pixels = (255 * np.outer(np.sin(ramp), np.sin(ramp) ** 2)).astype(np.uint8)
    return Image.from_array(grey)


def open_contestant(
    kind: Kind,
    path: Path,
    form: str,
    config: ModelConfig,
    shape: Shape,
) -> Contestant:
    """Load a model; `form` is torch's dtype, bitsandbytes' kind, or a bundle's memory budget.

    Raises what its loader raises, and `ModelError` for a checkpoint of another model.
    """
    if kind == "bundle":
        return EngineContestant(load(path, memory_budget=form or None), shape)
    if kind == "llama":
        from medmoe_edge.bench.llama import LlamaContestant

        return LlamaContestant(path, config, shape)
    return RuntimeContestant(_TORCH[kind](path, form, config), shape)


def _eager(path: Path, form: str, config: ModelConfig) -> Runtime:
    import torch

    from medmoe_edge.runtimes.torch.eager import EagerRuntime

    torch.set_num_threads(threads())
    return EagerRuntime(_checkpoint(path, config), dtype=getattr(torch, form))


def _bitsandbytes(path: Path, form: Any, config: ModelConfig) -> Runtime:
    import torch

    from medmoe_edge.runtimes.torch.bitsandbytes import BitsAndBytesRuntime

    torch.set_num_threads(threads())
    return BitsAndBytesRuntime(_checkpoint(path, config), form)


def _checkpoint(path: Path, config: ModelConfig) -> Any:
    from medmoe_edge.checkpoint.reader import read_checkpoint

    checkpoint = read_checkpoint(path)
    if checkpoint.config != config:
        raise ModelError(
            f"{path} is a checkpoint of another model than the bundle.",
            "Give the one that the bundle was exported from, or none.",
        )
    return checkpoint


_TORCH: Mapping[str, Callable[[Path, Any, ModelConfig], Runtime]] = {
    "torch": _eager,
    "bitsandbytes": _bitsandbytes,
}
