"""The gates that a quantised model must pass, and how a measurement is held against them.

A measurement on few questions is a coarse ruler, so a gate fails only where chance is excluded:
where even the favourable end of the figure's interval misses the bound. The plain figure is always
shown, and it is said where there were too few questions to prove what the gate asks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medmoe_edge.bundle.bundle import Gates
from medmoe_edge.config import Config
from medmoe_edge.evaluation.fidelity import Fidelity, Share

Z = 1.6448536269514722  # one-sided 95%
TITLES = {
    "finite": "Unsound parts",
    "answer_agreement": "Answer agreement",
    "accuracy_drop": "Loss of accuracy",
    "routing_flips": "Routing flips",
    "vision_cosine": "Cosine of image tokens",
    "modality_agreement": "Modality agreement",
    "zero_shot_agreement": "Zero-shot agreement",
    "pooled_cosine": "Cosine of images",
    "region_cosine": "Cosine of regions",
    "text_cosine": "Cosine of texts",
    "weights": "Matrices unlike the checkpoint's",
    "kl": "KL, nats per token",
}


@dataclass(frozen=True)
class GateResult(Config):
    """One gate. `measured` should be at least, or at most, `bound`.

    `interval` is of the figure: `(lowest, highest)`, empty where it is no estimate. `within
    chance`: the figure misses its bound, by no more than chance explains.
    """

    name: str
    measured: float
    bound: float
    at_least: bool
    verdict: Literal["met", "within chance", "failed"]
    interval: tuple[float, ...] = ()
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the gate did not fail."""
        return self.verdict != "failed"

    @property
    def title(self) -> str:
        """What it measures, for people."""
        return TITLES.get(self.name, self.name)

    def shown(self, value: float) -> str:
        """A value for people, as the gate counts: a number, a cosine or a share in percent."""
        if self.name in ("finite", "weights", "kl"):
            return f"{value:.3g}"
        return f"{value:.4f}" if self.name.endswith("_cosine") else f"{value:.2%}"

    @property
    def asked(self) -> str:
        """The bound in words, such as `at least 99.00%`."""
        return f"at {'least' if self.at_least else 'most'} {self.shown(self.bound)}"

    @property
    def bounds(self) -> str:
        """The interval in words; empty where there is none."""
        return " to ".join(map(self.shown, self.interval))

    @property
    def summary(self) -> str:
        """The gate in words, such as `answer agreement 95.24%, should be at least 99.00%`."""
        return f"{self.title.lower()} {self.shown(self.measured)}, should be {self.asked}"


def judge(fidelity: Fidelity, gates: Gates, faults: Sequence[str] = ()) -> list[GateResult]:
    """Hold the figures against the gates; those that do not apply are left out.

    Proportions have Wilson's one-sided 95% bounds, with tokens taken as independent (which makes
    routing the stricter); the others the 95% interval from resampling images.
    """
    broken = len(faults) + (not fidelity.finite)
    agreement = fidelity.overall.answer_agreement
    results = [
        judged("finite", broken, 0, (), at_least=False),
        judged(
            "answer_agreement",
            agreement.share,
            gates.answer_agreement,
            wilson(agreement),
            note=_too_few(agreement.total, gates.answer_agreement),
        ),
    ]
    if accuracy := fidelity.overall.accuracy:
        low, high = accuracy.interval
        drop, interval = 0 - accuracy.difference, (0 - high, 0 - low)  # not -0.0
        results.append(judged("accuracy_drop", drop, gates.accuracy_drop, interval, at_least=False))
    if routing := fidelity.routing:
        flips, interval = routing.flips.share, wilson(routing.flips)
        results.append(
            judged("routing_flips", flips, gates.routing_flips, interval, at_least=False)
        )
    vision = fidelity.vision
    cosine, interval = vision.cosine_mean, vision.cosine_interval
    return [*results, judged("vision_cosine", cosine, gates.vision_cosine, interval)]


def wilson(share: Share) -> tuple[float, float]:
    """Lower and upper one-sided 95% bounds of a proportion.

    Source: Wilson, Probable inference, JASA 22 (1927), 209-212.
    """
    if not share.total:
        return 0.0, 1.0
    p, n = share.count / share.total, share.total
    centre = p + Z**2 / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def _too_few(questions: int, bound: float) -> str:
    """What to say where even perfect agreement, whose lower bound is n / (n + Z^2), proves less."""
    needed = math.ceil(bound * Z**2 / (1 - bound)) if bound < 1 else math.inf
    if questions >= needed:
        return ""
    return f"{questions} questions are too few to prove {bound * 100:g}%: that takes {needed:,}"


def judged(
    name: str,
    measured: float,
    bound: float,
    interval: tuple[float, ...],
    *,
    at_least: bool = True,
    note: str = "",
) -> GateResult:
    best = (interval or (measured, measured))[-1 if at_least else 0]
    sign = 1 if at_least else -1
    verdict: Literal["met", "within chance", "failed"] = "failed"
    if sign * measured >= sign * bound:
        verdict = "met"
    elif sign * best >= sign * bound:
        verdict = "within chance"
    return GateResult(name, measured, bound, at_least, verdict, interval, note)
