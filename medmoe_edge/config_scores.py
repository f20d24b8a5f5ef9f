"""How a MedMoE's similarities become scores, fitted on data once it is trained."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from medmoe_edge.config import Config
from medmoe_edge.errors import ConfigError

SCORES = "scores.json"  # in a checkpoint; a bundle has them in its manifest


@dataclass(frozen=True)
class Scores(Config):
    """`temperature` makes logits of similarities; the limits are for images of known modalities.

    An image is unfamiliar where the router's entropy, in nats, is above `entropy_limit`, or its
    evidence (`modality_router.py`) below `evidence_limit`. Unfitted, the temperature is that of
    training.
    """

    temperature: float = 10.0
    entropy_limit: float = 0.5
    evidence_limit: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf and 0 <= self.entropy_limit < math.inf):
            raise ConfigError(
                f"scores have the temperature {self.temperature:g} and the entropy limit "
                f"{self.entropy_limit:g}.",
                "Both are positive and finite.",
            )


def read_scores(checkpoint: Path) -> Scores:
    """Those of a checkpoint folder; raises `ConfigError` for a file that is no such scores."""
    path = checkpoint / SCORES
    if not path.exists():
        return Scores()
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read.", "Train or copy the model again.") from error
    return Scores.from_json(data, SCORES)
