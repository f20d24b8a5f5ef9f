"""From the probability that a model gives its answer to the chance that this is right.

Both are fitted on answers of the very bundle that will use them, one curve for answers that say yes
or no and one for all others (`config.Confidence`). By how many answers there are of a kind:

    500 or more   isotonic regression, its steps joined by straight lines between their middles
                  (Zadrozny & Elkan, KDD 2002; centred: Oron & Flournoy, Stat. Biopharm. Res. 2017)
    fewer         a logistic curve in the log-odds: temperature and bias (Platt, 1999; Guo et al.,
                  ICML 2017), which few answers cannot bend
    fewer than 50 that of all answers of both kinds

What the confidence is worth is judged by cross-fitting: images are dealt into folds, and the
answers about those of one fold get their confidence, and whether they are unsure, from a fit on all
others. So no answer judges a fit that saw its image. The curves that are kept are fitted on all.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Doubles
from medmoe_edge.bundle.bundle import MANIFEST, Bundle, write_confidence
from medmoe_edge.bundle.trust import SIGNATURE, is_signed
from medmoe_edge.config import Confidence, Curve, answer_kind
from medmoe_edge.data.datasets import Example, owner_of
from medmoe_edge.embedded import is_installed
from medmoe_edge.engine.loading import remember, remembered
from medmoe_edge.errors import DataError, InputError, ResourceError, needs
from medmoe_edge.evaluation.evaluate import Prediction
from medmoe_edge.evaluation.gates import wilson
from medmoe_edge.evaluation.metrics import Share, reliability, selective

FEWEST = 50  # answers that a curve is fitted on
MANY = 500  # from which on it is isotonic
FOLDS = 5
FLAGGED = 0.22  # the most answers that are unsure where nobody asks for another accuracy
SCANS_FLAGGED = 0.02  # the most ordinary questions that a refusal may flag
FLOOR = 0.01  # a less probable refusal never counts: so far down, noise alone orders the answers
EDGE = 1e-6  # probabilities are held this far from 0 and 1, where log-odds are infinite
STEPS = 33  # points of a logistic curve
Flags = npt.NDArray[np.bool_]
Case = tuple[str, float]  # an image or patient, and how probable a refusal was there
Said = tuple[str, Mapping[str, float]]  # the same of every refusal, by its code
Problem = Literal["not separated", "flags too many"]
NOT_SEPARATED: Problem = "not separated"
FLAGS_TOO_MANY: Problem = "flags too many"


class _Answers(NamedTuple):
    """Probability, right (0 or 1) and kind of N answers, and the number of each one's image."""

    probability: Doubles
    right: Doubles
    closed: Flags
    image: npt.NDArray[np.int64]

    def where(self, chosen: Flags) -> "_Answers":
        probability, right, closed, image = self
        return _Answers(probability[chosen], right[chosen], closed[chosen], image[chosen])


class _Fit(NamedTuple):
    closed: Curve
    open: Curve

    def chances(self, answers: _Answers) -> Doubles:
        """The calibrated confidence of answers `[N]`."""
        found = np.empty(len(answers.probability))
        for curve, chosen in ((self.closed, answers.closed), (self.open, ~answers.closed)):
            places, chances = np.array(curve.points).T
            found[chosen] = np.interp(answers.probability[chosen], places, chances)
        return found


def fit_confidence(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    *,
    data: str,
    data_sha256: str,
    selective_accuracy: float | None = None,
) -> Confidence:
    """Fit a bundle's confidence on its own answers to questions whose answers are known.

    Args:
        examples: The questions; those without a reference answer are left out.
        predictions: Their answers, with the model's own probability as `confidence`.
        data: The name of the questions, to be recorded.
        data_sha256: Their hash.
        selective_accuracy: Which share of the answers that are not unsure should be right. None:
            as large a one, in whole percent, as being unsure of 22% of the answers gives.

    Returns:
        The curves, the threshold and what they are worth.

    Raises:
        DataError: There are too few answers or images, or all answers are right, or all wrong.
        InputError: No part of the answers is right as often as `selective_accuracy` asks.
    """
    answers = _answers(examples, predictions)
    crossed, unsure = np.empty(len(answers.right)), np.empty(len(answers.right), np.bool_)
    for held in _folds(answers.image):
        rest, asked = answers.where(~held), answers.where(held)
        crossed[held] = _fit(rest).chances(asked)
        found = choose_threshold(_crossed(rest), rest.right, selective_accuracy)
        unsure[held] = crossed[held] < found[0] if found else True
    chosen = choose_threshold(crossed, answers.right, selective_accuracy)
    if chosen is None:
        raise InputError(
            f"No tenth of the answers is right in {selective_accuracy:.0%} of cases.",
            "Ask for a lower --selective-accuracy, or leave it out.",
        )
    fit = _fit(answers)
    return Confidence(
        closed=fit.closed,
        open=fit.open,
        threshold=chosen[0],
        selective_accuracy=chosen[1],
        images=len({example.image for example in examples if example.answer}),
        data=data,
        data_sha256=data_sha256,
        before=reliability(answers.probability, answers.right),
        after=reliability(crossed, answers.right),
        unsure=selective(unsure, answers.right),
    )


