"""The gates that a quantised model must pass, and how a measurement is held against them.

A measurement on few questions is a coarse ruler, so it is the figure's interval that is held
against the bound. A gate is met where even the unfavourable end keeps the bound, and fails where
even the favourable end misses it; where the bound lies between the two, it is not decided, however
good the plain figure looks. Then it is said how many questions would decide it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from medmoe_edge.bundle.bundle import Gates
from medmoe_edge.bundle.recorded import Compared
from medmoe_edge.config import Config
from medmoe_edge.evaluation.fidelity import Fidelity, Share
from medmoe_edge.evaluation.metrics import Answers

Z = 1.6448536269514722  # one-sided 95%
WHOLE = "whole_"  # begins the names of gates against the checkpoint with all its image tokens
Outcome = Literal["passed", "not decided", "failed"]
TITLES = {
    "finite": "Unsound parts",
    "answer_agreement": "Answer agreement",
    "accuracy_drop": "Loss of accuracy",
    f"{WHOLE}answer_agreement": "Answers as with all image tokens",
    f"{WHOLE}accuracy_drop": "Accuracy lost to fewer image tokens",
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
    """One gate.

    Attributes:
        name: What is measured.
        measured: The figure.
        bound: What it should be at least or at most.
        at_least: Which of the two.
        verdict: "not decided": the bound lies within the interval. Records of earlier versions say
            "within chance" where the figure itself missed its bound, and "met" wherever it did not.
        interval: Of the figure, `(lowest, highest)`; empty where it is no estimate.
        note: What people should know beside it.
    """

    name: str
    measured: float
    bound: float
    at_least: bool
    verdict: Literal["met", "not decided", "failed", "within chance"]
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


def judge_weights(found: Compared | None) -> list[GateResult]:
    """The gate of the checkpoint's marks; none of a bundle that carries no marks."""
    if found is None:
        return []
    note = ""
    if found.alone < found.scales:
        note = f"One wrong scale alone would be seen in {found.alone:,} of {found.scales:,} scales."
    return [judged("weights", len(found.wrong), 0, (), at_least=False, note=note)]


def judge(fidelity: Fidelity, gates: Gates, faults: Sequence[str] = ()) -> list[GateResult]:
    """Hold the figures against the gates; those that do not apply are left out.

    Proportions have Wilson's one-sided 95% bounds, with tokens taken as independent (which makes
    routing the stricter); the others the 95% interval from resampling images.

    Args:
        fidelity: The figures.
        gates: Of the bundle.
        faults: Parts of the bundle that are not finite.
    """
    broken = len(faults) + (not fidelity.finite)
    results = [
        judged("finite", broken, 0, (), at_least=False),
        *_judge_answers(fidelity.overall, gates),
    ]
    if reduction := fidelity.reduction:
        results += _judge_answers(reduction.answers, gates, WHOLE)
    if routing := fidelity.routing:
        flips, interval = routing.flips.share, wilson(routing.flips)
        results.append(
            judged("routing_flips", flips, gates.routing_flips, interval, at_least=False)
        )
    vision = fidelity.vision
    cosine, interval = vision.cosine_mean, vision.cosine_interval
    return [*results, judged("vision_cosine", cosine, gates.vision_cosine, interval)]


def _judge_answers(answers: Answers, gates: Gates, prefix: str = "") -> Iterator[GateResult]:
    """Agreement and, where answers are known, accuracy; `prefix` is of the gates' names."""
    agreement, bound = answers.answer_agreement, gates.answer_agreement
    yield judged(
        f"{prefix}answer_agreement",
        agreement.share,
        bound,
        wilson(agreement),
        note=too_few(agreement, bound),
    )
    if accuracy := answers.accuracy:
        low, high = accuracy.interval
        drop, interval = 0 - accuracy.difference, (0 - high, 0 - low)  # not -0.0
        yield judged(f"{prefix}accuracy_drop", drop, gates.accuracy_drop, interval, at_least=False)


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


def outcome_of(gates: Iterable[GateResult]) -> Outcome:
    """Of all gates: failed where one failed, passed where all are met."""
    verdicts = {gate.verdict for gate in gates}
    if "failed" in verdicts:
        return "failed"
    return "passed" if verdicts <= {"met"} else "not decided"


def too_few(share: Share, bound: float, what: str = "questions") -> str:
    """What to say where questions are too few; how many of the same share would decide it.

    Wilson's lower bound b of a share p of n solves (p - b)^2 = Z^2 b (1 - b) / n: here for n.
    """
    low, high = wilson(share)
    if not low < bound <= high:
        return ""
    p = share.count / share.total if share.total else 1.0
    if p <= bound:
        return f"{share.total:,} {what} are too few to tell {p:.2%} from {bound:.2%}"
    needed = math.ceil(Z**2 * bound * (1 - bound) / (p - bound) ** 2)
    return f"{share.total:,} {what} are too few to prove {bound * 100:g}%: that takes {needed:,}"


def judged(
    name: str,
    measured: float,
    bound: float,
    interval: tuple[float, ...],
    *,
    at_least: bool = True,
    note: str = "",
) -> GateResult:
    """Hold a figure against its bound by its interval, or alone where it has none."""
    low, high = (interval[0], interval[-1]) if interval else (measured, measured)
    worst, best = (low, high) if at_least else (-high, -low)
    wanted = bound if at_least else -bound
    verdict: Literal["met", "not decided", "failed"] = "failed"
    if worst >= wanted:
        verdict = "met"
    elif best >= wanted:
        verdict = "not decided"
    return GateResult(name, measured, bound, at_least, verdict, interval, note)
