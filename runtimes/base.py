"""What every runtime of a Med-MoE is: prefill and decode steps over a model on disk.

`Runtime` and its caches are protocols; beside them stands what the runtimes share. Token embeddings
are read from a bundle row by row: a vocabulary of 100,000 takes 400 MB, of which an answer needs a
few dozen rows. They are read and not mapped, so that a file that shrinks under us is an error and
not the end of the process.
"""

import math
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.config import ModelConfig
from medmoe_edge.errors import BundleError, Notice

CacheArray = npt.NDArray[np.floating[Any]]


class Step(NamedTuple):
    """What one step yields: `logits` `[V]` of its last position, `router_logits` `[S, M, E]`.

    M counts the layers with experts, 0 for a dense model.
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
    """A loaded model. Not thread-safe: one question at a time."""

    name: str
    config: ModelConfig

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`."""

    def embed(self, ids: list[int]) -> Floats:
        """Token ids to embeddings `[S, D]`."""

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for `capacity` positions."""

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S."""


@runtime_checkable
class Warns(Protocol):
    """A runtime of which something should be known: `warnings` belong to every answer."""

    warnings: tuple[Notice, ...]


@runtime_checkable
class Paged(Protocol):
    """A runtime that brings experts into memory as they are needed."""

    def paging(self) -> dict[str, Any]:
        """What that was like since the last report or the image, plain JSON values."""


def greedy(
    step: Step, take: Callable[[int], Step], *, limit: int, ends: Collection[int]
) -> Iterator[tuple[int, Step]]:
    """Decode greedily: every token is the most likely one.

    Args:
        step: What the first token is chosen from.
        take: Runs a token's step.
        limit: How many tokens at most, an end token included.
        ends: The tokens after which there is none.

    Yields:
        Each token, an end token included, and the step that it was chosen from.
    """
    for left in range(limit, 0, -1):
        token = int(step.logits.argmax())
        yield token, step
        if token in ends or left == 1:
            return
        step = take(token)


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


def in_parts(embeds: Floats, at_once: int, run: Callable[[Floats], Step]) -> Step:
    """`run` on `[S, D]` embeddings in as few parts of at most `at_once` tokens as will do.

    The parts are as long as each other, give or take one; what they yield is joined to one step.
    """
    steps = [run(part) for part in np.array_split(embeds, math.ceil(len(embeds) / at_once))]
    return Step(steps[-1].logits, np.concatenate([step.router_logits for step in steps]))


class EmbeddingTable:
    """Rows `[V, D]` of an `.npy` file, which stays open until the table is collected.

    Raises `BundleError` for a file that is not one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
            self._file = os.open(path, os.O_RDONLY)
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(path) from error
        weakref.finalize(self, os.close, self._file)
        self._dtype, self._width, self._start = table.dtype, table.shape[1], table.offset

    def __getitem__(self, ids: Sequence[int]) -> Floats:
        """The rows of some tokens `[S, D]`; raises `BundleError` where the file ends before."""
        size = self._width * self._dtype.itemsize
        rows = b"".join(os.pread(self._file, size, self._start + token * size) for token in ids)
        if len(rows) < size * len(ids):
            raise _damaged(self._path)
        return np.frombuffer(rows, self._dtype).reshape(len(ids), self._width).astype(np.float32)


def _damaged(path: Path) -> BundleError:
    return BundleError(f"{path} was changed or is incomplete.", "Copy or export the bundle again.")