def fit_curve(probability: npt.ArrayLike, right: npt.ArrayLike) -> Curve:
    """The chance of being right by the probability of an answer, from N answers.

    Args:
        probability: `[N]`, 0 to 1, as the model gives them.
        right: `[N]`, 0 or 1.

    Returns:
        A monotone curve; it never says 0 or 1, which no number of answers could show.
    """
    given, correct = (np.asarray(values, np.float64) for values in (probability, right))
    fitted = _isotonic if len(given) >= MANY else _logistic
    points = fitted(given, correct)
    least = 1 / (len(given) + 2)  # Laplace's rule of succession
    return Curve(
        method="isotonic" if fitted is _isotonic else "logistic",
        questions=len(given),
        points=tuple((x, min(max(y, least), 1 - least)) for x, y in points),
    )


def choose_threshold(
    confidence: npt.ArrayLike, right: npt.ArrayLike, selective_accuracy: float | None = None
) -> tuple[float, float] | None:
    """The confidence below which answers are unsure, and the accuracy it was chosen for.

    Args:
        confidence: `[N]`, 0 to 1.
        right: `[N]`, 0 or 1.
        selective_accuracy: Which share of the surer answers should be right; as few as possible
            are unsure for it. None: the largest, in whole percent, for which at most 22% are.

    Returns:
        Both; None where not even the surest tenth is right that often.
    """
    said, correct = (np.asarray(values, np.float64) for values in (confidence, right))
    levels, inverse, counts = np.unique(-said, return_inverse=True, return_counts=True)
    kept = np.cumsum(counts)  # answers at least as sure as each level, the surest level first
    accuracy = np.cumsum(np.bincount(inverse, weights=correct)) / kept
    if selective_accuracy is None:
        most = accuracy[kept >= (1 - FLAGGED) * len(said)].max()
        selective_accuracy = math.floor(100 * most + 1e-9) / 100
    good = np.flatnonzero((accuracy >= selective_accuracy) & (kept >= 0.1 * len(said)))
    if not len(good):
        return None
    return float(-levels[good[-1]]), selective_accuracy


def refusal_threshold(usual: npt.ArrayLike, refused: npt.ArrayLike) -> float:
    """The probability from which on a refusal counts.

    At most `SCANS_FLAGGED` of what should be answered may reach it. Of all such thresholds from
    `FLOOR` on those count that catch most of what should be refused, and of these the one in the
    middle, in log-odds, is furthest from both.

    Args:
        usual: The refusal's probabilities `[N]`, N >= 1, where an answer is wanted.
        refused: Those `[M]` where the refusal is right; where none can be caught, the threshold is
            0.5 or above.

    Returns:
        The threshold, 0 to 1. It is 1, and more are flagged, where more of `usual` are at 1.
    """
    answered, wanted = (np.sort(np.asarray(one, np.float64)) for one in (usual, refused))
    allowed = math.floor(SCANS_FLAGGED * len(answered))
    least = float(answered[-1 - allowed])
    above = float(np.nextafter(least, 1))
    caught = wanted[wanted > max(least, FLOOR)]
    if not len(caught):
        return max(0.5, above)
    most = float(caught[0])
    low, high = (math.log(p / (1 - p)) for p in np.clip((least, most), EDGE, 1 - EDGE))
    middle = 1 / (1 + math.exp(-(low + high) / 2))
    return min(max(middle, above, FLOOR), most)


@dataclass(frozen=True)
class RefusalFit:
    """The threshold of a refusal, and what it flags, each case by a fit that never saw its image.

    `usual` is the share of what should be answered, `refused` of what should be refused (None:
    there was nothing of the kind). `problems`: it is not shown to flag more of what should be
    refused than of the rest ("not separated"; the threshold is then chosen as if there was nothing
    to refuse), or it flags more than `SCANS_FLAGGED` of what should be answered ("flags too many").
    """

    threshold: float
    usual: Share
    refused: Share | None
    problems: tuple[Problem, ...] = ()


