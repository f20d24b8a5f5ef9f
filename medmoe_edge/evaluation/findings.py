"""How well a model sees: single findings, pictures that are no scans, and the same in other words.

A finding is asked about ("Is there effusion?") over the images whose source says that it is present
or absent, and scored by the probability of yes against no. Beside it stand two models that do not
look: the same about a black picture, and the model's own answers dealt out to other images.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Counting, Doubles, no_counting
from medmoe_edge.data.datasets import (
    NO_SCAN,
    Example,
    Finding,
    Record,
    owner_of,
    parse_json,
    read_text,
)
from medmoe_edge.errors import DataError, Notice
from medmoe_edge.evaluation.evaluate import MAX_NEW_TOKENS, Prediction
from medmoe_edge.evaluation.metrics import (
    Z95,
    Share,
    bootstrap_interval,
    exact_match,
    normalise,
    wilson_interval,
)
from medmoe_edge.image.pixels import Image, black_picture

YES, NO = CHOICES = ("Yes", "No")
FLAGSHIP = "Is there effusion?"
QUESTIONS = {"pleural effusion": FLAGSHIP}  # where a finding has a shorter name of its own
COUNTED = {"mass", "nodule", "nodule or mass", "fracture", "hiatal hernia", "tumor", "lesion"}
NORMAL = "no finding"  # a label, and nothing to be seen
FEWEST = 5  # images with a finding, and without it, from which on it is scored
SHUFFLES = 1000
ROUNDS = 1000  # of drawing patients anew, for an interval
ENGLISH = "en"
IMAGES = 10  # that versions of a question are asked about


class Answer(Protocol):
    """What is read of an answer."""

    @property
    def text(self) -> str: ...
    @property
    def unsure(self) -> bool: ...
    @property
    def warnings(self) -> Sequence[Notice]: ...
    @property
    def refusals(self) -> Mapping[str, float]: ...
    @property
    def probabilities(self) -> Mapping[str, float] | None: ...


class Engine(Protocol):
    """What is asked of an engine."""

    def ask_all(
        self,
        image: Path | Image,
        questions: Sequence[str],
        /,
        *,
        max_new_tokens: int,
        choices: Sequence[str] | None = None,
    ) -> Sequence[Answer]: ...


@dataclass(frozen=True)
class Sight:
    """How yes and no go with presence and absence, each 0 to 1.

    `sensitivity` and `specificity` take for a yes what is likelier than no: a tie is no yes. `auc`
    is the area under the curve of all other thresholds.
    """

    auc: float
    sensitivity: float
    specificity: float


@dataclass(frozen=True)
class FindingScore(Sight):
    """How well one finding is seen, in `present` images that have it and `absent` ones that do not.

    The interval (95%) is from resampling patients. `black` is the same question about a black
    picture; `shuffled` gives each image the answer about another one, on average over many deals,
    of which 95% have an AUC in `chance`.
    """

    finding: str
    question: str
    present: int
    absent: int
    auc_interval: tuple[float, float]
    black: Sight
    shuffled: Sight
    chance: tuple[float, float]


@dataclass(frozen=True)
class NoScans:
    """How many pictures are taken for no scan: of those that are none, and of scans.

    `missed` counts the pictures that were not flagged by what they are.
    """

    question: str
    pictures: Share
    scans: Share
    missed: Mapping[str, int]


@dataclass(frozen=True)
class Versions:
    """How versions of questions in one language were answered, `asked` in all.

    `alike`: as the English question about the same image; `flagged`: otherwise, but marked as
    unsure; `silent`: neither. `questions` are those with a silent answer, and how many.
    """

    asked: int
    alike: Share
    flagged: Share
    silent: Share
    questions: Mapping[str, int]


@dataclass(frozen=True)
class Paraphrased:
    """What other words cost: exact match of `questions` and of their paraphrases, 0 to 1.

    Every question weighs the same, however many paraphrases it has. `loss` is the first less the
    second, with its 95% interval from resampling patients or images.
    """

    questions: int
    asked: int
    original: float
    paraphrased: float
    loss: float
    interval: tuple[float, float]


def question_about(finding: str) -> str:
    """What is asked about a finding."""
    article = "a " if finding in COUNTED else ""
    return QUESTIONS.get(finding, f"Is there {article}{finding}?")


def evaluate_findings(
    engine: Engine, findings: Sequence[Finding], *, progress: Counting = no_counting
) -> tuple[FindingScore, ...]:
    """Ask about every finding, over the images whose source says whether it is there.

    Args:
        engine: What answers; every question is given the choices yes and no.
        findings: Images with findings; pictures that are no scans are passed over.
        progress: Called with the images done and the images in all.

    Returns:
        One score for each finding that is present in at least `FEWEST` images and absent in as
        many, the most frequent first.

    Raises:
        DataError: There is no such finding.
        MedMoEError: What the engine raises passes through.
    """
    known = [one for one in findings if one.modality != NO_SCAN]
    present, absent = (
        Counter(name for one in known for name in getattr(one, part))
        for part in ("present", "absent")
    )
    names = [
        name
        for name, count in present.most_common()
        if name != NORMAL and count >= FEWEST and absent[name] >= FEWEST
    ]
    if not names:
        raise DataError(
            f"No finding is present in {FEWEST} images and stated to be absent in {FEWEST} others.",
            "Give more images with findings, of a split that is not to train on.",
        )
    likely: dict[str, list[float]] = defaultdict(list)
    there: dict[str, list[bool]] = defaultdict(list)
    patients: dict[str, list[str]] = defaultdict(list)
    for done, one in enumerate(known, start=1):
        asked = [name for name in names if name in one.present or name in one.absent]
        for name, chance in zip(asked, _yes(engine, one.image, asked), strict=True):
            likely[name].append(chance)
            there[name].append(name in one.present)
            patients[name].append(owner_of(one))
        progress(done, len(known))
    blind = dict(zip(names, _yes(engine, black_picture(), names), strict=True))
    return tuple(
        _finding_score(name, likely[name], there[name], patients[name], blind[name])
        for name in names
    )


def area_under_curve(scores: npt.ArrayLike, there: npt.ArrayLike) -> float:
    """The chance that a score [N] of what is there [N] is above one of what is not; ties are half.

    Source: Hanley & McNeil, Radiology 143 (1982), 29-36 (the Mann-Whitney statistic).
    """
    return float(_wins(np.asarray(scores, np.float64), np.asarray(there, np.bool_)).mean())


def ask_flagship(
    engine: Engine, images: Sequence[Path], *, progress: Counting = no_counting
) -> list[Answer]:
    """Ask one question about each image."""
    answers: list[Answer] = []
    for image in images:
        answers += engine.ask_all(image, [FLAGSHIP], max_new_tokens=MAX_NEW_TOKENS)
        progress(len(answers), len(images))
    return answers


def score_no_scans(
    pictures: Sequence[Finding], of_pictures: Sequence[Answer], of_scans: Sequence[Answer]
) -> NoScans:
    """Which pictures that are no scans, and which scans, were taken for no scan."""
    flagged, wrongly = ([_no_scan(answer) for answer in some] for some in (of_pictures, of_scans))
    kinds = zip(pictures, flagged, strict=True)
    return NoScans(
        question=FLAGSHIP,
        pictures=Share.of(sum(flagged), len(flagged)),
        scans=Share.of(sum(wrongly), len(wrongly)),
        missed=dict(Counter(one.kind or "unknown" for one, found in kinds if not found)),
    )


def _no_scan(answer: Answer) -> bool:
    return any(notice.code == "not_a_scan" for notice in answer.warnings)


def read_versions(file: Path) -> list[dict[str, str]]:
    """Questions by language: a JSON list of objects such as `{"en": ..., "de": ...}`.

    Raises `DataError` for a file of another form, and where English or all others are missing.
    """
    where = str(file)
    values = parse_json(read_text(file), where)
    if not isinstance(values, list) or not values:
        raise DataError(f"{where} is not a list of questions.", "Write it as a JSON list.")
    versions = []
    for number, value in enumerate(values, start=1):
        record = Record(value, f"{where}, item {number}")
        versions.append({language: record.text(language) for language in record.value})
        if ENGLISH not in record.value or len(record.value) < 2:
            raise DataError(
                f"{record.where} has no {ENGLISH!r}, or no other language.",
                'Write it as {"en": "Is it normal?", "de": "Ist es normal?"}.',
            )
    return versions


def evaluate_versions(
    engine: Engine,
    versions: Sequence[Mapping[str, str]],
    images: Sequence[Path],
    *,
    progress: Counting = no_counting,
) -> dict[str, Versions]:
    """Ask questions in other languages: is each answered as in English, or marked as unsure?

    They are asked about up to `IMAGES` of the images, evenly spaced.
    """
    chosen = list(dict.fromkeys(images))
    places = np.linspace(0, len(chosen) - 1, min(IMAGES, len(chosen))).round().astype(int)
    alike: Counter[str] = Counter()
    flagged: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    silent: dict[str, Counter[str]] = defaultdict(Counter)
    keys = [(number, language) for number, one in enumerate(versions) for language in one]
    texts = [versions[number][language] for number, language in keys]
    for done, place in enumerate(np.unique(places), start=1):
        answers = engine.ask_all(chosen[place], texts, max_new_tokens=MAX_NEW_TOKENS)
        said = dict(zip(keys, answers, strict=True))
        for (number, language), answer in said.items():
            if language == ENGLISH:
                continue
            asked[language] += 1
            if normalise(answer.text) == normalise(said[number, ENGLISH].text):
                alike[language] += 1
            elif answer.unsure:
                flagged[language] += 1
            else:
                silent[language][versions[number][language]] += 1
        progress(done, len(places))
    return {
        language: Versions(
            asked=total,
            alike=Share.of(alike[language], total),
            flagged=Share.of(flagged[language], total),
            silent=Share.of(silent[language].total(), total),
            questions=dict(silent[language].most_common()),
        )
        for language, total in sorted(asked.items())
    }


def question_key(question: str) -> str:
    """By which a file of paraphrases knows a question: 16 hex digits of its SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def read_paraphrases(file: Path) -> dict[str, list[str]]:
    """Paraphrases by `question_key`: a JSON object of lists; raises `DataError` for others."""
    record = Record(parse_json(read_text(file), str(file)), str(file))
    return {key: record.texts(key) for key in record.value}


