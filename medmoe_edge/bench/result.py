"""What a bench tells, and what follows from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medmoe_edge.bench.backends import Shape
from medmoe_edge.bench.measurement import Measured, decode_rate, prefill_rate
from medmoe_edge.bench.peers import Comparison
from medmoe_edge.bench.timing import Spread


@dataclass(frozen=True)
class Machine:
    """What it was measured on: `bandwidth` of reading its `memory`, in bytes per second.

    `load` is how many processors other programs kept busy in the minute before; None if unknown.
    """

    cpu: str
    threads: int
    memory: int
    load: float | None
    bandwidth: Spread


@dataclass(frozen=True)
class Length:
    """A prefill of so many `tokens`; `peak` bytes of the process meanwhile, before any longer one.

    A heap seldom shrinks: what came before counts.
    """

    tokens: int
    seconds: Spread
    peak: int | None


@dataclass(frozen=True)
class Bench:
    """All that was measured of a bundle.

    `cold_start` is a whole process that answers one question; `decode_bytes` are the weights and
    the cache that one token reads, `cache_token_bytes` what the KV cache holds for one. `questions`
    are seconds of so many about one image.
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
        return prefill_rate(self.measured, self.shape)

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the answer."""
        return decode_rate(self.measured, self.shape)

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
        return asdict(self) | {
            "questions": [
                {"questions": count, "seconds": asdict(spread)}
                for count, spread in self.questions.items()
            ],
            "peers": [peer.to_json() for peer in self.peers],
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "second_over_first": self.second_over_first,
            "decode_share_of_bandwidth": self.bandwidth_share,
            "memory_per_prompt_token": self.token_bytes,
            "prefill_worst_over_best_length": self.length_ratio,
        }