def fit_refusal(usual: Sequence[Case], refused: Sequence[Case]) -> RefusalFit:
    """Choose a threshold as `refusal_threshold` does, and judge it by cross-fitting over images.

    Args:
        usual: Cases where an answer is wanted: each one's image (or patient), and the refusal's
            probability.
        refused: Cases where the refusal is right.

    Returns:
        The threshold, what it flags, and whether it is fit for use.

    Raises:
        DataError: The cases where an answer is wanted are about fewer than two images.
    """
    images = {image for image, _ in usual}
    if len(images) < 2:
        raise DataError(
            f"Questions about {len(images)} images are too few to choose a refusal's threshold.",
            "Give questions about two images or more.",
        )
    fit, problems = _judged(usual, refused, learn=True), []
    # both bounds are one-sided at 95%: chance alone brings a problem or hides one that seldom
    if fit.refused and wilson(fit.refused)[0] <= max(SCANS_FLAGGED, fit.usual.share):
        fit = _judged(usual, refused, learn=False)
        problems.append(NOT_SEPARATED)
    flagged = sum(probability >= fit.threshold for _, probability in usual)
    if flagged > SCANS_FLAGGED * len(usual) or wilson(fit.usual)[0] > SCANS_FLAGGED:
        problems.append(FLAGS_TOO_MANY)
    return replace(fit, problems=tuple(problems))


def fit_refusals(
    codes: Iterable[str],
    usual: Sequence[Said],
    scans: Sequence[Said],
    pictures: Sequence[Said],
) -> dict[str, RefusalFit]:
    """Fit the refusals of a model, by their codes.

    Args:
        codes: Which refusals it has.
        usual: What was said where an answer is wanted: each time the image (or patient), and how
            probable each refusal was.
        scans: The same of one question about scans of all kinds. Not all of them can answer it, so
            it says nothing of "not_answerable".
        pictures: The same about pictures that are no scans, which are for "not_a_scan" alone.
    """
    wanted = {code: [*usual, *(scans if code != "not_answerable" else ())] for code in codes}
    return {
        code: fit_refusal(
            [(image, said[code]) for image, said in wanted[code]],
            [(image, said[code]) for image, said in pictures if code == "not_a_scan"],
        )
        for code in wanted
    }


def _judged(usual: Sequence[Case], refused: Sequence[Case], *, learn: bool) -> RefusalFit:
    """A threshold and what it flags; it is chosen by what should be refused if it is to `learn`."""
    cases = [*usual, *refused]
    values = np.array([probability for _, probability in cases], np.float64)
    image = np.unique([name for name, _ in cases], return_inverse=True)[1]
    wanted = np.arange(len(cases)) >= len(usual)

    def chosen(seen: Flags) -> float:
        return refusal_threshold(values[seen & ~wanted], values[seen & wanted] if learn else [])

    flagged = np.zeros(len(cases), np.bool_)
    for held in _folds(image, first=image[~wanted]):
        flagged[held] = values[held] >= chosen(~held)
    return RefusalFit(
        threshold=chosen(np.ones(len(cases), np.bool_)),
        usual=Share.of(int(flagged[~wanted].sum()), len(usual)),
        refused=Share.of(int(flagged[wanted].sum()), len(refused)) if refused else None,
    )


def check_fittable(folder: Path) -> None:
    """Raise before anything is asked where the confidence of a model could not be kept.

    Raises:
        InputError: It is no bundle, part of an installation, or signed.
        ResourceError: The folder cannot be written.
    """
    if not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder} is no bundle, and confidence is kept in a bundle.",
            "Export the model first: medmoe-edge export CHECKPOINT",
        )
    if is_installed(folder):
        raise InputError(
            f"{folder} is part of an installation, whose files are not changed.",
            "Fit the confidence of a copy of the bundle.",
        )
    if is_signed(folder):
        raise InputError(
            f"{folder} is signed: with another confidence in it, its signature would not hold.",
            f"Fit a copy without {SIGNATURE}, and sign that: medmoe-edge verify COPY --sign KEY",
        )
    if not os.access(folder, os.W_OK):
        raise ResourceError(f"{folder} cannot be written.", "Work on a copy of the bundle.")


def keep_confidence(
    folder: Path, confidence: Confidence, refusals: Mapping[str, RefusalFit]
) -> Bundle:
    """Write what was fitted into a bundle's manifest; its graphs and its verification stand.

    The manifest names the refusals that have problems, beside their thresholds. Returns the bundle
    as it is now, under a new hash; raises `ResourceError` where it cannot be written.
    """
    bundle = Bundle.open(folder, verify=False)
    proof = remembered(bundle)
    thresholds = {code: fit.threshold for code, fit in refusals.items()}
    doubtful = tuple(code for code, fit in refusals.items() if fit.problems)
    kept = replace(confidence, doubtful_refusals=doubtful)
    written = write_confidence(bundle, kept, thresholds)
    if proof:  # what was found out on this machine holds of the same graphs under their new hash
        remember(written, proof)
    return written


