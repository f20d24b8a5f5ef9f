"""`medmoe-edge bench`: what answering costs on this machine, in time and memory.

What is measured takes turns, so that other work on the machine hits all of it alike; told are
medians and quartiles. Every model is in a process of its own, so its memory is its own.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image as Pillow

from medmoe_edge.bench.backends import QUESTION, Shape, picture
from medmoe_edge.bench.machine import Stream, load_average, threads
from medmoe_edge.bench.measurement import (
    Measurement,
    Progress,
    find_bundle,
    no_progress,
    shape_of,
)
from medmoe_edge.bench.peers import Comparison, Materials, Peer, compare
from medmoe_edge.bench.process import Worker, cold_start
from medmoe_edge.bench.result import Bench, Length, Machine
from medmoe_edge.bench.timing import Ration, Spread, turn
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.config import DecoderConfig
from medmoe_edge.device.costs import Precision, bits_per_weight, step_work
from medmoe_edge.device.devices import cpu_name, memory_here
from medmoe_edge.embedded import EMBEDDED, checkpoint_path

ROUNDS = 5
ALLOWANCE = 30.0  # seconds of everything measured, in which it begins again
LENGTHS = (128, 256, 512, 1024, 2048)
QUESTIONS = (1, 2, 4, 8)
CACHE_NUMBER = 4  # bytes of a number in the KV cache on a CPU


def bench(
    model: str = "nano",
    *,
    rounds: int = ROUNDS,
    peers: Sequence[Peer] = (),
    checkpoint: str | None = None,
    progress: Progress = no_progress,
) -> Bench:
    """Measure a bundle, and beside it `peers`: what a user would run instead.

    There are `rounds` turns, or fewer of what takes long: one at least. `checkpoint`, a folder or a
    name, is what the bundle was exported from and what peers load; of an embedded model it is
    known, and without it they load random weights of the same shapes. Raises `ModelError` for what
    cannot be used, `InputError` for a checkpoint in the bundle's place, and `ResourceError` where
    measuring fails.
    """
    bundle = find_bundle(model)
    if checkpoint is None and model in EMBEDDED:
        checkpoint = model
    weights = checkpoint_path(checkpoint) if checkpoint else None
    steps = 2 * rounds + len(peers)
    shape, ration = shape_of(bundle), Ration(ALLOWANCE)
    run = _Run(bundle, shape)
    for done in range(rounds):
        progress("starting", done, steps)
        ration.take("starting", run.start)
    with run.opened() as worker:
        for done in range(rounds, 2 * rounds):
            for what, take in run.turns(worker).items():
                progress(what, done, steps)
                ration.take(what, take)
    found = []
    if peers:
        with Materials(bundle, weights) as materials:
            for done, peer in enumerate(peers, 2 * rounds):
                progress(peer.title, done, steps)
                found.append(compare(peer, materials, shape, rounds))
    return run.result(found)


class _Run:
    """The bundle's own figures, gathered round by round."""

    def __init__(self, bundle: Bundle, shape: Shape) -> None:
        self.bundle, self.shape = bundle, shape
        self.measurement = Measurement(bundle, shape)
        limit = bundle.config.decoder.max_positions
        self.load = load_average()  # before our own work adds to it
        self.cold: list[float] = []
        self.bandwidth: list[float] = []
        self.lengths: dict[int, list[float]] = {n: [] for n in LENGTHS if n <= limit}
        self.peaks: dict[int, list[int | None]] = {n: [] for n in self.lengths}
        self.questions: dict[int, list[float]] = {n: [] for n in QUESTIONS}
        self._stream = Stream()

    def start(self) -> None:
        """A whole process that answers, and one that only loads."""
        self.cold.append(ask_cold(self.bundle, self.shape))
        with Worker() as worker:
            self.measurement.open(worker)

    @contextmanager
    def opened(self) -> Iterator[Worker]:
        """A worker with the bundle loaded."""
        with Worker() as worker:
            self.measurement.open(worker)
            yield worker

    def turns(self, worker: Worker) -> Mapping[str, Callable[[], object]]:
        """A turn of everything that a loaded bundle does, by what it is."""
        return {
            "memory bandwidth": lambda: self.bandwidth.extend(turn(self._stream.bandwidth)),
            "a question": partial(self.measurement.turn, worker),
            **{
                f"prefill of {tokens:,} tokens": partial(self._prefill, worker, tokens)
                for tokens in self.lengths
            },
            **{
                f"questions about one image: {count}": partial(self._ask, worker, count)
                for count in self.questions
            },
        }

    def _prefill(self, worker: Worker, tokens: int) -> None:
        self.lengths[tokens] += worker.ask("prefill", tokens=tokens)
        self.peaks[tokens].append(worker.ask("memory")["peak"])

    def _ask(self, worker: Worker, count: int) -> None:
        self.questions[count] += worker.ask("ask", questions=count)

    def result(self, peers: Sequence[Comparison]) -> Bench:
        """All of it."""
        return Bench(
            model=self.bundle.name,
            sha256=self.bundle.sha256,
            precision=self.bundle.manifest["quantisation"]["precision"],
            machine=Machine(
                cpu_name(), threads(), memory_here(), self.load, Spread.of(self.bandwidth)
            ),
            shape=self.shape,
            cold_start=Spread.of(self.cold),
            measured=self.measurement.result(),
            decode_bytes=decode_bytes(self.bundle, self.shape),
            cache_token_bytes=cache_token_bytes(self.bundle.config.decoder),
            lengths=tuple(
                Length(tokens, Spread.of(seconds), self.peaks[tokens][0])
                for tokens, seconds in self.lengths.items()
            ),
            questions={n: Spread.of(seconds) for n, seconds in self.questions.items()},
            peers=tuple(peers),
        )


def decode_bytes(bundle: Bundle, shape: Shape) -> float:
    """Bytes of weights and KV cache that a token in the middle of the answer reads."""
    precision: Precision = bundle.manifest["quantisation"]["precision"]
    work = step_work(bundle.config, 1, shape.prompt + shape.new // 2)
    weights = (n * bits_per_weight(kind, precision) / 8 for kind, n in work.weights.items())
    return sum(weights) + CACHE_NUMBER * work.cache


def cache_token_bytes(decoder: DecoderConfig) -> int:
    """Bytes of one token's keys and values in all layers."""
    return CACHE_NUMBER * decoder.layers * 2 * decoder.hidden_size


def ask_cold(bundle: Bundle, shape: Shape) -> float:
    """Seconds of a process that loads the bundle and answers one question."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        side = bundle.config.vision.image_size
        Pillow.fromarray(picture(side).pixels).save(image)
        options = ["--model", str(bundle.folder), "--max-new-tokens", str(shape.new), "--json"]
        return cold_start(["ask", str(image), QUESTION, *options])
