"""How well a MedMoE names modalities, tells findings apart, retrieves and locates.

Measured on what training never saw: the labelled images whose split is not `train`, the images of
SLAKE's validation questions, and the boxes drawn on these.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.contrastive.boxes import read_places
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.features import Done, compare
from medmoe_edge.contrastive.places import Localisation, localise
from medmoe_edge.contrastive.shares import Mean, Share, mean_of, share_of
from medmoe_edge.contrastive.tasks import Task, best_prompts, zero_shot_tasks
from medmoe_edge.data.captions import fact_captions
from medmoe_edge.data.datasets import read_examples, read_labels
from medmoe_edge.errors import DataError
from medmoe_edge.runtimes.contrastive import Floats

LABELS, QUESTIONS, BOXES = "labels.jsonl", "vqa_val.jsonl", "slake_boxes.json"
SLAKE = "slake"  # the source of questions whose images have captions of one kind, and boxes
RANKS = (1, 5, 10)

Progress = Callable[[str, int, int], None]  # of what, how much, of how much


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
class ModalityEvaluation:
    """All figures; `routing` by set of images."""

    model: dict[str, str]
    routing: dict[str, Routing]
    zero_shot: ZeroShot
    text_for_image: Retrieval
    image_for_text: Retrieval
    localisation: Localisation
    notice: str = NOTICE

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def evaluate_modality(
    engine: ModalityEngine, data: Path, progress: Progress = lambda *_: None
) -> ModalityEvaluation:
    """All of it, on the folder `data`; raises `DataError` where its files are not as expected."""
    tasks = zero_shot_tasks(item for item in read_labels(data / LABELS) if item.split != "train")
    captioned = [
        item for item in fact_captions(read_examples(data / QUESTIONS)) if item.source == SLAKE
    ]
    places = read_places(data / BOXES, [item.image for item in captioned])
    if not (tasks and captioned and places):
        raise DataError(
            f"{data} holds no tasks, captions or boxes to evaluate on.",
            "Give a folder like the one that training read.",
        )
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
    labelled = [item for task in tasks for item in task.images]
    logits = np.concatenate([found.router_logits for found in compared])
    modalities = engine.config.modalities
    return ModalityEvaluation(
        model={"name": engine.name, "sha256": engine.sha256, "runtime": runtime.name},
        routing={
            "labelled images": routing([i.modality for i in labelled], logits, modalities),
            SLAKE: routing([i.modality or "" for i in captioned], shown.router_logits, modalities),
        },
        zero_shot=zero_shot(tasks, [found.similarities for found in compared]),
        text_for_image=retrieval(shown.similarities, belongs),
        image_for_text=retrieval(shown.similarities.T, belongs.T),
        localisation=localise(engine, places, report("places")),
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
