"""Where two models route the same tokens: to the same experts, or not."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medmoe_edge.evaluation.figures import Routing, Share
from medmoe_edge.runtimes.base import Floats, chosen_experts


class Routed(NamedTuple):
    """How some tokens were routed; `flips` counts those sent to other experts, per MoE layer."""

    modality: str
    tokens: int
    flips: npt.NDArray[np.int64]  # [M]
    squared_difference: npt.NDArray[np.float64]  # [M]
    squared_reference: npt.NDArray[np.float64]  # [M]


def routed(reference: Floats, found: Floats, top_k: int, modality: str) -> Routed:
    """Compare the router logits `[S, M, E]` of the same tokens."""
    differs = (_chosen(reference, top_k) != _chosen(found, top_k)).any(-1)  # [S, M]
    expected = reference.astype(np.float64)
    squares = ((found - expected) ** 2).sum((0, 2)), (expected**2).sum((0, 2))
    return Routed(modality, len(reference), differs.sum(0), *squares)


def routing(parts: Sequence[Routed], layers: Sequence[int]) -> Routing:
    """The figures over all tokens; `layers` are the decoder's indices of the M layers."""
    flips = np.sum([part.flips for part in parts], axis=0)  # [M]
    tokens = sum(part.tokens for part in parts)
    difference = np.sum([part.squared_difference for part in parts], axis=0)
    reference = np.sum([part.squared_reference for part in parts], axis=0)
    by_modality = {}
    for modality in sorted({part.modality for part in parts}):
        group = [part for part in parts if part.modality == modality]
        total = sum(part.tokens for part in group) * len(layers)
        by_modality[modality] = Share.of(sum(int(part.flips.sum()) for part in group), total)
    return Routing(
        flips=Share.of(int(flips.sum()), tokens * len(layers)),
        by_layer={
            layer: Share.of(int(count), tokens) for layer, count in zip(layers, flips, strict=True)
        },
        by_modality=by_modality,
        error_by_layer={
            layer: relative_error(*squares)
            for layer, *squares in zip(layers, difference, reference, strict=True)
        },
    )


def relative_error(squared_difference: float, squared_reference: float) -> float:
    """The norm of a difference over the norm of what should have been there."""
    return math.sqrt(squared_difference / max(squared_reference, 1e-30))


def _chosen(router_logits: Floats, top_k: int) -> npt.NDArray[np.int64]:
    """The chosen experts in order of their index, `[S, M, K]`."""
    return np.sort(chosen_experts(router_logits, top_k), axis=-1)
