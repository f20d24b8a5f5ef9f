"""What a training run is: a JSON recipe of data and three phases, read strictly."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from medmoe_edge.config import Config
from medmoe_edge.errors import ConfigError, DataError


@dataclass(frozen=True)
class PhaseConfig(Config):
    """One phase. `train` lists patterns of parameter names that learn; all else is frozen.

    `tower_rate` scales the learning rate of the vision tower, `matrix_rate` that of the
    decoder's matrices. `labelled_share` is the part of the labelled images that each epoch draws
    beside the questions.
    """

    epochs: int
    learning_rate: float
    train: tuple[str, ...]
    tower_rate: float = 0.1
    matrix_rate: float = 1.0
    batch_images: int = 16
    accumulation: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.05
    dropout: float = 0.0
    label_smoothing: float = 0.0
    router_weight: float = 0.0
    labelled_share: float = 1.0
    max_turns: int = 12

    def __post_init__(self) -> None:
        counts = (self.batch_images, self.accumulation, self.max_turns, len(self.train))
        shares = (self.labelled_share, self.dropout, self.label_smoothing)
        if self.epochs < 0 or min(counts) < 1:
            raise ConfigError(
                "A phase of the recipe has a count that is too small.",
                "Set batch_images, accumulation and max_turns to 1 or more; name what to train.",
            )
        if not (0 <= self.warmup < 1 and all(0 <= share <= 1 for share in shares)):
            raise ConfigError(
                "A phase of the recipe has a share outside 0 to 1.",
                "Check warmup (below 1), labelled_share, dropout and label_smoothing.",
            )


@dataclass(frozen=True)
class Recipe(Config):
    """A whole run: which model, which data (relative to the data folder), which phases."""

    preset: str
    seed: int
    vocab_size: int
    questions: str
    labels: str
    alignment: PhaseConfig
    instruction: PhaseConfig
    moe: PhaseConfig
    validation: str | None = None


def read_recipe(name_or_path: str) -> Recipe:
    """A recipe that ships with the package, by name, or a JSON file."""
    shipped = files("medmoe_edge.training").joinpath("recipes", f"{name_or_path}.json")
    try:
        source = shipped if shipped.is_file() else Path(name_or_path)
        data = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"The recipe {name_or_path!r} cannot be read.",
            "Give the name of a shipped recipe (nano) or a JSON file.",
        ) from error
    return Recipe.from_json(data, "recipe")
