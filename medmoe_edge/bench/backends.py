"""What is measured: a model in memory that answers questions of one shape, whatever runs it."""

import importlib
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from PIL import Image as Pillow

from medmoe_edge.bench import measurement
from medmoe_edge.bench.measurement import Shape, seconds
from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.config import ModelConfig
from medmoe_edge.embedded import bundle_path
from medmoe_edge.engine.answer import Clock
from medmoe_edge.engine.engine import Engine, load
from medmoe_edge.errors import InputError, ModelError
from medmoe_edge.image.loading import preprocess
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import Decoding, Runtime, greedy

QUESTION = "Is there evidence of a pleural effusion?"
NEW_TOKENS = 8
Kind = Literal["bundle", "torch", "bitsandbytes", "llama"]


class Backend(Protocol):
    """A loaded model."""

    def touch(self) -> None:
        """Use every part of it once, with little work: sessions are opened by their first use."""

    def question(self) -> dict[str, float]:
        """Seconds of one question's parts, as in `Measured`; `vision` where it has a tower."""
        ...


class RuntimeBackend:
    """Any of our runtimes, driven as `Engine` does, but with tokens that do not depend on it."""

    def __init__(self, runtime: Runtime, shape: Shape) -> None:
        self.runtime, self.shape = runtime, shape
        vision, decoder = runtime.config.vision, runtime.config.decoder
        self.pixels = preprocess(picture(vision.image_size), vision)
        self.ids = _tokens(decoder.vocab_size, decoder.max_positions)

    def touch(self) -> None:
        """See `Backend`."""
        self.runtime.encode_image(self.pixels)
        self.runtime.step(self.runtime.embed(self.ids[:1]), self.runtime.new_cache(1))

    def question(self) -> dict[str, float]:
        """See `Backend`."""
        run, shape, clock = self.runtime, self.shape, Clock()
        image = run.encode_image(self.pixels)
        clock.lap("vision")
        before, after = self.ids[: shape.prefix], self.ids[-shape.question :]
        cache = run.new_cache(shape.prompt + shape.new)
        step = run.step(np.concatenate((run.embed(before), image, run.embed(after))), cache)
        clock.lap("prefill")
        counted = Decoding(ends=(), allow_repetition=True)  # always as many tokens
        for _ in greedy(
            step, lambda token: run.step(run.embed([token]), cache), counted, limit=shape.new
        ):
            pass
        clock.lap("decode")
        cache.length = shape.prefix + shape.image
        run.step(run.embed(after), cache)
        clock.lap("second")
        return clock.laps


class BundleBackend(RuntimeBackend):
    """A bundle as people use it."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        super().__init__(engine.runtime, shape)
        self.engine = engine

    def prefill(self, tokens: int) -> float:
        """Seconds of a prefill of so many tokens of text."""
        run, ids = self.runtime, self.ids[:tokens]
        return seconds(lambda: run.step(run.embed(ids), run.new_cache(tokens)))

    def ask(self, questions: int) -> float:
        """Seconds of so many questions about one image."""
        image = picture(self.engine.config.vision.image_size)
        asked, new = [QUESTION] * questions, self.shape.new
        return seconds(lambda: self.engine.ask_all(image, asked, max_new_tokens=new))


class LlamaBackend:
    """A GGUF in llama.cpp, with its defaults; image tokens are text to it, and it has no tower."""

    def __init__(self, path: Path, config: ModelConfig, shape: Shape) -> None:
        self.shape, tokens, threads = shape, shape.prompt + shape.new, measurement.threads()
        self.ids = _tokens(config.decoder.vocab_size, tokens)
        llama: Any = importlib.import_module("llama_cpp")  # typed where it is not built
        options = {"n_ctx": tokens, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama.Llama(str(path), verbose=False, **options)

    def touch(self) -> None:
        """See `Backend`."""
        self._prefill(1)

    def question(self) -> dict[str, float]:
        """See `Backend`."""
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


def open_backend(kind: Kind, path: Path, form: str, config: ModelConfig, shape: Shape) -> Backend:
    """Load a model.

    Args:
        kind: What runs it.
        path: A bundle, a checkpoint or a GGUF.
        form: torch's dtype, bitsandbytes' kind, or a bundle's memory budget.
        config: The configuration of the bundle that is compared.
        shape: What it is asked.

    Raises:
        MedMoEError: What its loader raises; `ModelError` for a checkpoint of another model.
    """
    if kind == "bundle":
        return BundleBackend(load(path, memory_budget=form or None), shape)
    if kind == "llama":
        return LlamaBackend(path, config, shape)
    import torch

    from medmoe_edge.checkpoint.reader import cut_like, read_checkpoint

    torch.set_num_threads(measurement.threads())
    checkpoint = cut_like(read_checkpoint(path), config)
    if checkpoint.config != config:
        raise ModelError(
            f"{path} is a checkpoint of another model than the bundle.",
            "Give the one that the bundle was exported from, or none.",
        )
    from medmoe_edge.runtimes.torch.eager import BitsAndBytesRuntime, EagerRuntime

    if kind == "torch":
        return RuntimeBackend(EagerRuntime(checkpoint, dtype=getattr(torch, form)), shape)
    return RuntimeBackend(BitsAndBytesRuntime(checkpoint, cast("Any", form)), shape)


def find_bundle(model: str) -> Bundle:
    """The bundle of a name or folder; raises `ModelError`, and `InputError` for a checkpoint."""
    folder = bundle_path(model)
    if not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder} is no bundle, so there is nothing to measure.",
            "Export it first: medmoe-edge export CHECKPOINT.",
        )
    return Bundle.open(folder)


def shape_of(bundle: Bundle) -> Shape:
    """The tokens of one question as the bundle's own tokenizer cuts it."""
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    before, after = tokenizer.prefix_ids(), tokenizer.question_ids(QUESTION)
    return Shape(len(before), bundle.config.vision.image_tokens, len(after), NEW_TOKENS)


def picture(side: int) -> Image:
    """A smooth grey one, `side` pixels wide and high."""
    ramp = np.linspace(0, np.pi, side)
    return Image.from_array((255 * np.outer(np.sin(ramp), np.sin(ramp) ** 2)).astype(np.uint8))


def save_picture(side: int, file: Path) -> None:
    """Write `picture` as a file."""
    Pillow.fromarray(picture(side).pixels).save(file)


def _tokens(vocabulary: int, count: int) -> list[int]:
    """The same random tokens for everybody."""
    ids: list[int] = np.random.default_rng(0).integers(0, vocabulary, count).tolist()
    return ids
