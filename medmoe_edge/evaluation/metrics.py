"""The papers' metrics, ours and as they computed them: pure functions of text and numbers.

Normalisation is that of the VQA evaluation (Antol et al., ICCV 2015; `vqaEval.py` of
GT-Vision-Lab/VQA) with the punctuation of LLaVA-Med's copy of it, which Med-MoE uses. Functions
called `official_...` do what the scorer that the authors of Med-MoE published does, its faults
included: their figures can be held against the papers', ours say what was answered.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medmoe_edge.config import Bin, Config, Reliability, Unsure, later
from medmoe_edge.prompt import as_seen

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_GROUPS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")

_OFFICIAL_STOPS = 32  # the official code hands re.UNICODE to `sub` as the count of replacements

_ARTICLES = frozenset({"a", "an", "the"})

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# Of the VQA list; pronouns whose bare form is another word (its, well, shed) appear only doubled.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def normalise(text: str) -> str:
    """Lower case without punctuation or articles; number words as digits, contractions whole.

    As the official function does, punctuation beside a space, or anywhere in a text with digit
    groups such as 1,000, vanishes, and becomes a space elsewhere; decimal points stay. Unlike it,
    a text of nothing but articles or punctuation stays as it is, so that "A" is not "the", and
    what looks the same is the same, such as an accent that is composed and one that is not.
    """
    text = " ".join(as_seen(text).replace("\u2019", "'").lower().split())
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).split()]
    kept = [_WHOLE.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or text


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both texts are the same after normalisation."""
    return normalise(prediction) == normalise(reference)


def closed_correct(prediction: str, reference: str) -> bool:
    """Whether the reference occurs in the prediction, as the official code scores closed answers.

    It is lenient ("no" occurs in "normal"): read it beside the exact match. Spaces around the
    reference do not count, and an empty one is never met.
    """
    wanted = reference.strip().lower()
    return bool(wanted) and wanted in prediction.lower()


def official_closed_correct(prediction: str, reference: str) -> bool:
    """The same to the letter: a reference with a space at its end must be met with it."""
    return reference.lower() in prediction.lower()


def token_recall(prediction: str, reference: str) -> float:
    """The share (0..1) of the reference's words that the prediction holds, after normalisation.

    Its mean over open questions is the papers' figure. A repeated word must be repeated to count;
    LLaVA-Med's code counts the prediction's repetitions, which inflates a babbling answer.
    """
    wanted = Counter(normalise(reference).split())
    found = wanted & Counter(normalise(prediction).split())
    return found.total() / wanted.total() if wanted else 0.0


def official_recall(prediction: str, reference: str) -> float:
    """That share (0..1) as the official scorer counts it.

    A word of the reference counts as often as the *prediction* repeats it, and one that is missing
    as often as the reference has it: tp / (tp + fn) with tp of the prediction. "left left left"
    recalls 3/4 of "left lung".
    """
    said = Counter(_official_words(prediction))
    wanted = Counter(_official_words(reference))
    met = sum(count for word, count in said.items() if word in wanted)
    missing = sum(count for word, count in wanted.items() if word not in said)
    return met / (met + missing) if met else 0.0


