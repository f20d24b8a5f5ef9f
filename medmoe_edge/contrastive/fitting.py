"""Fitting what turns similarities into scores, on images that were held out of training."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medmoe_edge.config_scores import Scores
from medmoe_edge.contrastive.features import compare
from medmoe_edge.contrastive.router import entropy, evidence, log_softmax
from medmoe_edge.contrastive.tasks import best_prompts, zero_shot_tasks
from medmoe_edge.data.datasets import LabelledImage
from medmoe_edge.errors import DataError
from medmoe_edge.runtimes.contrastive import Floats, ModalityRuntime

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
