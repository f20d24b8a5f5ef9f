"""How well a contrastive model names modalities, tells findings apart, retrieves and locates.

Measured on what training never saw: the labelled images whose split is not `train`, the images of
SLAKE's validation questions, and the boxes drawn on these, beside pointing at the image's centre.
Zero-shot tasks tell the findings of one kind of image apart by their names alone. What turns
similarities into scores is fitted on images held out of training. Every share comes with an
interval.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats, Progress
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.config_contrastive import Scores
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.features import Done, compare, entropy, evidence
from medmoe_edge.data.captions import GroundedPhrase, fact_captions, label_captions, read_grounded
from medmoe_edge.data.datasets import (
    BOXES_FILES,
    LABELS_FILE,
    QUESTION_FILES,
    LabelledImage,
    check_exist,
    questions_of,
    read_examples,
    read_labels,
)
from medmoe_edge.errors import DataError, Told
from medmoe_edge.image.loading import load_image
from medmoe_edge.runtimes.base import log_softmax
from medmoe_edge.runtimes.contrastive import ModalityRuntime

Interval = tuple[float, float]
NORMAL = 1.959964  # standard deviations around the mean that hold 95%


@dataclass(frozen=True)
class Share:
    """`right` of `count`: `share`, 0 to 1, and its 95% interval (Wilson, 1927)."""

    count: int
    right: int
    share: float
    interval: Interval


@dataclass(frozen=True)
class Mean:
    """A mean of shares, 0 to 1, and its 95% interval."""

    share: float
    interval: Interval


def share_of(right: npt.ArrayLike) -> Share:
    """The share of what is True among one or more."""
    values = np.asarray(right, np.bool_)
    count, hits = len(values), int(values.sum())
    share, narrow = hits / count, NORMAL**2 / count
    centre = (share + narrow / 2) / (1 + narrow)
    half = math.sqrt(narrow * (share * (1 - share) + narrow / 4)) / (1 + narrow)
    # the ends hold the share and lie in 0 to 1, which rounding may miss
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Share(count, hits, share, (low, high))


def mean_of(shares: Sequence[Share | Mean]) -> Mean:
    """The mean in which each weighs the same: of a task's classes the balanced accuracy.

    Its interval is recovered from theirs (MOVER; Zou and Donner, Statistics in Medicine 27, 2008),
    taking them to be independent.
    """
    count = len(shares)
    mean = sum(each.share for each in shares) / count
    below = math.hypot(*(each.share - each.interval[0] for each in shares)) / count
    above = math.hypot(*(each.interval[1] - each.share for each in shares)) / count
    return Mean(mean, (mean - below, mean + above))


@dataclass(frozen=True)
class Task:
    """`images`, each with one of `findings`; a finding's `prompts` are what it may be called."""

    name: str
    findings: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    images: tuple[LabelledImage, ...]

    @property
    def texts(self) -> list[str]:
        """All prompts, finding by finding."""
        return [prompt for prompts in self.prompts for prompt in prompts]

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """The index of each image's finding `[N]`."""
        return np.array([self.findings.index(image.finding) for image in self.images])


def zero_shot_tasks(labelled: Iterable[LabelledImage]) -> list[Task]:
    """One task for each modality and body part that has more than one finding, in order.

    A finding goes by its own name and by that behind the kind of image, as in captions.
    """
    groups: dict[str, list[LabelledImage]] = {}
    for image in labelled:
        groups.setdefault(_view(image), []).append(image)
    tasks = []
    for view, images in groups.items():
        findings = tuple(sorted({image.finding for image in images}))
        prompts = tuple((finding, f"{view}, {finding}") for finding in findings)
        if len(findings) > 1:
            tasks.append(Task(view, findings, prompts, tuple(images)))
    return tasks


def best_prompts(similarities: npt.NDArray[np.float32], task: Task) -> npt.NDArray[np.float32]:
    """Each finding's best prompt: `[N, findings]` from `[N, prompts]`, of its `texts`."""
    counts = [len(prompts) for prompts in task.prompts]
    parts = np.split(similarities, np.cumsum(counts)[:-1], axis=1)
    return np.stack([part.max(1) for part in parts], 1)


def _view(image: LabelledImage) -> str:
    return label_captions([image])[0].phrases[0]


TEMPERATURES = np.geomspace(1.0, 200.0, 300)
FAMILIAR = 99.0  # percent of images of known modalities keep within each limit


