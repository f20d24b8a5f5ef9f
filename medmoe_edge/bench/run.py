"""What answering costs on this machine, in time and memory.

All measurements take turns, so that other work on the machine affects all of them alike; results
are medians and quartiles. Every model has a process of its own, so that its memory is its own.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from medmoe_edge._types import Progress, no_progress
from medmoe_edge.bench import measurement, worker
from medmoe_edge.bench.backends import QUESTION, find_bundle, save_picture, shape_of
from medmoe_edge.bench.measurement import Allowance, Measured, Shape, Spread, Stream
from medmoe_edge.bench.peers import Comparison, Materials, Peer, compare
from medmoe_edge.bench.worker import Measurement, Worker
from medmoe_edge.bundle.bundle import Bundle
from medmoe_edge.bundle.machine import Arithmetic, cpu_flags, cpu_name, memory_here
from medmoe_edge.config import DecoderConfig
from medmoe_edge.embedded import EMBEDDED, checkpoint_path
from medmoe_edge.errors import Told, plain
from medmoe_edge.runtimes.costs import Asked, Precision, bits_per_weight, step_work
from medmoe_edge.runtimes.ort.runtime import int8_arithmetic

ROUNDS = 5
ALLOWANCE = 30.0  # seconds of everything measured, in which it is repeated
LENGTHS = (128, 256, 512, 1024, 2048)
QUESTIONS = (1, 2, 4, 8)
CACHE_NUMBER = 4  # bytes of a number in the KV cache on a CPU


@dataclass(frozen=True)
class Machine:
    """What it was measured on.

    Attributes:
        instructions: The best instruction set that int8 kernels have here: processors of one name
            differ in it by a factor.
        arithmetic: How int8 products are added; see `machine.Machine`.
        memory: Bytes.
        load: Processors that other programs kept busy in the minute before.
        bandwidth: Of reading memory, in bytes per second.
    """

    cpu: str
    instructions: str
    arithmetic: Arithmetic
    threads: int
    memory: int
    load: float | None
    bandwidth: Spread

    def __str__(self) -> str:
        return f"{self.cpu} ({self.instructions}, {self.arithmetic} int8), {self.threads} threads"


@dataclass(frozen=True)
class Length:
    """A prefill of so many `tokens`; `peak` bytes of the process meanwhile, before any longer one.

    A heap seldom shrinks: what came before counts.
    """

    tokens: int
    seconds: Spread
    peak: int | None


@dataclass(frozen=True)
class Bench(Told):
    """All that was measured of a bundle.

    Attributes:
        cold_start: Seconds of a whole process that answers one question.
        decode_bytes: The weights and the cache that one token reads.
        cache_token_bytes: What the KV cache holds for one token.
        questions: Seconds of so many about one image.
    """

    model: str
    sha256: str
    precision: str
    machine: Machine
    shape: Shape
    cold_start: Spread
    measured: Measured
    decode_bytes: float
    cache_token_bytes: int
    lengths: tuple[Length, ...]
    questions: Mapping[int, Spread]
    peers: tuple[Comparison, ...]

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of the prompt."""
        return self.measured.prefill_rate(self.shape)

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the answer."""
        return self.measured.decode_rate(self.shape)

    @property
    def second_over_first(self) -> float:
        """Time to the first token of a second question, over that of the first."""
        parts = self.measured.seconds
        return parts["second"].median / (parts["vision"].median + parts["prefill"].median)

    @property
    def bandwidth_share(self) -> float:
        """How much of the memory's bandwidth decoding uses; caches that hold weights add to it."""
        return self.decode_bytes * self.decode_rate / self.machine.bandwidth.median

    @property
    def token_bytes(self) -> float | None:
        """Bytes by which the peak rises with a token of the prompt.

        Among lengths beyond a question's, whose memory the process already had; None with fewer
        than two of them, or off Linux.
        """
        seen = [
            (length.tokens, length.peak)
            for length in self.lengths
            if length.peak and length.tokens > self.shape.prompt
        ]
        if len(seen) < 2:
            return None
        tokens, peaks = np.array(seen, np.float64).T
        return float(np.polyfit(tokens, peaks, 1)[0])

    @property
    def length_ratio(self) -> float | None:
        """Prefill time per token, of the worst length over the best; None without lengths."""
        each = [length.seconds.median / length.tokens for length in self.lengths]
        return max(each) / min(each) if each else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; seconds and bytes."""
        looks = [{"questions": count, "seconds": each} for count, each in self.questions.items()]
        return super().to_json() | {
            "questions": plain(looks),
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "second_over_first": self.second_over_first,
            "decode_share_of_bandwidth": self.bandwidth_share,
            "memory_per_prompt_token": self.token_bytes,
            "prefill_worst_over_best_length": self.length_ratio,
        }


def bench(
    model: str = "nano",
    *,
    rounds: int = ROUNDS,
    peers: Sequence[Peer] = (),
    checkpoint: str | None = None,
    progress: Progress = no_progress,
) -> Bench:
    """Measure a bundle, and beside it what a user would run instead.

    Args:
        model: A bundle's folder or name.
        rounds: Turns, or fewer of what takes long: one at least.
        peers: See `peers.PEERS`.
        checkpoint: What the bundle was exported from, which peers load; of an embedded model it is
            known. Without it they load random weights of the same shapes.
        progress: Told of each turn.

    Raises:
        ModelError: The bundle or the checkpoint cannot be used.
        InputError: A checkpoint stands in the bundle's place.
        ResourceError: Measuring fails.
    """
    bundle = find_bundle(model)
    if checkpoint is None and model in EMBEDDED:
        checkpoint = model
    weights = checkpoint_path(checkpoint) if checkpoint else None
    steps, allowance = 2 * rounds + len(peers), Allowance(ALLOWANCE)
    run = _Run(bundle)
    for done in range(rounds):
        progress("starting", done, steps)
        allowance.take("starting", run.start)
    with worker.Worker() as own:
        run.measurement.open(own)
        for done in range(rounds, 2 * rounds):
            for what, take in run.turns(own).items():
                progress(what, done, steps)
                allowance.take(what, take)
    found = []
    if peers:
        with Materials(bundle, weights) as materials:
            for done, peer in enumerate(peers, 2 * rounds):
                progress(peer.title, done, steps)
                found.append(compare(peer, materials, run.shape, rounds))
    return run.result(found)


class _Run:
    """The bundle's own figures, gathered round by round."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.shape = bundle, shape_of(bundle)
        self.measurement = Measurement(bundle, self.shape)
        limit = bundle.config.decoder.max_positions
        self.load = psutil.getloadavg()[0]  # before our own work adds to it
        self.cold: list[float] = []
        self.bandwidth: list[float] = []
        self.lengths: dict[int, list[float]] = {n: [] for n in LENGTHS if n <= limit}
        self.peaks: dict[int, int | None] = {}
        self.questions: dict[int, list[float]] = {n: [] for n in QUESTIONS}
        self._stream = Stream()

    def start(self) -> None:
        """A whole process that answers, and one that only loads."""
        self.cold.append(ask_cold(self.bundle, self.shape))
        with worker.Worker() as own:
            self.measurement.open(own)

    def turns(self, own: Worker) -> Mapping[str, Callable[[], object]]:
        """A turn of everything that a loaded bundle does, by what it is."""
        bandwidth = self._stream.bandwidth
        return {
            "memory bandwidth": lambda: self.bandwidth.extend(measurement.turn(bandwidth)),
            "a question": partial(self.measurement.turn, own),
            **{
                f"prefill of {tokens:,} tokens": partial(self._prefill, own, tokens)
                for tokens in self.lengths
            },
            **{
                f"questions about one image: {count}": partial(self._ask, own, count)
                for count in self.questions
            },
        }

    def _prefill(self, own: Worker, tokens: int) -> None:
        self.lengths[tokens] += own.ask("prefill", tokens=tokens)
        self.peaks.setdefault(tokens, own.ask("memory")["peak"])

    def _ask(self, own: Worker, count: int) -> None:
        self.questions[count] += own.ask("ask", questions=count)

    def result(self, peers: Sequence[Comparison]) -> Bench:
        """All of it."""
        return Bench(
            model=self.bundle.name,
            sha256=self.bundle.sha256,
            precision=self.bundle.manifest["quantisation"]["precision"],
            machine=Machine(
                cpu=cpu_name(),
                instructions=next(iter(cpu_flags()), "unknown"),
                arithmetic=int8_arithmetic(),
                threads=measurement.threads(),
                memory=memory_here(),
                load=self.load,
                bandwidth=Spread.of(self.bandwidth),
            ),
            shape=self.shape,
            cold_start=Spread.of(self.cold),
            measured=self.measurement.result(),
            decode_bytes=decode_bytes(self.bundle, self.shape),
            cache_token_bytes=cache_token_bytes(self.bundle.config.decoder),
            lengths=tuple(
                Length(tokens, Spread.of(seconds), self.peaks[tokens])
                for tokens, seconds in self.lengths.items()
            ),
            questions={n: Spread.of(seconds) for n, seconds in self.questions.items()},
            peers=tuple(peers),
        )


def decode_bytes(bundle: Bundle, shape: Shape) -> float:
    """Bytes of weights and KV cache that a token in the middle of the answer reads."""
    precision: Precision = bundle.manifest["quantisation"]["precision"]
    asked = Asked.of_bundle(bundle)
    work = step_work(bundle.config, 1, shape.prompt + shape.new // 2)
    weights = (
        n * bits_per_weight(kind, precision, asked.group, asked.deltas) / 8
        for kind, n in work.weights.items()
    )
    return sum(weights) + CACHE_NUMBER * work.cache


def cache_token_bytes(decoder: DecoderConfig) -> int:
    """Bytes of one token's keys and values in all layers."""
    return CACHE_NUMBER * decoder.layers * 2 * decoder.hidden_size


def ask_cold(bundle: Bundle, shape: Shape) -> float:
    """Seconds of a process that loads the bundle and answers one question."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        save_picture(bundle.config.vision.image_size, image)
        options = ["--model", str(bundle.folder), "--max-new-tokens", str(shape.new), "--json"]
        return worker.cold_start(["ask", str(image), QUESTION, *options])
