"""The figures of a comparison of two models, and their JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

from medmoe_edge.config import Config


@dataclass(frozen=True)
class Share(Config):
    """`count` of `total`; `share` is 0 where there is nothing to count."""

    share: float
    count: int
    total: int

    @classmethod
    def of(cls, count: int, total: int) -> "Share":
        """The share that `count` is of `total`."""
        return cls(count / total if total else 0.0, count, total)


@dataclass(frozen=True)
class Accuracy(Config):
    """Exact match with the reference answers of `n` questions that have one.

    `difference` is candidate less reference, with its 95% interval from resampling images.
    """

    n: int
    reference: float
    candidate: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Divergence(Config):
    """KL(reference || candidate) in nats, over all positions of the answers."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Answers(Config):
    """Figures over `n` questions; `accuracy` is None where none of them has an answer.

    `answer_agreement`: the candidate's own answer reads the same; `token_agreement`: positions at
    which it would have chosen the reference's token.
    """

    n: int
    answer_agreement: Share
    token_agreement: Share
    kl: Divergence
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Routing(Config):
    """`flips`: tokens x layers whose set of chosen experts differs, in prefixes and questions.

    `error_by_layer` is the relative error of the router logits. Layers are the decoder's.
    """

    flips: Share
    by_layer: Mapping[int, Share]
    by_modality: Mapping[str, Share]
    error_by_layer: Mapping[int, float]


@dataclass(frozen=True)
class Vision(Config):
    """Cosine of the image tokens, averaged per image; 95% interval of the images' mean."""

    cosine_mean: float
    cosine_interval: tuple[float, float]
    cosine_min: float
    relative_error: float


@dataclass(frozen=True)
class Fidelity(Config):
    """All figures; `routing` is None for a dense model, `finite` False if anything was not."""

    questions: int
    images: int
    overall: Answers
    by_modality: Mapping[str, Answers]
    by_answer_type: Mapping[str, Answers]
    routing: Routing | None
    vision: Vision
    finite: bool


@dataclass(frozen=True)
class ContrastiveFigures(Config):
    """Of a MedMoE: shares of images with the same modality and label, and cosines.

    The cosines are of pooled features, of regions and of texts: their means, and the least.
    """

    images: int
    texts: int
    modality_agreement: float
    zero_shot_agreement: float
    pooled_cosine: float
    region_cosine: float
    text_cosine: float
    pooled_cosine_min: float
    region_cosine_min: float
    text_cosine_min: float
