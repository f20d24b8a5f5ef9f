"""What a training run is: a JSON recipe of data and three phases, read strictly."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medmoe_edge.config import Config
from medmoe_edge.errors import ConfigError, DataError


@dataclass(frozen=True)
class Schedule(Config):
    """What the loop does. `train` lists patterns of parameter names that learn; others are frozen.

    `tower_rate` scales the learning rate of the vision tower, `matrix_rate` that of the matrices
    that Muon trains.
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

    def __post_init__(self) -> None:
        if self.epochs < 0 or min(self.batch_images, self.accumulation, len(self.train)) < 1:
            raise ConfigError(
                "A phase of the recipe has a count that is too small.",
                "Set batch_images and accumulation to 1 or more; name what to train.",
            )
        if not (0 <= self.warmup < 1 and 0 <= self.dropout <= 1):
            raise ConfigError(
                "A phase of the recipe has a share outside 0 to 1.",
                "Check warmup (below 1) and dropout.",
            )


@dataclass(frozen=True)
class PhaseConfig(Schedule):
    """One of Med-MoE's phases.

    `labelled_share` is the part of the labelled images that each epoch draws beside the questions.
    """

    label_smoothing: float = 0.0
    router_weight: float = 0.0
    labelled_share: float = 1.0
    max_turns: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_turns < 1:
            raise ConfigError("A phase of the recipe asks nothing.", "Set max_turns to 1 or more.")
        if not (0 <= self.labelled_share <= 1 and 0 <= self.label_smoothing <= 1):
            raise ConfigError(
                "A phase of the recipe has a share outside 0 to 1.",
                "Check labelled_share and label_smoothing.",
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
    """A Med-MoE recipe that ships with the package, by name, or a JSON file."""
    return Recipe.from_json(recipe_json(name_or_path), "recipe")


def recipe_json(name_or_path: str) -> dict[str, Any]:
    """The content of a shipped recipe or of a JSON file, not yet checked; raises `DataError`."""
    shipped = files("medmoe_edge.training").joinpath("recipes", f"{name_or_path}.json")
    try:
        source = shipped if shipped.is_file() else Path(name_or_path)
        data = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"The recipe {name_or_path!r} cannot be read.",
            "Give the name of a shipped recipe (nano, modality-nano) or a JSON file.",
        ) from error
    if not isinstance(data, dict):
        raise DataError(f"The recipe {name_or_path!r} is not a JSON object.", "Correct it.")
    return data
