"""What a router's logits `[N, E]` tell beside the modality: how sure it is, and how much it saw."""

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]
PerImage = npt.NDArray[np.float64]  # [N]


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    return wide - _log_sum_exp(wide)[..., None]


def entropy(logits: Logits) -> PerImage:
    """Of the probabilities, in nats: from 0 where one modality is certain to log(E)."""
    logs = log_softmax(logits)
    found: PerImage = -(np.exp(logs) * logs).sum(-1)
    return np.maximum(found, 0.0)


def evidence(logits: Logits) -> PerImage:
    """Log of the sum of their exponentials: small where an image looks like no modality at all.

    Probabilities hide it, since they sum to 1 whatever was seen. It is the negative free energy of
    Liu et al. 2020, https://arxiv.org/abs/2010.03759.
    """
    return _log_sum_exp(logits.astype(np.float64))


def _log_sum_exp(logits: npt.NDArray[np.float64]) -> PerImage:
    largest = logits.max(-1, keepdims=True)
    found: PerImage = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
    return found
