"""What every runtime of a Med-MoE is: prefill and decode steps over a model on disk.

`Runtime` and its caches are protocols; beside them stands what the runtimes share. Token embeddings
are read from a bundle row by row: a vocabulary of 100,000 takes 400 MB, of which an answer needs a
few dozen rows. They are read and not mapped, so that a file that shrinks under us is an error and
not the end of the process.
"""

import itertools
import math
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.bundle.machine import refused
from medmoe_edge.config import ModelConfig, MoEConfig
from medmoe_edge.errors import BundleError, Notice
from medmoe_edge.prompt import Tokenizer

CacheArray = npt.NDArray[np.floating[Any]]


class Step(NamedTuple):
    """What one step yields.

    Attributes:
        logits: `[V]`, of its last position.
        router_logits: `[S, M, E]`; M counts the layers with experts, 0 for a dense model. Of a
            model whose experts were left out in part, E counts those too: see `own_logits`.
    """

    logits: Floats
    router_logits: Floats


class Cache(Protocol):
    """A KV cache; setting `length` back forgets what came later, and nothing else."""

    length: int

    @property
    def capacity(self) -> int:
        """Positions it can hold."""


@runtime_checkable
class PortableCache(Cache, Protocol):
    """A cache whose contents can go into another one of the same model, by way of a file.

    `origin` names the library, its version and the device, which all decide how results round.
    """

    @property
    def origin(self) -> str:
        """What computes its contents."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of `arrays`."""

    def arrays(self) -> Iterator[CacheArray]:
        """What it holds, `[H, length, head_size]`: keys and values of each layer in turn."""

    def fill(self, arrays: Iterable[CacheArray]) -> None:
        """Hold those instead; their number, shape and type must be right."""


class Runtime(Protocol):
    """A loaded model. Not thread-safe: one question at a time.

    Attributes:
        name: Of the library that runs it, for people.
        config: Of the model.
    """

    name: str
    config: ModelConfig

    def encode_image(self, pixels: Floats) -> Floats:
        """Run the vision tower and the projector.

        Args:
            pixels: Normalised, `[1, 3, S, S]`.

        Returns:
            Image tokens `[N, D]`.
        """

    def embed(self, ids: list[int]) -> Floats:
        """Look up token ids.

        Args:
            ids: Of S tokens.

        Returns:
            Embeddings `[S, D]`.
        """

    def new_cache(self, capacity: int) -> Cache:
        """Make an empty cache.

        Args:
            capacity: Positions that it is to hold.
        """

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run the decoder after what the cache holds, and extend the cache by S.

        Args:
            embeds: `[S, D]`.
            cache: One of `new_cache`, with room for S more positions.
        """


@runtime_checkable
class Warns(Protocol):
    """A runtime of which something should be known: `warnings` belong to every answer."""

    warnings: tuple[Notice, ...]


@runtime_checkable
class Paged(Protocol):
    """A runtime that brings experts into memory as they are needed."""

    def paging(self) -> dict[str, Any]:
        """What that was like since the last report or the image, plain JSON values."""


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: always the most likely token that may be chosen.

    Attributes:
        ends: The tokens after which there is none.
        never: Tokens that are never chosen, however likely: those that refuse an answer.
        allow_repetition: Whether an answer that repeats itself goes on to its limit.
    """

    ends: Collection[int]
    never: tuple[int, ...] = ()
    allow_repetition: bool = False

    @classmethod
    def of(
        cls, config: ModelConfig, tokenizer: Tokenizer, *, allow_repetition: bool = False
    ) -> Self:
        """That of a model's answers; raises `ModelError` for a refusal that is no token."""
        never = tuple(tokenizer.ids_of(config.refusals).values())
        return cls(config.decoder.end_tokens, never, allow_repetition)

    def choose(self, logits: Floats) -> npt.NDArray[np.int64]:
        """The token to choose at each place; `[..., V]` to `[...]`."""
        if self.never:
            logits = logits.copy()
            logits[..., list(self.never)] = -np.inf
        chosen: npt.NDArray[np.int64] = logits.argmax(-1)
        return chosen

    def kept(self, tokens: Sequence[int]) -> Sequence[int]:
        """Of an answer as it was decoded, what is told: without the end, and without a loop."""
        if tokens and tokens[-1] in self.ends:
            tokens = tokens[:-1]
        loop = 0 if self.allow_repetition else looping(tokens, AT_END)
        return tokens[: len(tokens) - loop]


class Chosen(NamedTuple):
    """A token of an answer, and the step that it was chosen from.

    `held` counts the last tokens, this one among them, that repeat earlier ones: they are told once
    it is clear that they begin no loop. `stopped` says of the last token why the answer ends there:
    at its "end", at the limit of its "length", or in a "repetition", whose `held` tokens (an
    end token after the loop is one of them) are no part of the answer.
    """

    token: int
    step: Step
    held: int = 0
    stopped: Literal["end", "length", "repetition"] | None = None


