"""What a training run is: a JSON recipe of data and three phases, read strictly."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from medmoe_edge.config import Config
from medmoe_edge.errors import DataError


@dataclass(frozen=True)
class PhaseConfig(Config):
    """One phase. `train` lists patterns of parameter names that learn; all else is frozen.

    `tower_rate` scales the learning rate of the vision tower. `labelled_share` is the part of the
    labelled images that each epoch draws beside the questions.
    """

    epochs: int
    learning_rate: float
    train: tuple[str, ...]
    tower_rate: float = 0.1
    batch_images: int = 16
    accumulation: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.05
    dropout: float = 0.0
    label_smoothing: float = 0.0
    router_weight: float = 0.0
    labelled_share: float = 1.0
    max_turns: int = 12


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
    source = shipped if shipped.is_file() else Path(name_or_path)
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The recipe {name_or_path!r} cannot be read.",
            "Give the name of a shipped recipe (nano) or a JSON file.",
        ) from error
    return Recipe.from_json(data, "recipe")
