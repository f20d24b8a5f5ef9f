"""The figures of a comparison of two models, and their JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """`count` of `total`; `share` is 0 where there is nothing to count."""

    share: float
    count: int
    total: int

    @classmethod
    def of(cls, count: int, total: int) -> "Share":
        """The share that `count` is of `total`."""
        return cls(count / total if total else 0.0, count, total)


@dataclass(frozen=True)
class Accuracy:
    """Exact match with the reference answers of `n` questions that have one.

    `difference` is candidate less reference, with its 95% interval from resampling images.
    """

    n: int
    reference: float
    candidate: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Divergence:
    """KL(reference || candidate) in nats, over all positions of the answers."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Answers:
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
class Routing:
    """`flips`: tokens x layers whose set of chosen experts differs, in prefixes and questions.

    `error_by_layer` is the relative error of the router logits. Layers are the decoder's.
    """

    flips: Share
    by_layer: Mapping[int, Share]
    by_modality: Mapping[str, Share]
    error_by_layer: Mapping[int, float]


@dataclass(frozen=True)
class Vision:
    """Cosine of the image tokens, averaged per image; 95% interval of the images' mean."""

    cosine_mean: float
    cosine_interval: tuple[float, float]
    cosine_min: float
    relative_error: float


@dataclass(frozen=True)
class Fidelity:
    """All figures; `routing` is None for a dense model, `finite` False if anything was not."""

    questions: int
    images: int
    overall: Answers
    by_modality: Mapping[str, Answers]
    by_answer_type: Mapping[str, Answers]
    routing: Routing | None
    vision: Vision
    finite: bool

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        values = asdict(self)
        for name in ("by_layer", "error_by_layer") if self.routing else ():
            layers = values["routing"][name]
            values["routing"][name] = {str(layer): figure for layer, figure in layers.items()}
        return values
