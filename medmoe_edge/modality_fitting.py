"""Fitting what turns similarities into scores, on images that were held out of training."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medmoe_edge.config_scores import Scores
from medmoe_edge.datasets import LabelledImage
from medmoe_edge.errors import DataError
from medmoe_edge.modality_features import compare
from medmoe_edge.modality_tasks import best_prompts, zero_shot_tasks
from medmoe_edge.runtimes.modality_base import Floats, ModalityRuntime

TEMPERATURES = np.geomspace(1.0, 200.0, 300)
FAMILIAR = 99.0  # percent of images of known modalities are not to be called unfamiliar


def fit_scores(runtime: ModalityRuntime, labelled: Sequence[LabelledImage]) -> Scores:
    """The temperature under which the findings are most likely, and the usual router entropy.

    One number for all tasks (Guo et al., https://arxiv.org/abs/1706.04599). Raises `DataError`
    where no kind of image has two findings.
    """
    tasks = zero_shot_tasks(labelled)
    if not tasks:
        raise DataError("The images have no two findings to tell apart.", "Give more of them.")
    losses, entropies = [], []
    for task in tasks:
        found = compare(runtime, [item.image for item in task.images], task.texts)
        best = best_prompts(found.similarities, task)
        losses.append(_losses(best, task.answers))
        entropies.append(entropy(found.router_logits))
    mean = np.concatenate(losses).mean(0)  # over images, for each temperature
    limit = np.percentile(np.concatenate(entropies), FAMILIAR)
    return Scores(float(TEMPERATURES[mean.argmin()]), float(limit))


def entropy(logits: Floats) -> npt.NDArray[np.float64]:
    """Entropy `[N]` in nats of the softmax of `logits` `[N, E]`."""
    logs = _log_softmax(logits.astype(np.float64))
    found: npt.NDArray[np.float64] = -(np.exp(logs) * logs).sum(-1)
    return found


def _losses(similarities: Floats, answers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Negative log likelihood `[N, temperatures]` of the right findings, `[N, findings]`."""
    logs = _log_softmax(TEMPERATURES[:, None, None] * similarities)  # [temperatures, N, findings]
    found: npt.NDArray[np.float64] = -logs[:, np.arange(len(answers)), answers].T
    return found


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