def evaluate_paraphrases(
    engine: Engine,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    paraphrases: Mapping[str, Sequence[str]],
    *,
    progress: Counting = no_counting,
) -> dict[str, Paraphrased]:
    """Ask the same questions in other words.

    Args:
        engine: What answers.
        examples: The questions as they were asked.
        predictions: How they were answered.
        paraphrases: By `question_key`; questions without any are passed over.
        progress: Called with the images done and the images in all.

    Returns:
        The loss over `"all"` questions, and by their source.

    Raises:
        DataError: No question has a paraphrase.
    """
    by_image: dict[Path, list[tuple[Example, Prediction, Sequence[str]]]] = defaultdict(list)
    for example, prediction in zip(examples, predictions, strict=True):
        if others := paraphrases.get(question_key(example.question)):
            by_image[example.image].append((example, prediction, others))
    if not by_image:
        raise DataError(
            "No question of the data has a paraphrase.",
            "Its key is the first 16 hex digits of the SHA-256 of the question's text.",
        )
    rows: dict[str, list[_Reworded]] = defaultdict(list)
    for done, (image, group) in enumerate(by_image.items(), start=1):
        texts = [text for _, _, others in group for text in others]
        answers = iter(engine.ask_all(image, texts, max_new_tokens=MAX_NEW_TOKENS))
        for example, prediction, others in group:
            hits = [exact_match(next(answers).text, example.answer) for _ in others]
            row = _Reworded(owner_of(example), prediction.correct, sum(hits) / len(hits), len(hits))
            rows["all"].append(row)
            rows[example.source].append(row)
        progress(done, len(by_image))
    return {name: _paraphrased(group) for name, group in rows.items()}