def reliability(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, *, bins: int = 10
) -> Reliability:
    """How well `confidence` [N] in 0..1 tells which answers are `correct` [N], 0 or 1.

    The expected calibration error is that of Guo et al., On calibration of modern neural networks,
    ICML 2017: bins of equal width, the gap between mean confidence and accuracy in each, weighted
    by its answers.
    """
    said, right = (np.asarray(values, np.float64) for values in (confidence, correct))
    place = np.minimum((said * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (said, right)]
    gaps = np.abs(sums[1] - sums[0])
    return Reliability(
        n=len(said),
        accuracy=float(right.mean()),
        ece=float(gaps.sum() / len(said)),
        bins=tuple(
            Bin(int(n), float(told / n), float(hits / n))
            for n, told, hits in zip(counts, *sums, strict=True)
            if n
        ),
        risk_coverage=risk_coverage(said, right),
    )


def risk_coverage(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, *, steps: int = 10
) -> tuple[tuple[float, float], ...]:
    """Pairs (coverage, risk): the error rate among the most confident share of the answers.

    Coverage goes from 1/steps to 1. Of answers of equal confidence each counts as their mean, as if
    one did not know which comes first. Source: Geifman & El-Yaniv, Selective classification for
    deep neural networks, NeurIPS 2017.
    """
    said, right = (np.asarray(values, np.float64) for values in (confidence, correct))
    _, place, counts = np.unique(-said, return_inverse=True, return_counts=True)
    mean = np.bincount(place, weights=1 - right) / counts
    errors = mean[np.sort(place)]
    shares = [step / steps for step in range(1, steps + 1)]
    kept = [max(1, round(share * len(errors))) for share in shares]
    return tuple(
        (share, float(errors[:count].mean())) for share, count in zip(shares, kept, strict=True)
    )


def selective(unsure: npt.ArrayLike, correct: npt.ArrayLike) -> Unsure:
    """What being `unsure` [N] (true or false) of answers gives, `correct` [N] being 0 or 1."""
    doubted, right = np.asarray(unsure, np.bool_), np.asarray(correct, np.float64)
    errors, sure = 1 - right, right[~doubted]
    return Unsure(
        answers=float(doubted.mean()),
        errors=float(errors[doubted].sum() / max(errors.sum(), 1)),
        accuracy=float(sure.mean()) if len(sure) else 0.0,
    )


Z95 = 1.959963984540054  # two-sided 95% of a normal distribution


def bootstrap_interval(
    values: npt.ArrayLike, groups: npt.ArrayLike, *, shares: bool = False, rounds: int = 1000
) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` [N], resampling whole `groups` [N].

    Questions about one image, or one patient, are not independent, so these are what is drawn
    (cluster bootstrap; Davison & Hinkley, Bootstrap Methods, 1997, hierarchical data). Where all
    are right, or all wrong, that has no width, and Wilson's interval over the groups stands in; of
    `shares` (0 to 1) also where all groups are alike otherwise, as where there is only one.
    """
    data = np.asarray(values, dtype=np.float64)
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(member, weights=data), np.bincount(member)  # [G]
    count = len(sizes)
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=rounds)
    means = (draws @ sums) / (draws @ sizes)  # [rounds]
    low, high = np.quantile(means, (0.025, 0.975))
    if high - low < 1e-9 and (shares or low in (0, 1)):  # drawing on and on finds no other image
        return wilson_interval(float(low), count, Z95)
    return float(low), float(high)


def wilson_interval(share: float, count: int, z: float) -> tuple[float, float]:
    """Of a share of `count`, at `z` deviations of a normal (Wilson, JASA 22 (1927), 209-212)."""
    centre = share + z**2 / (2 * count)
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def _without_punctuation(text: str) -> str:
    return _FULL_STOP.sub("", _punctuation_as_spaces(text))


def _punctuation_as_spaces(text: str) -> str:
    groups = _DIGIT_GROUPS.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or groups else " ")
    return cleaned


def _official_words(text: str) -> list[str]:
    text = text.lower()
    words = _FULL_STOP.sub("", _punctuation_as_spaces(text), count=_OFFICIAL_STOPS).split()
    kept = (word for word in (_NUMBERS.get(word, word) for word in words) if word not in _ARTICLES)
    return [_OFFICIAL_WHOLE.get(word, word) for word in kept]


def _partly_written(word: str) -> list[str]:
    """The word with any of its apostrophes left out: couldn't've, couldnt've, couldntve ..."""
    pieces = word.split("'")
    marks = itertools.product(("", "'"), repeat=len(pieces) - 1)
    return ["".join(itertools.chain(*zip(pieces, (*mark, ""), strict=True))) for mark in marks]


_WHOLE = {part: word for word in _CONTRACTIONS.split() for part in _partly_written(word)}
# The official list has words with one apostrophe left out, and some as no lower-case text has them.
_OFFICIAL_WHOLE = {
    part: word
    for part, word in _WHOLE.items()
    if part.count("'") == word.count("'") - 1
    and not word.startswith("i'")
    and word not in ("let's", "she's", "somebody'd")
} | {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "somebody'd": "somebodyd"}


@dataclass(frozen=True)
class Share(Config):
    """`count` of `total`; `share` is 0 where there is nothing to count."""

    share: float
    count: int
    total: int

    @classmethod
    def of(cls, count: int, total: int) -> "Share":
        """The share that `count` is of `total`."""
        return cls(count / total if total else 0.0, count, total)


@dataclass(frozen=True)
class Accuracy(Config):
    """Exact match with the reference answers of `n` questions that have one.

    `difference` is candidate less reference, with its 95% interval from resampling patients or
    images.
    """

    n: int
    reference: float
    candidate: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Divergence(Config):
    """KL(reference || candidate) in nats, over all positions of the answers."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Answers(Config):
    """Figures over `n` questions; `accuracy` is None where none of them has an answer.

    `answer_agreement`: the candidate's own answer reads the same; `token_agreement`: positions at
    which it would have chosen the reference's token.
    """

    n: int
    answer_agreement: Share
    token_agreement: Share
    kl: Divergence
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Routing(Config):
    """`flips`: tokens x layers whose set of chosen experts differs, in prefixes and questions.

    `error_by_layer` is the relative error of the router logits. Layers are the decoder's.
    """

    flips: Share
    by_layer: Mapping[int, Share]
    by_modality: Mapping[str, Share]
    error_by_layer: Mapping[int, float]


@dataclass(frozen=True)
class Vision(Config):
    """Cosine of the image tokens, averaged per image; 95% interval of the images' mean."""

    cosine_mean: float
    cosine_interval: tuple[float, float]
    cosine_min: float
    relative_error: float


@dataclass(frozen=True)
class Flips(Config):
    """Answers that read otherwise; of those that are known, `lost` were right and `gained` are."""

    changed: Share
    lost: int
    gained: int


@dataclass(frozen=True)
class Reduction(Config):
    """Answers from fewer image tokens against the checkpoint's, which reads `image_tokens`."""

    image_tokens: int
    answers: Answers
    flips: Flips
    by_modality: Mapping[str, Flips]
    by_answer_type: Mapping[str, Flips]


@dataclass(frozen=True)
class Fidelity(Config):
    """All figures; `routing` is None for a dense model, `finite` False if anything was not.

    They are against the checkpoint with as many image tokens as the candidate has, so that they
    tell what quantisation cost; where it has fewer than the checkpoint, `reduction` tells the rest.
    """

    questions: int
    images: int
    overall: Answers
    by_modality: Mapping[str, Answers]
    by_answer_type: Mapping[str, Answers]
    routing: Routing | None
    vision: Vision
    finite: bool
    reduction: Reduction | None = later(None)
