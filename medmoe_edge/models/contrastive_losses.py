"""What MedMoE minimises: images and their texts together, and the router's modality."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cross_entropy

from medmoe_edge.models.bert import TextFeatures
from medmoe_edge.models.contrastive import ImageFeatures
from medmoe_edge.models.contrastive_similarity import (
    CONTRAST_TEMPERATURE,
    global_similarity,
    local_similarity,
    region_map,
)

GLOBAL_WEIGHT, LOCAL_WEIGHT, ROUTER_WEIGHT = 0.5, 0.5, 2.0
GROUNDING_WEIGHT = 1.0  # of ours; the others are the paper's
UNKNOWN = -1  # the modality of an image that has no label


class Losses(NamedTuple):
    """The parts, each a scalar, and their weighted sum."""

    whole: Tensor
    local: Tensor
    router: Tensor

    @property
    def total(self) -> Tensor:
        """`0.5 global + 0.5 local + 2 router`."""
        aligned = GLOBAL_WEIGHT * self.whole + LOCAL_WEIGHT * self.local
        return aligned + ROUTER_WEIGHT * self.router


def losses(images: ImageFeatures, texts: TextFeatures, same: Tensor, modality: Tensor) -> Losses:
    """The losses of B images and their B texts.

    `same` `[B, B]` is True where a text fits an image: the diagonal, and equal texts, which would
    else be taught apart. `modality` `[B]` is each image's class or `UNKNOWN`.
    """
    local = local_similarity(images.regions, texts.words, texts.mask)
    return Losses(
        contrastive_loss(global_similarity(images.pooled, texts.pooled), same),
        contrastive_loss(local, same),
        router_loss(images.router_logits, modality),
    )


def contrastive_loss(similarities: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy over the texts of an image plus that over the images of a text.

    As in GLoRIA, where `same` is the diagonal; else the target is spread evenly over what fits
    (UniCL, https://arxiv.org/abs/2204.03610). Both `[B, B]`; every row and column needs a fit.
    """
    logits = CONTRAST_TEMPERATURE * similarities.float()
    fits = same.float()
    by_image = cross_entropy(logits, fits / fits.sum(1, keepdim=True))
    by_text = cross_entropy(logits.T, fits.T / fits.sum(0)[:, None])
    return by_image + by_text


def router_loss(logits: Tensor, modality: Tensor) -> Tensor:
    """Cross-entropy of router logits `[B, E]` where the modality is known; 0 where none is."""
    total = cross_entropy(logits.float(), modality, ignore_index=UNKNOWN, reduction="sum")
    return total / (modality != UNKNOWN).sum().clamp_min(1)


def grounding_loss(regions: Tensor, texts: TextFeatures, boxes: Tensor) -> Tensor:
    """Cross-entropy of where texts are said to be and where they are, 0 being perfect.

    Not the paper's: what `region_map` makes of regions `[G, h, w, D]`, as logits of places, is held
    against `boxes` `[G, h, w]`, each spread evenly over its places and of sum 1.
    """
    maps = region_map(regions.float(), texts.words.float(), texts.mask)
    return cross_entropy(CONTRAST_TEMPERATURE * maps.flatten(1).float(), boxes.flatten(1))
