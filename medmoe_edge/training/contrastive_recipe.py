"""What a training run of MedMoE is: one phase over images and captions."""

from dataclasses import dataclass, replace

from medmoe_edge.config import Config
from medmoe_edge.config_contrastive import ModalityConfig
from medmoe_edge.errors import DataError
from medmoe_edge.presets import MODALITY_PRESETS
from medmoe_edge.training.recipe import Schedule, recipe_json


@dataclass(frozen=True)
class ModalityRecipe(Config):
    """Which model, which data (relative to the data folder), how long.

    `shared_expert` trains the model without experts. Each `hold_out`th training image of a caption
    is kept from training: scores are fitted on these. With `boxes` around what phrases name, maps
    are taught where it is; those on other images are not looked at.
    """

    preset: str
    seed: int
    questions: str
    labels: str
    schedule: Schedule
    shared_expert: bool = False
    hold_out: int = 20
    boxes: str | None = None

    def model_config(self) -> ModalityConfig:
        """What is trained; raises `DataError` for a preset that is no MedMoE."""
        if self.preset not in MODALITY_PRESETS:
            raise DataError(
                f"The recipe's preset {self.preset!r} is no MedMoE.",
                f"Use one of: {', '.join(MODALITY_PRESETS)}.",
            )
        return replace(MODALITY_PRESETS[self.preset], shared_expert=self.shared_expert)


def read_modality_recipe(name_or_path: str) -> ModalityRecipe:
    """A MedMoE recipe that ships with the package, by name, or a JSON file."""
    return ModalityRecipe.from_json(recipe_json(name_or_path), "recipe")


def is_modality_recipe(name_or_path: str) -> bool:
    """Whether a recipe's preset is a MedMoE; raises `DataError` where it cannot be read."""
    return recipe_json(name_or_path).get("preset") in MODALITY_PRESETS