def fit_scores(runtime: ModalityRuntime, labelled: Sequence[LabelledImage]) -> Scores:
    """The temperature under which the findings are most likely, and what the router usually says.

    One number for all tasks (Guo et al., https://arxiv.org/abs/1706.04599). Raises `DataError`
    where no kind of image has two findings.
    """
    tasks = zero_shot_tasks(labelled)
    if not tasks:
        raise DataError("The images have no two findings to tell apart.", "Give more of them.")
    losses, logits = [], []
    for task in tasks:
        found = compare(runtime, [item.image for item in task.images], task.texts)
        best = best_prompts(found.similarities, task)
        losses.append(_losses(best, task.answers))
        logits.append(found.router_logits)
    mean = np.concatenate(losses).mean(0)  # over images, for each temperature
    routed = np.concatenate(logits)
    return Scores(
        temperature=float(TEMPERATURES[mean.argmin()]),
        entropy_limit=float(np.percentile(entropy(routed), FAMILIAR)),
        evidence_limit=float(np.percentile(evidence(routed), 100 - FAMILIAR)),
    )


def _losses(similarities: Floats, answers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Negative log likelihood `[N, temperatures]` of the right findings, `[N, findings]`."""
    logs = log_softmax(TEMPERATURES[:, None, None] * similarities)  # [temperatures, N, findings]
    found: npt.NDArray[np.float64] = -logs[:, np.arange(len(answers)), answers].T
    return found


@dataclass(frozen=True)
class Pointing:
    """The pointing game (https://arxiv.org/abs/1608.00507): is the hottest pixel in a box?

    `hits` over all boxed phrases, and by phrase. `precision` is the mean over them of the average
    precision of the heat at telling pixels in the boxes from others.
    """

    hits: Share
    phrases: dict[str, Share]
    precision: float


@dataclass(frozen=True)
class Localisation:
    """The model's maps, and the same for a map that is hottest at the image's centre."""

    places: int
    model: Pointing
    centre: Pointing


def localise(
    engine: ModalityEngine, grounded: Sequence[GroundedPhrase], done: Done
) -> Localisation:
    """Point at what every phrase names; at least one is needed."""
    model: list[tuple[str, bool, float]] = []
    centre: list[tuple[str, bool, float]] = []
    for number, phrase in enumerate(grounded, start=1):
        found = engine.locate(load_image(phrase.image), phrase.phrase)
        height, width = found.heat.shape
        mask = phrase.mask(height, width)
        x, y = found.peak
        point = phrase.holds(x + 0.5, y + 0.5)
        model.append((phrase.phrase, point, average_precision(found.heat, mask)))
        middle = phrase.holds(width / 2, height / 2)
        centre.append((phrase.phrase, middle, average_precision(_nearness(height, width), mask)))
        done(number, len(grounded))
    return Localisation(len(grounded), _pointing(model), _pointing(centre))


def average_precision(scores: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> float:
    """Mean precision at each true pixel, pixels of equal score counted together; 0 without any."""
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked, right = scores.ravel()[order], np.cumsum(mask.ravel()[order])
    if not right[-1]:
        return 0.0
    last = np.append(ranked[1:] != ranked[:-1], True)  # of the pixels of one score
    found, seen = right[last], np.flatnonzero(last) + 1
    gained = np.diff(found, prepend=0)
    return float((gained * found / seen).sum() / right[-1])


def _pointing(found: Sequence[tuple[str, bool, float]]) -> Pointing:
    phrases = {
        phrase: share_of([hit for other, hit, _ in found if other == phrase])
        for phrase in sorted({phrase for phrase, _, _ in found})
    }
    precision = float(np.mean([value for _, _, value in found]))
    return Pointing(share_of([hit for _, hit, _ in found]), phrases, precision)


def _nearness(height: int, width: int) -> npt.NDArray[np.float32]:
    rows, columns = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
    distance: npt.NDArray[np.float32] = np.hypot(rows[:, None], columns).astype(np.float32)
    return -distance


SLAKE = "slake"  # the source of questions whose images have captions of one kind, and boxes
RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Routing:
    """How often the router names the modality; `named` counts its words for each true one."""

    overall: Share
    modalities: dict[str, Share]
    named: dict[str, dict[str, int]]


@dataclass(frozen=True)
class TaskScore:
    """Zero-shot: `balanced` accuracy over the findings of a task, and the share of each."""

    balanced: Mean
    findings: dict[str, Share]


@dataclass(frozen=True)
class ZeroShot:
    """`mean` of the tasks' balanced accuracies."""

    mean: Mean
    tasks: dict[str, TaskScore]


@dataclass(frozen=True)
class Retrieval:
    """Of `candidates`, whether the best k hold one that belongs to the query: `recall` by k."""

    candidates: int
    recall: dict[int, Share]


@dataclass(frozen=True)
class ModalityEvaluation(Told):
    """All figures; `routing` by set of images."""

    model: dict[str, str]
    routing: dict[str, Routing]
    zero_shot: ZeroShot
    text_for_image: Retrieval
    image_for_text: Retrieval
    localisation: Localisation
    notice: str = NOTICE


def evaluate_modality(
    engine: ModalityEngine, data: Path, progress: Progress = lambda *_: None
) -> ModalityEvaluation:
    """All of it, on the folder `data`; raises `DataError` where its files are not as expected."""
    every = read_labels(data / LABELS_FILE)
    labelled = [item for item in every if item.split != "train"]
    tasks = zero_shot_tasks(labelled)
    questions = questions_of(data, "val") or data / QUESTION_FILES["val"][0]
    asked = fact_captions(read_examples(questions))
    captioned = [item for item in asked if item.source == SLAKE]
    drawn = (data / name for name in BOXES_FILES)
    boxes = next((file for file in drawn if file.is_file()), data / BOXES_FILES[0])
    grounded = read_grounded(boxes, [item.image for item in captioned])
    if not (tasks and captioned and grounded):
        raise DataError(
            f"{data} holds no tasks, captions or boxes to evaluate on.",
            "Give a folder like the one that training read.",
        )
    judged = [item for task in tasks for item in task.images]
    check_exist((item.image for item in judged), data / LABELS_FILE)
    check_exist((item.image for item in captioned), questions)
    runtime = engine.runtime

    def report(what: str) -> Done:
        return partial(progress, what)

    compared = [
        compare(runtime, [i.image for i in task.images], task.texts, report(task.name))
        for task in tasks
    ]
    texts = list(dict.fromkeys(item.caption for item in captioned))
    shown = compare(runtime, [i.image for i in captioned], texts, report("captions"))
    belongs = np.array([[item.caption == text for text in texts] for item in captioned])
    logits = np.concatenate([found.router_logits for found in compared])
    modalities = engine.config.modalities
    return ModalityEvaluation(
        model={"name": engine.name, "sha256": engine.sha256, "runtime": runtime.name},
        routing={
            "labelled images": routing([i.modality for i in judged], logits, modalities),
            SLAKE: routing([i.modality or "" for i in captioned], shown.router_logits, modalities),
        },
        zero_shot=zero_shot(tasks, [found.similarities for found in compared]),
        text_for_image=retrieval(shown.similarities, belongs),
        image_for_text=retrieval(shown.similarities.T, belongs.T),
        localisation=localise(engine, grounded, report("places")),
    )


def routing(true: Sequence[str], logits: Floats, modalities: Sequence[str]) -> Routing:
    """What the router makes of images of these modalities, `logits` `[N, E]`."""
    named = [modalities[int(index)] for index in logits.argmax(1)]
    by_true: dict[str, Counter[str]] = {modality: Counter() for modality in sorted(set(true))}
    for modality, name in zip(true, named, strict=True):
        by_true[modality][name] += 1
    return Routing(
        share_of([name == modality for name, modality in zip(named, true, strict=True)]),
        {
            modality: share_of([name == modality for name in names.elements()])
            for modality, names in by_true.items()
        },
        {modality: dict(names) for modality, names in by_true.items()},
    )


def zero_shot(tasks: Sequence[Task], similarities: Sequence[Floats]) -> ZeroShot:
    """What the best prompt says, from `[N, prompts]` of each task."""
    scores: dict[str, TaskScore] = {}
    for task, compared in zip(tasks, similarities, strict=True):
        right = best_prompts(compared, task).argmax(1) == task.answers
        findings = {
            finding: share_of(right[task.answers == index])
            for index, finding in enumerate(task.findings)
        }
        scores[task.name] = TaskScore(mean_of(list(findings.values())), findings)
    return ZeroShot(mean_of([score.balanced for score in scores.values()]), scores)


def retrieval(similarities: Floats, belongs: npt.NDArray[np.bool_]) -> Retrieval:
    """Recall of queries among candidates, `[Q, C]` both; each query has one that belongs to it."""
    order = np.argsort(-similarities, axis=1, kind="stable")
    hits = np.take_along_axis(belongs, order, axis=1)
    recall = {k: share_of(hits[:, :k].any(1)) for k in RANKS}
    return Retrieval(similarities.shape[1], recall)
