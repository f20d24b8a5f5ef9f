"""Does the map of a phrase lie where people drew a box? Beside pointing at the image's centre."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medmoe_edge.contrastive.boxes import Place
from medmoe_edge.contrastive.engine import ModalityEngine
from medmoe_edge.contrastive.features import Done
from medmoe_edge.contrastive.shares import Share, share_of
from medmoe_edge.image.loading import load_image


@dataclass(frozen=True)
class Pointing:
    """The pointing game (https://arxiv.org/abs/1608.00507): is the hottest pixel in a box?

    `hits` over all places, and by phrase. `precision` is the mean over places of the average
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


def localise(engine: ModalityEngine, places: Sequence[Place], done: Done) -> Localisation:
    """Point at every place; at least one is needed."""
    model: list[tuple[str, bool, float]] = []
    centre: list[tuple[str, bool, float]] = []
    for number, place in enumerate(places, start=1):
        found = engine.locate(load_image(place.image), place.phrase)
        height, width = found.heat.shape
        mask = place.mask(height, width)
        x, y = found.peak
        point = place.holds(x + 0.5, y + 0.5)
        model.append((place.phrase, point, average_precision(found.heat, mask)))
        middle = place.holds(width / 2, height / 2)
        centre.append((place.phrase, middle, average_precision(_nearness(height, width), mask)))
        done(number, len(places))
    return Localisation(len(places), _pointing(model), _pointing(centre))


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
