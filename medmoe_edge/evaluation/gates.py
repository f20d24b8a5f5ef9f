"""The gates that a quantised model must pass, and how a measurement is held against them.

A measurement on few questions is a coarse ruler, so it is the figure's interval that is held
against the bound. A gate is met where even the unfavourable end keeps the bound, and fails where
even the favourable end misses it; where the bound lies between the two, it is not decided, however
good the plain figure looks. Then it is said how many questions would decide it.

Stored weights are held against the marks of the checkpoint's that travel with a bundle.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from medmoe_edge.bundle.bundle import AnyBundle, Gates
from medmoe_edge.bundle.recorded import (
    Array,
    Marks,
    Signature,
    Stored,
    blocks,
    octaves,
    signature_of,
    stored_matrices,
    stored_weights,
    sums_error,
)
from medmoe_edge.config import Config
from medmoe_edge.evaluation.metrics import Answers, Fidelity, Share, wilson_interval

EXPERT = re.compile(r"(|.*\.)(experts\.\d+|meta)\.(.+)")
SURE = 10  # times the distance of two experts' marks over the root of their number: 5 deviations
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


@dataclass(frozen=True)
class Compared(Config):
    """`scales` that were looked at, and matrices whose scales or weights are not the checkpoint's.

    `alone` counts the scales of which a single one, doubled, would be seen; in a large model a norm
    stands for too many. `moved` is how far the worst norm is off, in octaves; `error` the largest
    relative error of a matrix. Wrong is, too, an expert's matrix that is nearer to another's, and
    one that the graphs for paging read otherwise than the whole decoder does.
    """

    scales: int
    wrong: tuple[str, ...]
    moved: float
    error: float
    alone: int


def compare_weights(bundle: AnyBundle[Any]) -> Compared | None:
    """As `compare_signature`, with the bundle's own marks; None of a bundle without any."""
    if (signature := signature_of(bundle)) is None:
        return None
    found = compare_signature(dict(stored_matrices(bundle)), signature)
    return replace(found, wrong=tuple(dict.fromkeys((*found.wrong, *_paged_otherwise(bundle)))))


@np.errstate(invalid="ignore", over="ignore")  # of weights that are not finite
def compare_signature(stored: Mapping[str, Stored], signature: Signature) -> Compared:
    """Hold matrices as `stored_matrices` gives them against a signature; a missing one is wrong."""
    wrong = {matrix.name: "" for matrix in signature.matrices}
    scales, alone, moved, worst = 0, 0, 0.0, 0.0
    found: dict[str, Array] = {}
    for matrix, norms, sums in signature.each():
        if matrix.name not in stored:
            continue
        array, scale = stored[matrix.name]
        marks = Marks.of_stored(matrix, array, scale)
        off = np.abs(octaves(blocks(marks.squares.ravel(), matrix.norm_block)) - norms).max()
        found[matrix.name] = blocks(marks.sums, matrix.sum_block)
        error = sums_error(found[matrix.name] - sums, norms)
        count = 0 if scale is None else scale.size
        scales, alone = scales + count, alone + (count if count and matrix.sees(count) else 0)
        moved, worst = max(moved, float(off)), max(worst, error)
        if off <= matrix.tolerance and error <= matrix.error:
            del wrong[matrix.name]
    odd = dict.fromkeys(_exchanged(signature, found), "")
    return Compared(scales, tuple(wrong | odd), moved, worst, alone)


def _exchanged(signature: Signature, found: Mapping[str, Array]) -> Iterator[str]:
    """Matrices of experts whose sums are nearer to those of another expert of the layer.

    This tells apart experts that differ by less than rounding moves them. With e the error of
    rounding and d the difference to the other, |e + d|^2 - |e|^2 is |d|^2, give or take
    2 |e| |d| / sqrt(N): the signs of the sums know nothing of either.
    """
    layers: dict[tuple[str, str], dict[str, Array]] = {}
    for matrix, _, sums in signature.each():
        if (match := EXPERT.fullmatch(matrix.name)) and matrix.name in found:
            layers.setdefault((match[1], match[3]), {})[matrix.name] = sums
    for experts in layers.values():
        for name, own in experts.items():
            gap = np.linalg.norm(found[name] - own)
            for other in experts.values():
                if other.shape != own.shape:
                    continue
                apart, nearer = np.linalg.norm(other - own), np.linalg.norm(found[name] - other)
                if gap**2 - nearer**2 > SURE * gap * apart / np.sqrt(own.size):
                    yield name


def _paged_otherwise(bundle: AnyBundle[Any]) -> Iterator[str]:
    """Weights that the graphs for paging read from elsewhere than `decoder.onnx`, or otherwise."""
    paging = bundle.manifest.get("paging")
    if not paging or "graphs" not in paging:
        return
    whole = dict(stored_weights(bundle.path("decoder.onnx")))
    parts: dict[str, Array] = {}
    for index in range(paging["segments"]):
        parts |= stored_weights(bundle.path(f"segment.{index}.onnx"))
    data = np.memmap(bundle.path("decoder.data"), np.uint8, "r")
    for owner, expert in paging["experts"].items():
        start = bundle.manifest["experts"][owner][0]
        for name, place in paging["graphs"][expert["graph"]].items():
            kind, at = np.dtype(place["type"]), start + place["offset"]
            size = math.prod(place["shape"]) * kind.itemsize
            parts[f"{owner}.{name}"] = data[at : at + size].view(kind).reshape(place["shape"])
        inline = stored_weights(bundle.path(expert["graph"]), external=False)
        parts |= {f"{owner}.{name}": array for name, array in inline}
    for name, array in parts.items():
        if not np.array_equal(array, whole.get(name, ()), equal_nan=array.dtype.kind == "f"):
            yield name


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
    routing the stricter); the others the 95% interval from resampling patients
    or images.

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
    """Lower and upper one-sided 95% bounds of a proportion."""
    if not share.total:
        return 0.0, 1.0
    return wilson_interval(share.count / share.total, share.total, Z)


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