def _answers(examples: Sequence[Example], predictions: Sequence[Prediction]) -> _Answers:
    pairs = [
        (example, one)
        for example, one in zip(examples, predictions, strict=True)
        if example.answer and one.confidence is not None
    ]
    right = np.array([one.correct for _, one in pairs], np.float64)
    groups = [owner_of(example) for example, _ in pairs]
    image = np.unique(groups, return_inverse=True)[1] if groups else np.zeros(0, np.int64)
    if len(pairs) < FEWEST or image.max() < 2:
        raise DataError(
            f"{len(pairs)} answers about {len(set(groups))} images are too few to fit confidence.",
            f"Give at least {FEWEST} questions with answers, about three images or more.",
        )
    if right.min() == right.max():
        raise DataError(
            f"All {len(pairs)} answers are {'right' if right[0] else 'wrong'}: they do not show "
            "which confidence means what.",
            "Give questions of which some are answered right and some wrong.",
        )
    return _Answers(
        np.array([one.confidence for _, one in pairs], np.float64),
        right,
        np.array([answer_kind(one.prediction) == "closed" for _, one in pairs]),
        image,
    )


def _folds(
    image: npt.NDArray[np.int64], first: npt.NDArray[np.int64] | None = None
) -> Iterator[Flags]:
    """Which of N answers are held out, once each; those about one image together.

    Args:
        image: `[N]`, the number of each one's image.
        first: Images that are dealt apart from the others, so that they spread over the folds.
    """
    order, images = np.random.default_rng(0), np.unique(image)
    groups = [images] if first is None else [np.unique(first), np.setdiff1d(images, first)]
    count = min(FOLDS, len(images))
    dealt = [np.array_split(order.permutation(group), count) for group in groups]
    for parts in zip(*dealt, strict=True):
        yield np.isin(image, np.concatenate(parts))


def _crossed(answers: _Answers) -> Doubles:
    """Each answer's confidence by a fit without its image."""
    found = np.empty(len(answers.right))
    for held in _folds(answers.image):
        found[held] = _fit(answers.where(~held)).chances(answers.where(held))
    return found


def _fit(answers: _Answers) -> _Fit:
    curves = []
    for chosen in (answers.closed, ~answers.closed):
        some = answers.where(chosen) if chosen.sum() >= FEWEST else answers
        curves.append(fit_curve(some.probability, some.right))
    return _Fit(*curves)


def _isotonic(probability: Doubles, right: Doubles) -> list[tuple[float, float]]:
    with needs("export"):
        from scipy.optimize import isotonic_regression
    levels, inverse, counts = np.unique(probability, return_inverse=True, return_counts=True)
    share = np.bincount(inverse, weights=right) / counts
    found = isotonic_regression(share, weights=counts)
    starts = found.blocks[:-1]
    weights = np.add.reduceat(counts, starts)
    middles = np.add.reduceat(levels * counts, starts) / weights
    return list(zip(middles.tolist(), found.x[starts].tolist(), strict=True))


def _logistic(probability: Doubles, right: Doubles) -> list[tuple[float, float]]:
    """Slope and bias of the most likely curve, with Platt's targets, which are never 0 or 1."""
    with needs("export"):
        from scipy.optimize import minimize
        from scipy.special import expit, logit
    given = logit(probability.clip(EDGE, 1 - EDGE))
    hits, misses = right.sum(), (1 - right).sum()
    wanted = np.where(right > 0, (hits + 1) / (hits + 2), 1 / (misses + 2))

    def loss(parameters: Doubles) -> tuple[float, Doubles]:
        """The negative log-likelihood and its gradient."""
        score = parameters[0] * given + parameters[1]
        gap = expit(score) - wanted
        likely = np.logaddexp(0, score) - wanted * score
        return float(likely.sum()), np.array([(gap * given).sum(), gap.sum()])

    start, bounds = (1.0, 0.0), ((0, None), (None, None))
    slope, bias = minimize(loss, start, jac=True, bounds=bounds).x
    ends = logit(EDGE), logit(1 - EDGE)
    places = np.linspace(*ends, STEPS)
    chances = expit(slope * places + bias)
    return list(zip(expit(places).tolist(), chances.tolist(), strict=True))