@dataclass(frozen=True)
class _Reworded:
    owner: str
    original: bool
    paraphrased: float
    asked: int


def _paraphrased(rows: Sequence[_Reworded]) -> Paraphrased:
    original = float(np.mean([row.original for row in rows]))
    reworded = float(np.mean([row.paraphrased for row in rows]))
    losses = [row.original - row.paraphrased for row in rows]
    return Paraphrased(
        questions=len(rows),
        asked=sum(row.asked for row in rows),
        original=original,
        paraphrased=reworded,
        loss=original - reworded,
        interval=bootstrap_interval(losses, [row.owner for row in rows]),
    )


def _yes(engine: Engine, image: Path | Image, names: Iterable[str]) -> list[float]:
    """The probability of yes against no for each finding."""
    questions = [question_about(name) for name in names]
    if not questions:
        return []
    answers = engine.ask_all(image, questions, max_new_tokens=MAX_NEW_TOKENS, choices=CHOICES)
    return [(answer.probabilities or {})[YES] for answer in answers]


def _finding_score(
    name: str,
    likely: Sequence[float],
    there: Sequence[bool],
    patients: Sequence[str],
    blind: float,
) -> FindingScore:
    scores, found = np.array(likely), np.array(there)
    shuffled, chance = _shuffled(scores, found)
    return FindingScore(
        **vars(_sight(scores, found)),
        finding=name,
        question=question_about(name),
        present=int(found.sum()),
        absent=int((~found).sum()),
        auc_interval=_auc_interval(scores, found, patients),
        black=_sight(np.full(len(found), blind), found),
        shuffled=shuffled,
        chance=chance,
    )


