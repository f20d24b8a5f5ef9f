"""MedMoE: image features from an expert of the image's modality, aligned with text.

    pixels -> Swin pyramid -> router -> one expert -> regions  |
                                                               |-> similarity -> losses
    text   -> BERT -> words                                    |

Training minimises the distance of images to their own texts, as a whole and word by word, and the
router's error in the modality. Sources: MedMoE (arXiv 2506.08356); GLoRIA (ICCV 2021), whose
word-to-region attention is that of AttnGAN (https://arxiv.org/abs/1711.10485, equations 7 to 10).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    cosine_similarity,
    cross_entropy,
    gelu,
    interpolate,
    normalize,
    relu,
    scaled_dot_product_attention,
)

from medmoe_edge.config_contrastive import (
    PUBLISHED_GRID,
    SUMMED_LAYERS,
    BertConfig,
    ModalityConfig,
)
from medmoe_edge.models.swin import Pyramid, SwinTower

OUTSIDE = 2**30  # as published: the index of a word that takes part in the mean alone
NO_WORD = -1  # the word index of padding and of the marks around a text


class TextFeatures(NamedTuple):
    """`words` `[B, W, D]` with `mask` `[B, W]`, True where there is a word; `pooled` `[B, D]`."""

    words: Tensor
    mask: Tensor
    pooled: Tensor


class BertLayer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.out = nn.Linear(size, size)
        self.norm1 = nn.LayerNorm(size, config.norm_eps)
        self.fc1 = nn.Linear(size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, size)
        self.norm2 = nn.LayerNorm(size, config.norm_eps)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, D]` to the same; `mask` `[B, 1, 1, S]` is True for what may be seen."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dropout(self.out(mixed)))
        return self.norm2(  # type: ignore[no-any-return]
            x + self.dropout(self.fc2(gelu(self.fc1(x))))
        )


class BertTower(nn.Module):
    """Token ids `[B, S]` to hidden states and to word features."""

    def __init__(self, config: BertConfig, *, as_published: bool = False) -> None:
        super().__init__()
        size = config.hidden_size
        self.as_published = as_published
        self.heads = config.heads  # not visible in the shapes of the weights
        self.word_embedding = nn.Embedding(config.vocab_size, size)
        self.position_embedding = nn.Embedding(config.max_positions, size)
        self.type_embedding = nn.Embedding(2, size)  # a single text is all of type 0
        self.norm = nn.LayerNorm(size, config.norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))

    def forward(self, ids: Tensor, words: Tensor, seen: Tensor) -> TextFeatures:
        """The last layers' sum, word pieces summed into words; `pooled` is their mean.

        `words` `[B, S]` is each piece's word index, counted from 0, `NO_WORD` for padding and
        marks; `seen` `[B, S]` is False for padding only. As many words are returned as there are
        pieces. A text without words gives zeros.

        As published, `pooled` is the mean over all pieces, the marks among them; `words` then
        counts the first mark as a word, and what is no word of the mask from `OUTSIDE` on.
        """
        pieces = torch.stack(self.hidden_states(ids, seen)[-SUMMED_LAYERS:]).sum(0)  # [B, S, D]
        belongs = words[:, None, :] == torch.arange(words.shape[1], device=words.device)[:, None]
        summed = belongs.to(pieces.dtype) @ pieces  # [B, W, S] @ [B, S, D]
        mask = belongs.any(-1)
        if self.as_published:
            shares = seen / seen.sum(-1, keepdim=True)
            return TextFeatures(summed, mask, (pieces * shares[..., None]).sum(1))
        count = mask.sum(-1, keepdim=True).clamp_min(1)
        return TextFeatures(summed, mask, summed.sum(1) / count)

    def hidden_states(self, ids: Tensor, seen: Tensor) -> list[Tensor]:
        """The embeddings' and every layer's output, `[B, S, D]` each."""
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embedding(ids) + self.type_embedding.weight[0] + self.position_embedding(at)
        states = [self.norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1], seen[:, None, None, :]))
        return states


ROUTER_SIZE = 128


class ImageFeatures(NamedTuple):
    """`regions` `[B, h, w, D]` on the finest grid, `pooled` `[B, D]`, router logits `[B, E]`."""

    regions: Tensor
    pooled: Tensor
    router_logits: Tensor


class ScaleExpert(nn.Module):
    """One modality's view of the pyramid: every scale projected, enlarged and weighed.

    The scales are enlarged bilinearly on the grid, so that a region lies over its own pixels (the
    paper says "linear interpolation" to as many positions). The attention's first layer is
    applied before that: a linear map commutes with interpolation, whose weights sum to one, and
    the small grids have a third of the positions in all.
    """

    def __init__(self, channels: Sequence[int], size: int, *, as_published: bool = False) -> None:
        super().__init__()
        self.enlarge = lengthen if as_published else enlarge
        # a 1x1 convolution is a linear map of the channels
        self.projections = nn.ModuleList(nn.Linear(channel, size) for channel in channels)
        self.attention_in = nn.Linear(size, size // 2)
        self.attention_out = nn.Linear(size // 2, 1)

    def forward(self, scales: Sequence[Tensor]) -> Tensor:
        """Scales `[B, h, w, C]`, fine to coarse, to regions `[B, h, w, D]` of the finest grid."""
        grid = scales[0].shape[1]
        features, scores = [], []
        for x, projection in zip(scales, self.projections, strict=True):
            projected = relu(projection(x))
            hidden = self.enlarge(self.attention_in(projected), grid)
            scores.append(self.attention_out(relu(hidden)))  # [B, h, w, 1]
            features.append(self.enlarge(projected, grid))
        weights = torch.cat(scores, -1).softmax(-1)  # [B, h, w, scales]
        regions = features[0] * weights[..., :1]
        for index, x in enumerate(features[1:], start=1):
            regions = regions + x * weights[..., index : index + 1]
        return regions


class ModalityMoE(nn.Module):
    """The whole model. The router looks at the image alone: no label is needed to ask."""

    def __init__(self, config: ModalityConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.vision.channels
        self.vision = SwinTower(config.vision)
        self.router = nn.Sequential(
            nn.Linear(channels[-1], ROUTER_SIZE),
            nn.ReLU(),
            nn.Linear(ROUTER_SIZE, len(config.modalities)),
        )
        self.experts = nn.ModuleList(
            ScaleExpert(channels, config.size, as_published=config.as_published)
            for _ in range(config.experts)
        )
        self.text = BertTower(config.text, as_published=config.as_published)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Normalised pixels `[B, 3, S, S]`; only the experts that some image chose run."""
        pyramid = self.vision(pixels)
        pooled = pyramid.last.mean((1, 2))
        logits = self.router(pooled)  # [B, E]
        if self.config.as_published:
            return ImageFeatures(
                mixed_regions(self.experts, pyramid.scales, logits), pooled, logits
            )
        regions = self.regions(pyramid, self.choose(logits))
        return ImageFeatures(regions, regions.mean((1, 2)), logits)

    def encode_text(self, ids: Tensor, words: Tensor, seen: Tensor) -> TextFeatures:
        """Word features; see `BertTower.forward`."""
        return self.text(ids, words, seen)  # type: ignore[no-any-return]

    def choose(self, router_logits: Tensor) -> Tensor:
        """Each image's expert `[B]`: top-1. Its probability weighs nothing (no gate)."""
        chosen = router_logits.argmax(-1)
        return torch.zeros_like(chosen) if self.config.shared_expert else chosen

    def regions(self, pyramid: Pyramid, chosen: Tensor) -> Tensor:
        """Regions `[B, h, w, D]`, each image's from its expert `chosen` `[B]`."""
        parts, rows = [], []
        for index in sorted(set(chosen.tolist())):
            row = torch.where(chosen == index)[0]
            parts.append(self.experts[index]([scale[row] for scale in pyramid.scales]))
            rows.append(row)
        order = torch.cat(rows).argsort()
        return torch.cat(parts)[order]


