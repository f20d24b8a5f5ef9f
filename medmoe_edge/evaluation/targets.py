"""One set of stored weights, many graphs: do they compute the same?

The oracle is the specification: the bundle's integers dequantised and all arithmetic in fp32, every
expert on every token. Each target's graph is held against it, run by whatever can run it here.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from medmoe_edge._types import Counting, Floats, Progress, no_progress, there
from medmoe_edge.bundle.bundle import Bundle, Target, write_derived_manifest
from medmoe_edge.data.datasets import Example
from medmoe_edge.errors import Told
from medmoe_edge.evaluation.fidelity import (
    MAX_NEW_TOKENS,
    Reader,
    Recording,
    follow,
    record,
    relative_error,
    squares,
)
from medmoe_edge.evaluation.metrics import Share
from medmoe_edge.export.builder import save_model
from medmoe_edge.export.stored import specification
from medmoe_edge.export.targets import COMPANIONS, export_target, write_graphs
from medmoe_edge.image.loading import load_image
from medmoe_edge.image.pixels import Image
from medmoe_edge.prompt import Tokenizer
from medmoe_edge.runtimes.base import (
    Cache,
    EmbeddingTable,
    Runtime,
    Step,
    check_room,
    chosen_experts,
    log_softmax,
    own_logits,
)
from medmoe_edge.runtimes.ort.runtime import (
    CACHE_TYPES,
    CUDA,
    OrtRuntime,
    open_session,
    session_options,
)
from medmoe_edge.runtimes.paging.pager import ExpertFile
from medmoe_edge.runtimes.slots.slots import (
    Chosen,
    CpuMemory,
    Kind,
    SlotPools,
    SlotRequests,
    Table,
)


class GraphCache:
    """The arrays `past_*` that the next step reads."""

    def __init__(self, past: dict[str, npt.NDArray[Any]], capacity: int) -> None:
        self.past, self.capacity, self.length = past, capacity, 0


class GraphRuntime:
    """The graphs `vision` and `decoder` with the embeddings of the bundle that they were made from.

    A decoder made for a fixed capacity has caches of that size, whatever was asked for.

    It is no way to answer, since it copies the cache at every step, but to see what a graph
    computes where the engine's GPU is not at hand.
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
        return self._run(embeds, cache, {})[0]

    def _run(
        self, embeds: Floats, cache: GraphCache, more: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[Step, dict[str, npt.NDArray[Any]]]:
        """A step of the graph with `more` inputs, and all of its outputs."""
        feeds = {"embeds": embeds[None], "start": np.array([cache.length]), **cache.past, **more}
        names = [value.name for value in self._decoder.get_outputs()]
        outputs = dict(zip(names, self._decoder.run(names, feeds), strict=True))
        cache.past = {name: outputs[name.replace("past", "present")] for name in cache.past}
        cache.length += len(embeds)
        logits = np.asarray(outputs["logits"][0])
        empty = np.zeros((1, len(embeds), 0, 0), np.float32)
        return Step(logits, np.asarray(outputs.get("router_logits", empty)[0])), outputs

    @cached_property
    def _vision(self) -> ort.InferenceSession:
        return open_session(self.paths[0], as_written())

    @cached_property
    def _decoder(self) -> ort.InferenceSession:
        return open_session(self.paths[1], as_written())


class PagedGraphRuntime(GraphRuntime):
    """The graphs that a paged engine is built from, written into `folder` by `export_paged_graphs`.

    Experts lie in slots of this machine's memory; `budget` is that of `SlotRequests`.
    """

    name = "paged graph"

    def __init__(self, folder: Path, budget: int | str) -> None:
        bundle = Bundle.open(folder)
        super().__init__(bundle, folder / "vision.onnx", folder / "decoder.onnx")
        self._pools = SlotPools(CpuMemory(), Kind.all_of(bundle))
        file = ExpertFile(bundle)
        self.requests = SlotRequests(bundle, file, self._pools, budget, self._run_with)

    def encode_image(self, pixels: Floats) -> Floats:
        """Normalised pixels `[1, 3, S, S]` to image tokens `[N, D]`; a request begins here."""
        return self.requests.begin(super().encode_image, pixels)

    def step(self, embeds: Floats, cache: Cache) -> Step:
        """Run `[S, D]` embeddings after what the cache holds, and extend the cache by S."""
        check_room(cache, len(embeds))
        return self.requests.step(embeds, cache)

    def _run_with(self, embeds: Floats, cache: Cache, table: Table) -> tuple[Step, Chosen]:
        assert isinstance(cache, GraphCache)
        count = self.requests.slots.count
        slots = {
            kind.name: pool.view(kind.dtype).reshape(count, *kind.shape)
            for kind, pool in zip(self._pools.kinds, self._pools.pools, strict=True)
        }
        step, outputs = self._run(embeds, cache, {"table": table, **slots})
        chosen = [outputs[f"chosen.{layer}"][0] for layer in range(len(table))]
        return step, np.stack(chosen, 1)


def export_paged_graphs(bundle: Bundle, target: Target, folder: Path) -> None:
    """Write what a paged engine is built from into the empty `folder`, and a manifest."""
    for name in COMPANIONS:
        if name in bundle.manifest["files"]:
            shutil.copyfile(bundle.path(name), folder / name)
    write_derived_manifest(folder, bundle, target, write_graphs(bundle, target, folder))


def as_written() -> ort.SessionOptions:
    """Without ONNX Runtime's own fusions of `DequantizeLinear`, which round activations."""
    options = session_options()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


Opened = AbstractContextManager[tuple[Runtime, str]]

"""A runtime while it is needed, and what executes it."""


BOUND = 0.01  # of logits and image tokens: what half and 8-bit arithmetic may cost


@dataclass(frozen=True)
class Agreement(Told):
    """How a target's graph agrees with the specification.

    `vision_error` and `logit_error` are relative (norm of the difference over the norm), of the
    image tokens and of the logits at all positions of the answers, less their mean; the largest of
    a single question is `worst_question`. `rerouted` counts tokens x layers sent to other experts,
    and `widest_tie` is the largest gap in probability, in the specification, between the expert
    that one of them lost and the one it got: rounding decides ties.
    """

    TOLD = ("agrees",)

    target: str
    executed: str
    questions: int
    vision_error: float
    logit_error: float
    worst_question: float
    same_answers: Share
    rerouted: Share
    widest_tie: float

    @property
    def agrees(self) -> bool:
        """Whether it is within `BOUND`."""
        return max(self.logit_error, self.vision_error) <= BOUND


def agree(
    specification: Callable[[], Opened],
    candidates: Mapping[str, Callable[[], Opened]],
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    load: Callable[[Path], Image] = load_image,
    progress: Progress = no_progress,
) -> list[Agreement]:
    """Hold every candidate against the specification; one runtime is in memory at a time.

    `load` reads images; `progress` is called with `(what, images done, images)`. Raises `DataError`
    for no examples; errors of images, questions and runtimes pass through.
    """
    with specification() as (runtime, _):
        told = partial(progress, "specification")
        recording = record(runtime, tokenizer, examples, load=load, exact=True, progress=told)
    found = []
    for name, opened in candidates.items():
        with opened() as (runtime, executed):
            found.append(_compare(name, executed, recording, runtime, partial(progress, name)))
    return found


def _compare(
    name: str, executed: str, recording: Recording, runtime: Runtime, progress: Counting
) -> Agreement:
    reader, moe = Reader(runtime, recording.tokenizer, MAX_NEW_TOKENS), runtime.config.moe
    known = recording.tokenizer.known(runtime.config.decoder.vocab_size)
    vision, logits, same, moved, tokens, ties = [], [], [], 0, 0, [0.0]
    for image, view, replies in follow(recording, reader, progress):
        reference = recording.images[image]
        vision.append(squares(view.features, reference.features))
        routes = [(view.router_logits, reference.router_logits)]
        for example, _, reply in replies:
            expected = recording.questions[example.id]
            pair = reply.logits, expected.log_probabilities
            logits.append(squares(*(_centred(each[:, known]) for each in pair)))
            same.append(reply.tokens == expected.tokens)
            routes.append((reply.router_logits, expected.router_logits))
        for ours, theirs in routes if moe else ():
            own = there(moe)
            gaps = lost_by(own_logits(theirs, own), own_logits(ours, own), own.top_k)
            tokens, moved = tokens + gaps.size, moved + int((gaps > 0).sum())
            ties.append(float(gaps.max(initial=0.0)))
    return Agreement(
        name,
        executed,
        len(logits),
        relative_error(*np.sum(vision, axis=0)),
        relative_error(*np.sum(logits, axis=0)),
        max(relative_error(*each) for each in logits),
        Share.of(sum(same), len(same)),
        Share.of(moved, tokens),
        max(ties),
    )


def lost_by(reference: Floats, found: Floats, top_k: int) -> npt.NDArray[np.float64]:
    """`[S, M]`: 0 where a token goes to the reference's experts, else by how much they led.

    That is the reference's probability of the worst expert it lost, less that of the best it got.
    """
    probabilities = np.exp(log_softmax(reference))
    masks = []
    for logits in (reference, found):
        mask = np.zeros(logits.shape, bool)
        np.put_along_axis(mask, chosen_experts(logits, top_k), True, axis=-1)
        masks.append(mask)
    lost = np.where(masks[0] & ~masks[1], probabilities, np.inf).min(-1)
    got = np.where(masks[1] & ~masks[0], probabilities, -np.inf).max(-1)
    moved = np.isfinite(lost)
    smallest = np.finfo(np.float64).tiny  # a tie to the last bit has moved all the same
    return np.where(moved, np.maximum(lost - got, smallest), 0.0)


def _centred(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """What a softmax sees of them."""
    exact = logits.astype(np.float64)
    centred: npt.NDArray[np.float64] = exact - exact.mean(-1, keepdims=True)
    return centred


CPU = "ONNX Runtime, CPU"
GRAPH = "its graph on ONNX Runtime, CPU"


def agree_on_targets(
    bundle: Bundle, examples: Sequence[Example], *, progress: Progress = no_progress
) -> list[Agreement]:
    """Hold every target's form of a bundle against its specification, as far as it runs here.

    The plugin of TensorRT proper is held against it in the tests, on small shapes: on a CPU its
    kernels run in an interpreter.
    """
    bundle.check_portable()
    candidates: dict[str, Callable[[], Opened]] = {
        "onnxruntime": partial(_portable, bundle),
        "onnxruntime-cuda": partial(_cuda, bundle),
        "tensorrt-rtx": partial(_graphs, bundle),
    }
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    return agree(partial(specified, bundle), candidates, tokenizer, examples, progress=progress)


@contextlib.contextmanager
def specified(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    """The specification, while it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(specification(bundle), Path(folder), "decoder")
        decoder = Path(folder) / "decoder.onnx"
        yield GraphRuntime(bundle, bundle.path("vision.onnx"), decoder), CPU


@contextlib.contextmanager
def _portable(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    yield OrtRuntime(bundle), CPU


@contextlib.contextmanager
def _cuda(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        export_target(bundle, out, Target("onnxruntime-cuda", "fp16"))
        here = CUDA in ort.get_available_providers()
        runtime = OrtRuntime(
            Bundle.open(out), device="auto" if here else "cpu", allow_fallback=True
        )
        yield runtime, CPU if runtime.choice.device == "cpu" else "ONNX Runtime, CUDA"


@contextlib.contextmanager
def _graphs(bundle: Bundle) -> Iterator[tuple[Runtime, str]]:
    positions = bundle.config.decoder.max_positions
    target = Target("tensorrt-rtx", "fp16", "none", "none", positions, positions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_graphs(bundle, target, folder)
        yield GraphRuntime(bundle, folder / "vision.onnx", folder / "decoder.onnx"), GRAPH
