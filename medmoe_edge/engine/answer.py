"""What an answer carries."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import Notice


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds. The image's part (`image`, `vision`, `prefix`) is spent once for all its questions.

    `image`: read and prepare; `vision`: tower and projector; `prefix`: prefill of system prompt
    and image tokens; `question`: prefill of the question; `decode`: all further tokens.
    `first_token` is the time from the start to the answer's first token. Where the prefix was kept,
    `vision` is 0 and `prefix` the time to fetch it; `prefix_reused` says so.
    """

    image: float
    vision: float
    prefix: float
    question: float
    decode: float
    first_token: float
    total: float
    tokens: int
    prefix_reused: bool


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the lap that began with the last one's end, or with the clock."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def timings(
    prefix: Mapping[str, float],
    own: Mapping[str, float],
    tokens: int,
    *,
    first: bool,
    reused: bool,
) -> Timings:
    """Of an answer, from the laps of its image's prefix and its own.

    The `first` answer about an image bears the prefix's time; `reused`: that was merely fetched.
    """
    first_token = (sum(prefix.values()) if first else 0.0) + own["question"]
    return Timings(
        **prefix,
        **own,
        first_token=first_token,
        total=first_token + own["decode"],
        tokens=tokens,
        prefix_reused=reused or not first,
    )


class Piece(str):
    """A piece of an answer's text that knows its token.

    Attributes:
        chosen: The token's text and its natural log-probability.
        likely: The same of the most likely tokens at its place, the most likely first.
    """

    chosen: tuple[str, float]
    likely: Sequence[tuple[str, float]]

    def __new__(
        cls, text: str, chosen: tuple[str, float], likely: Sequence[tuple[str, float]]
    ) -> Self:
        """A text with these."""
        piece = super().__new__(cls, text)
        piece.chosen, piece.likely = chosen, likely
        return piece


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question answered.

    `confidence` is the model's own probability of this very answer, end token included, 0 to 1:
    not a calibrated chance of being right. `modality` is the router's reading of the image, None
    where the experts' modalities are not known; `experts` the share of routed tokens, over all
    layers, that each expert took. `model` says by `name` and `sha256` what answered, by `runtime`
    what ran it, and under `verification` what is known of its fidelity: "passed", "failed" or "not
    measured" of a bundle, "reference" of a checkpoint; of a bundle, `verified` says on what
    `machine` (None: not recorded) and whether that holds `here`. `paging` tells how experts were
    brought into memory where that is bounded (`runtimes.paging.report`), else it is None.
    `warnings` are what a person and a program should know before they use the answer: of the model,
    of how the image was read, and of a label that the image is unlike.
    """

    question: str
    text: str
    confidence: float
    modality: str | None
    experts: dict[str, float]
    timings: Timings
    model: dict[str, Any]
    complete: bool = True
    notice: str = NOTICE
    paging: dict[str, Any] | None = None
    warnings: tuple[Notice, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object; the text is under `answer`."""
        values = dataclasses.asdict(self)
        values["warnings"] = list(values["warnings"])
        return {"question": values.pop("question"), "answer": values.pop("text"), **values}