def mixed_regions(
    experts: Iterable[nn.Module], scales: Sequence[Tensor], router_logits: Tensor
) -> Tensor:
    """As the authors' code has it: `[B, 16, 16, D]` of all experts, by their probabilities.

    The positions of the finest grid, read line by line, are averaged into 256 stretches.
    """
    gates = router_logits.softmax(-1)
    parts = [
        gates[:, index, None, None, None] * expert(scales) for index, expert in enumerate(experts)
    ]
    flat = torch.stack(parts).sum(0).flatten(1, 2)  # [B, P, D]
    pooled = stretches(flat.shape[1], PUBLISHED_GRID**2).to(flat) @ flat
    return pooled.view(len(pooled), PUBLISHED_GRID, PUBLISHED_GRID, -1)


def enlarge(x: Tensor, grid: int) -> Tensor:
    """`[B, h, w, C]` to `[B, grid, grid, C]`, bilinear between the centres of the cells."""
    if x.shape[1] == grid:
        return x
    size = (grid, grid)
    enlarged = interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return enlarged.permute(0, 2, 3, 1)


def lengthen(x: Tensor, grid: int) -> Tensor:
    """`enlarge` as the authors' code has it: linear over the positions read line by line."""
    if x.shape[1] == grid:
        return x
    lines = x.flatten(1, 2).transpose(1, 2)  # [B, C, h * w]
    longer = interpolate(lines, grid * grid, mode="linear", align_corners=False)
    return longer.transpose(1, 2).reshape(len(x), grid, grid, -1)