def greedy(
    step: Step,
    take: Callable[[int], Step],
    decoding: Decoding,
    *,
    limit: int,
    before: Sequence[int] = (),
) -> Iterator[Chosen]:
    """Decode greedily: every token is the most likely one.

    Args:
        step: What the first token is chosen from.
        take: Runs a token's step.
        decoding: How tokens are chosen, and when there are no more.
        limit: How many tokens at most, an end token included.
        before: The tokens of the answer that were decoded already.

    Yields:
        Each token, an end token included.
    """
    tokens = list(before)
    for left in range(limit, 0, -1):
        token = int(decoding.choose(step.logits))
        tokens.append(token)
        if token in decoding.ends:
            loop = len(tokens) - 1 - len(decoding.kept(tokens))
            if loop:
                yield Chosen(token, step, loop + 1, "repetition")
            else:
                yield Chosen(token, step, stopped="end")
            return
        held = loop = 0
        if not decoding.allow_repetition:
            held = max(_runs(tokens).values(), default=0)
            loop = looping(tokens, AT_END if left == 1 else REPEATED)
        if loop or left == 1:
            yield Chosen(token, step, loop, "repetition" if loop else "length")
            return
        yield Chosen(token, step, held)
        step = take(token)


LONGEST = 64  # tokens of what is repeated
COPIES = 3  # of it, one after the other
REPEATED = 16  # tokens that only repeat what stands before them
AT_END = 8  # of these, where the answer ends: by itself, or at the limit of its length


def looping(tokens: Sequence[int], enough: int) -> int:
    """How many of the last tokens are a loop; 0 where they are none.

    A loop is the same run of 1 to `LONGEST` tokens, `COPIES` times or more without anything
    between, of which `enough` tokens or more come after the first copy. They alone are counted: the
    first copy belongs to the answer. "No, no, no" is none, nor is a list whose numbers go on.
    """
    return max(
        (run for period, run in _runs(tokens).items() if run >= max(enough, (COPIES - 1) * period)),
        default=0,
    )


def _runs(tokens: Sequence[int]) -> dict[int, int]:
    """By period, how many of the last tokens equal the one that stands so many places before."""
    runs = {}
    for period in range(1, min(LONGEST, len(tokens) - 1) + 1):
        pairs = zip(reversed(tokens), reversed(tokens[:-period]), strict=False)
        if run := sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)):
            runs[period] = run
    return runs


def log_probability(
    step: Step, take: Callable[[int], Step], tokens: Sequence[int], ends: Collection[int]
) -> tuple[float, list[Step]]:
    """How likely it is that an answer is exactly these tokens, and then ends.

    Args:
        step: What the first token would be chosen from.
        take: Runs a token's step.
        tokens: At least one.
        ends: Any of these may end it.

    Returns:
        The natural log-probability, and the step of each token.
    """
    total, steps = 0.0, []
    for token in tokens:
        total += float(log_softmax(step.logits)[token])
        step = take(token)
        steps.append(step)
    end = np.exp(log_softmax(step.logits)[list(ends)]).sum()
    return total + math.log(max(float(end), LEAST)), steps


LEAST = 1e-30  # a probability


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Log-probabilities along the last axis, in double precision."""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def check_room(cache: Cache, positions: int) -> None:
    """Raise `ValueError` if a step would not fit: the caller sized the cache wrongly."""
    if cache.length + positions > cache.capacity:
        raise ValueError(f"{cache.length} + {positions} positions exceed {cache.capacity}")


def chosen_experts(router_logits: Floats, top_k: int) -> npt.NDArray[np.int64]:
    """The experts of each token, best first, the lower index first where two are equal.

    `[..., E]` to `[..., K]`.
    """
    order = np.argsort(-router_logits, axis=-1, kind="stable")
    return order[..., :top_k]


def own_logits(router_logits: Floats, moe: MoEConfig) -> Floats:
    """Of router logits `[..., R]` those of the experts that are there, `[..., E]`."""
    return router_logits if moe.own_rows is None else router_logits[..., list(moe.own_rows)]


def in_parts(embeds: Floats, at_once: int, run: Callable[[Floats], Step]) -> Step:
    """`run` on `[S, D]` embeddings in as few parts of at most `at_once` tokens as will do.

    The parts are as long as each other, give or take one; what they yield is joined to one step.
    """
    steps = [run(part) for part in np.array_split(embeds, math.ceil(len(embeds) / at_once))]
    return Step(steps[-1].logits, np.concatenate([step.router_logits for step in steps]))


class EmbeddingTable:
    """Rows `[V, D]` of an `.npy` file, which stays open; raises `BundleError` for another file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._table = np.load(path, mmap_mode="r", allow_pickle=False)
            self._file = os.open(path, os.O_RDONLY)
        except (OSError, EOFError, ValueError) as error:
            raise (refused(str(path), error) or _damaged(path)) from error
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, ids: Sequence[int]) -> Floats:
        """The rows of some tokens `[S, D]`; raises `BundleError` where the file ends before."""
        if not hasattr(os, "pread"):  # Windows; elsewhere no pages are mapped, which count as ours
            return np.asarray(self._table[ids], np.float32)
        size, start, width = self._table.strides[0], self._table.offset, self._table.shape[1]
        rows = b"".join(os.pread(self._file, size, start + token * size) for token in ids)
        if len(rows) < size * len(ids):
            raise _damaged(self._path)
        return np.frombuffer(rows, self._table.dtype).reshape(len(ids), width).astype(np.float32)


def _damaged(path: Path) -> BundleError:
    return BundleError(f"{path} was changed or is incomplete.", "Copy or export the bundle again.")
