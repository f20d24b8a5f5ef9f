"""What a bundle promises: the gates that its verification must pass, kept in its manifest."""

from dataclasses import dataclass

from medmoe_edge.config import Config


@dataclass(frozen=True)
class Gates(Config):
    """Bounds, all from 0 to 1: the least agreement and cosine, the most loss and flips."""

    answer_agreement: float
    accuracy_drop: float
    routing_flips: float
    vision_cosine: float = 0.99


DEFAULT_GATES: dict[str, Gates] = {
    "fp32": Gates(0.999, 0.001, 0.001, 0.9999),
    "int8": Gates(0.99, 0.003, 0.005),
    "int4": Gates(0.97, 0.01, 0.02),
    "mixed": Gates(0.97, 0.01, 0.02),
}