def stretches(positions: int, count: int) -> Tensor:
    """`[count, positions]`: what averages positions as PyTorch's adaptive pooling does.

    Stretch i reaches from floor(i p / n) to ceil((i + 1) p / n), so neighbours may share one.
    """
    starts = torch.arange(count) * positions // count
    ends = -(-(torch.arange(count) + 1) * positions // count)
    at = torch.arange(positions)
    inside = (at >= starts[:, None]) & (at < ends[:, None])
    return inside / inside.sum(-1, keepdim=True)


GLOBAL_WEIGHT, LOCAL_WEIGHT, ROUTER_WEIGHT = 0.5, 0.5, 2.0
GROUNDING_WEIGHT = 1.0  # of ours; the others are the paper's
UNLABELLED = -1  # the modality of an image that has no label


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
    else be taught apart. `modality` `[B]` is each image's class or `UNLABELLED`.
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
    total = cross_entropy(logits.float(), modality, ignore_index=UNLABELLED, reduction="sum")
    return total / (modality != UNLABELLED).sum().clamp_min(1)


def grounding_loss(regions: Tensor, texts: TextFeatures, boxes: Tensor) -> Tensor:
    """Cross-entropy of where texts are said to be and where they are, 0 being perfect.

    Not the paper's: what `region_map` makes of regions `[G, h, w, D]`, as logits of places, is held
    against `boxes` `[G, h, w]`, each spread evenly over its places and of sum 1.
    """
    maps = region_map(regions.float(), texts.words.float(), texts.mask)
    return cross_entropy(CONTRAST_TEMPERATURE * maps.flatten(1).float(), boxes.flatten(1))


ATTENTION_TEMPERATURE = 4.0  # sharpens which regions a word attends to
WORD_TEMPERATURE = 5.0  # between the mean (0) and the maximum over words
CONTRAST_TEMPERATURE = 10.0  # from similarities to logits


def similarity(images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """`[I, T]`, each -1 to 1: the mean of the global and the local similarity."""
    whole = global_similarity(images.pooled, texts.pooled)
    return (whole + local_similarity(images.regions, texts.words, texts.mask)) / 2


def global_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines `[I, T]` of pooled features `[I, D]` and `[T, D]`."""
    return normalize(images, dim=-1) @ normalize(texts, dim=-1).T


def local_similarity(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """`[I, T]` from regions `[I, h, w, D]` and words `[T, W, D]` with their mask `[T, W]`.

    Each region is shared out over the words of a text (softmax), each word gathers the regions
    that fall to it (softmax over regions, temperature 4), and the cosines of words and what they
    gathered give a smooth maximum: `log(mean_w exp(5 cos_w)) / 5`. The mean, where GLoRIA sums:
    a sum favours long texts. Every text needs a word.
    """
    regions = regions.flatten(1, 2)  # [I, R, D]
    lengths = mask.sum(-1).tolist()
    flat = words[mask]  # [M, D], all words of all texts
    scores = regions @ flat.T  # [I, R, M]
    shares = torch.cat([part.softmax(-1) for part in torch.split(scores, lengths, -1)], -1)
    attention = (ATTENTION_TEMPERATURE * shares).softmax(1)
    gathered = attention.transpose(1, 2) @ regions  # [I, M, D]
    cosines = cosine_similarity(gathered, flat, dim=-1)  # [I, M]
    powers = torch.split((WORD_TEMPERATURE * cosines).exp(), lengths, -1)
    return torch.stack([part.mean(-1) for part in powers], -1).log() / WORD_TEMPERATURE


def region_map(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Where a text's words are: `[B, h, w]`, -1 to 1, from `[B, h, w, D]` and `[B, W, D]`.

    The mean over words of the cosine of word and region. Not the attention of
    `local_similarity`: where a text is a single word, that is the same everywhere.
    """
    cosines = torch.einsum("bhwd,bnd->bhwn", normalize(regions, dim=-1), normalize(words, dim=-1))
    weights = mask / mask.sum(-1, keepdim=True)  # [B, W]
    return torch.einsum("bhwn,bn->bhw", cosines, weights.to(cosines.dtype))
