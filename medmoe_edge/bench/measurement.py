"""One model measured: opened in a worker, or in several, and asked in turns."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from medmoe_edge.bench.backends import QUESTION, Kind, Shape
from medmoe_edge.bench.process import Worker
from medmoe_edge.bench.timing import Spread
from medmoe_edge.bundle.bundle import MANIFEST, Bundle
from medmoe_edge.embedded import bundle_path
from medmoe_edge.errors import InputError
from medmoe_edge.prompt import Tokenizer

NEW_TOKENS = 8
Progress = Callable[[str, int, int], None]  # told of (step, done, total)


@dataclass(frozen=True)
class Measured:
    """Seconds by part, and bytes.

    `load` until the model could answer; `vision`, `prefill` and `decode` of the first question,
    which together are `question`; `second`, from the next question about the same image to its
    first token. In memory were at most `loading` bytes until then, and while it answered `peak`;
    after that `resident`. Bytes are None off Linux.
    """

    seconds: Mapping[str, Spread]
    resident: int | None
    peak: int | None
    loading: int | None


class Measurement:
    """Gathers what workers tell of one model; `form` as `open_contestant` has it."""

    def __init__(
        self,
        bundle: Bundle,
        shape: Shape,
        kind: Kind = "bundle",
        path: Path | None = None,
        form: str = "",
    ) -> None:
        self._opening = {
            "kind": kind,
            "path": str((path or bundle.folder).resolve()),
            "form": form,
            "config": bundle.config.to_json(),
            "shape": asdict(shape),
        }
        self._seconds: dict[str, list[float]] = {}
        self._bytes: dict[str, list[int | None]] = {}

    def open(self, worker: Worker) -> None:
        """Load it, and ask once to have its memory."""
        opened = worker.ask("open", **self._opening)
        self._seconds.setdefault("load", []).append(opened["load"])
        worker.ask("question")
        for name, count in {"loading": opened["peak"], **worker.ask("memory")}.items():
            self._bytes.setdefault(name, []).append(count)

    def turn(self, worker: Worker) -> None:
        """Ask for as long as a turn takes."""
        for parts in worker.ask("question"):
            whole = sum(value for name, value in parts.items() if name != "second")
            for name, value in {**parts, "question": whole}.items():
                self._seconds.setdefault(name, []).append(value)

    def result(self) -> Measured:
        """Medians over all workers and turns; one of each at least."""
        spreads = {name: Spread.of(values) for name, values in self._seconds.items()}
        memory = {name: _median(counts) for name, counts in self._bytes.items()}
        return Measured(spreads, memory["resident"], memory["peak"], memory["loading"])


def no_progress(step: str, done: int, total: int) -> None:
    """Tells nobody."""


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


def prefill_rate(measured: Measured, shape: Shape) -> float:
    """Tokens per second of the prompt."""
    return shape.prompt / measured.seconds["prefill"].median


def decode_rate(measured: Measured, shape: Shape) -> float:
    """Tokens per second of the answer, whose first one belongs to the prefill."""
    return (shape.new - 1) / measured.seconds["decode"].median


def _median(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return int(median(known)) if known else None
