"""`medmoe-edge bench`: what answering costs on this machine, in time and memory.

What is measured takes turns, so that other work on the machine hits all of it alike; told are
medians and quartiles. Every model is in a process of its own, so its memory is its own.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image as Pillow

from medmoe_edge.bench_contestants import QUESTION, Shape, picture
from medmoe_edge.bench_machine import Stream, load_average, threads
from medmoe_edge.bench_measurement import Measurement
from medmoe_edge.bench_peers import PEERS, Comparison, Materials, compare
from medmoe_edge.bench_process import Worker, cold_start
from medmoe_edge.bench_result import Bench, Length, Machine
from medmoe_edge.bench_timing import Spread, turn
from medmoe_edge.bundle import MANIFEST, Bundle
from medmoe_edge.devices import cpu_name, memory_here
from medmoe_edge.embedded import EMBEDDED, bundle_path, checkpoint_path
from medmoe_edge.errors import InputError
from medmoe_edge.planning_costs import Precision, bits_per_weight, step_work
from medmoe_edge.prompt import Tokenizer

ROUNDS = 5
NEW_TOKENS = 8
LENGTHS = (128, 256, 512, 1024, 2048)
QUESTIONS = (1, 2, 4, 8)
CACHE_NUMBER = 4  # bytes of a number in the KV cache on a CPU
Progress = Callable[[str, int, int], None]


def bench(
    model: str = "nano",
    *,
    rounds: int = ROUNDS,
    peers: bool = False,
    checkpoint: str | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure a bundle, and with `peers` what a user would run instead.

    `checkpoint`, a folder or a name, is what the bundle was exported from and what peers load; of
    an embedded model it is known, and without it they load random weights of the same shapes.
    `progress` is called with `(step, done, total)`. Raises `ModelError` for what cannot be used,
    `InputError` for a checkpoint in the bundle's place, and `ResourceError` where measuring fails.
    """
    folder = bundle_path(model)
    if not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder} is no bundle, so there is nothing to measure.",
            "Export it first: medmoe-edge export CHECKPOINT.",
        )
    bundle = Bundle.open(folder)
    if checkpoint is None and model in EMBEDDED:
        checkpoint = model
    weights = checkpoint_path(checkpoint) if checkpoint else None
    report = progress or (lambda step, done, total: None)
    steps = 2 * rounds + len(PEERS) * peers
    shape = shape_of(bundle)
    run = _Run(bundle, shape)
    for done in range(rounds):
        report("starting", done, steps)
        run.start()
    with run.opened() as worker:
        for done in range(rounds, 2 * rounds):
            report("asking", done, steps)
            run.ask(worker)
    found = []
    if peers:
        with Materials(bundle, weights) as materials:
            for done, peer in enumerate(PEERS, 2 * rounds):
                report("peers", done, steps)
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

    def ask(self, worker: Worker) -> None:
        """A turn for everything that a loaded bundle does."""
        self.bandwidth += turn(self._stream.bandwidth)
        self.measurement.turn(worker)
        for tokens, seconds in self.lengths.items():
            seconds += worker.ask("prefill", tokens=tokens)
            self.peaks[tokens].append(worker.ask("memory")["peak"])
        for count, seconds in self.questions.items():
            seconds += worker.ask("ask", questions=count)

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
            lengths=tuple(
                Length(tokens, Spread.of(seconds), self.peaks[tokens][0])
                for tokens, seconds in self.lengths.items()
            ),
            questions={n: Spread.of(seconds) for n, seconds in self.questions.items()},
            peers=tuple(peers),
        )


def shape_of(bundle: Bundle) -> Shape:
    """The tokens of one question as the bundle's own tokenizer cuts it."""
    tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
    before, after = tokenizer.prefix_ids(), tokenizer.question_ids(QUESTION)
    return Shape(len(before), bundle.config.vision.image_tokens, len(after), NEW_TOKENS)


def decode_bytes(bundle: Bundle, shape: Shape) -> float:
    """Bytes of weights and KV cache that a token in the middle of the answer reads."""
    precision: Precision = bundle.manifest["quantisation"]["precision"]
    work = step_work(bundle.config, 1, shape.prompt + shape.new // 2)
    weights = (n * bits_per_weight(kind, precision) / 8 for kind, n in work.weights.items())
    return sum(weights) + CACHE_NUMBER * work.cache


def ask_cold(bundle: Bundle, shape: Shape) -> float:
    """Seconds of a process that loads the bundle and answers one question."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        side = bundle.config.vision.image_size
        Pillow.fromarray(picture(side).pixels).save(image)
        options = ["--model", str(bundle.folder), "--max-new-tokens", str(shape.new), "--json"]
        return cold_start(["ask", str(image), QUESTION, *options])