def _sight(scores: Doubles, there: npt.NDArray[np.bool_]) -> Sight:
    said = scores > 0.5
    return Sight(
        auc=area_under_curve(scores, there),
        sensitivity=float(said[there].mean()),
        specificity=float((~said)[~there].mean()),
    )


def _shuffled(scores: Doubles, there: npt.NDArray[np.bool_]) -> tuple[Sight, tuple[float, float]]:
    generator = np.random.default_rng(0)
    deals = [_sight(generator.permutation(scores), there) for _ in range(SHUFFLES)]
    areas = [deal.auc for deal in deals]
    low, high = np.quantile(areas, (0.025, 0.975))
    mean = Sight(
        auc=float(np.mean(areas)),
        sensitivity=float(np.mean([deal.sensitivity for deal in deals])),
        specificity=float(np.mean([deal.specificity for deal in deals])),
    )
    return mean, (float(low), float(high))


def _wins(scores: Doubles, there: npt.NDArray[np.bool_]) -> Doubles:
    """For each pair of what is there and what is not, 1 where its score is higher, `[P, A]`."""
    gaps: Doubles = scores[there][:, None] - scores[~there][None]
    return (np.sign(gaps) + 1) / 2


def _auc_interval(
    scores: Doubles, there: npt.NDArray[np.bool_], patients: Sequence[str]
) -> tuple[float, float]:
    """The 95% percentile interval, resampling patients.

    Where all that is drawn orders them alike, as of few patients, Wilson's stands in, over those
    of the rarer kind.
    """
    _, member = np.unique(patients, return_inverse=True)
    count = int(member.max()) + 1
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=ROUNDS)
    weights = draws[:, member]  # [rounds, N]
    present, absent = weights[:, there], weights[:, ~there]
    wins = np.einsum("rp,pa,ra->r", present, _wins(scores, there), absent, optimize=True)
    pairs = present.sum(1) * absent.sum(1)
    areas = wins[pairs > 0] / pairs[pairs > 0]
    low, high = map(float, np.quantile(areas, (0.025, 0.975)))
    if high - low < 1e-9 and np.ptp(scores) > 0:
        fewest = min(len(np.unique(member[kind])) for kind in (there, ~there))
        return wilson_interval(low, fewest, Z95)
    return low, high
