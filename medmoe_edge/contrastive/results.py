"""What a contrastive model says of an image: modality, labels with scores, where a phrase lies.

The router's logits `[N, E]` also tell how sure it is, and how much of any modality it saw.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe_edge._types import Floats
from medmoe_edge.bundle.bundle import NOTICE
from medmoe_edge.errors import Notice


@dataclasses.dataclass(frozen=True)
class _Result:
    """`timings` are seconds: `image` to read and prepare, `vision` tower and expert, `text` and
    `compare`, as far as each was needed, and `total`. `model` says by `name` and `sha256` what
    answered, by `runtime` what ran it, and under `verification` and `verified` what is known of
    its fidelity, as of an `Answer`. `warnings` are what should be known of the image before the
    result is used.
    """

    timings: dict[str, float]
    model: dict[str, Any]
    notice: str = dataclasses.field(default=NOTICE, kw_only=True)
    warnings: tuple[Notice, ...] = dataclasses.field(default=(), kw_only=True)


@dataclasses.dataclass(frozen=True)
class Reading(_Result):
    """The router's view: `probabilities` by modality, the most probable first, 0 to 1.

    `entropy` of those in nats, from 0 where it is sure to log(E). `unfamiliar`: it is less sure, or
    saw less of any modality, than with images of known ones; nothing said may be believed.
    """

    modality: str
    probabilities: dict[str, float]
    entropy: float
    unfamiliar: bool

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object."""
        values = dataclasses.asdict(self)
        return values | {"warnings": list(values["warnings"])}


@dataclasses.dataclass(frozen=True)
class Classification(_Result):
    """`scores` by label, the best first: calibrated probabilities, given that one label is right.

    They sum to 1, so that the score of a label without rivals says nothing; `similarities`, -1 to
    1 in the same order, compare each label with the image alone.
    """

    scores: dict[str, float]
    similarities: dict[str, float]
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object."""
        values = dataclasses.asdict(self)
        return values | {"warnings": list(values["warnings"])}


@dataclasses.dataclass(frozen=True)
class Location(_Result):
    """Where a phrase lies: `heat` `[H, W]` over the picture as shown, -1 to 1.

    `peak` is the pixel (x, y) where it is hottest; `similarity`, -1 to 1, is of the phrase and the
    whole image. A phrase that is not in the image has a hottest place too.
    """

    phrase: str
    heat: Floats
    peak: tuple[int, int]
    similarity: float
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        """One stable JSON object; of the heat its size alone."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        height, width = values.pop("heat").shape
        values |= {"peak": list(self.peak), "reading": self.reading.to_json()}
        values["warnings"] = [dataclasses.asdict(notice) for notice in self.warnings]
        return values | {"size": [width, height]}


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
